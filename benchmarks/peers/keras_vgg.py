"""VGG19 in KerasHub, from a convolution on."""

import keras
import keras_hub

from benchmarks.peers import keras_loop, recipe
from jaxtl.config import RANDOM, Experiment
from jaxtl.models.vgg import VGGConfig


def build(experiment: Experiment, classes: int) -> keras.Model:
    """Returns the model of an experiment.

    Raises:
        ValueError: it is not VGG19, or does not freeze what comes before a convolution.
    """
    model = experiment.model
    if model.preset != "vgg19":
        raise ValueError(f"this peer is VGG19, not {model.preset}")
    counts, channels = zip(*VGGConfig().blocks, strict=True)
    shape = (model.image_size, model.image_size, 3)
    backbone = keras_hub.models.VGGBackbone(list(counts), list(channels), image_shape=shape)
    first = recipe.learning(experiment.freeze).first
    names = [layer.name for layer in backbone.layers]
    if first not in (*names, "head"):
        raise ValueError(f"this peer learns from a convolution on, or the head, not {first or 'everything'}")
    for layer in backbone.layers[: names.index(first) if first in names else None]:
        layer.trainable = False
    _load(backbone, model.weights)
    images = keras_loop.images_input()
    features = keras.layers.Flatten()(backbone(keras_loop.Pixels(experiment)(images)))
    made = keras.Model(images, keras_loop.head(model.head, features, classes))
    made.width = None
    return made


def _load(backbone: keras.Model, weights: str) -> None:
    if weights == RANDOM:
        for layer in backbone.layers:
            if isinstance(layer, keras.layers.Conv2D):  # one initialiser gives every layer the same values
                layer.kernel.assign(keras.initializers.HeNormal()(layer.kernel.shape))
        return
    from jaxtl.weights import tables
    from jaxtl.weights.files import Checkpoint

    arrays = Checkpoint(weights)
    for row in tables.table(VGGConfig(), top=None).rows:
        name, transform = row.sources[0]
        variable = getattr(backbone.get_layer(row.stage), row.path.rpartition("/")[2])
        variable.assign(transform.read(arrays[name]))
