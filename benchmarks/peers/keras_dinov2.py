"""DINOv2 in KerasHub, from a block on."""

import keras
import keras_hub

from benchmarks.peers import keras_loop, recipe
from jaxtl.config import RANDOM, Experiment


def build(experiment: Experiment, classes: int) -> keras.Model:
    """Returns the model of an experiment.

    Raises:
        ValueError: it does not freeze a prefix of the blocks, or has random weights.
    """
    model = experiment.model
    if model.weights == RANDOM:
        raise ValueError("this peer starts from pretrained weights")
    shape = (model.image_size, model.image_size, 3)
    weights = model.weights
    backbone = keras_hub.models.DINOV2Backbone.from_preset(weights, image_shape=shape)
    first = recipe.learning(experiment.freeze).first
    starts = {f"block_{index + 1}": index for index in range(backbone.num_layers)}
    if first not in (*starts, "head"):
        raise ValueError(f"this peer learns from a block on, or the head, not {first or 'everything'}")
    frozen = [backbone.embeddings, *backbone.encoder.layers[: starts.get(first)]]
    for layer in [*frozen, backbone.layernorm] if first == "head" else frozen:
        layer.trainable = False
    images = keras_loop.images_input()
    tokens = backbone({"images": keras_loop.Pixels(experiment)(images)})
    made = keras.Model(images, keras_loop.head(model.head, tokens[:, 0], classes))
    made.width = backbone.hidden_dim
    return made
