"""BERT in KerasHub, frozen or not, with a dense layer on [CLS] or a bidirectional GRU."""

import keras
import keras_hub
from keras import ops

from benchmarks.peers import keras_loop, recipe
from jaxtl.config import RANDOM, Experiment


def build(experiment: Experiment, classes: int) -> keras.Model:
    """Returns the model of an experiment.

    Raises:
        ValueError: it freezes a part of the backbone, or has random weights.
    """
    if experiment.model.weights == RANDOM:
        raise ValueError("this peer starts from pretrained weights")
    backbone = keras_hub.models.BertBackbone.from_preset(experiment.model.weights)
    first = recipe.learning(experiment.freeze).first
    if first not in (None, "head"):
        raise ValueError(f"this peer learns everything, or the head, not {first} and after")
    backbone.trainable = first is None
    backbone.pooled_dense.trainable = False  # not read
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in ("ids", "mask")}
    named = {"token_ids": inputs["ids"], "padding_mask": inputs["mask"], "segment_ids": ops.zeros_like(inputs["ids"])}
    # A frozen layer of Keras goes on dropping out unless it is told not to.
    sequence = backbone(named, **({} if first is None else {"training": False}))["sequence_output"]
    settings = experiment.model.head
    if settings.reads == "sequence":
        logits = keras_loop.head(settings, sequence, classes, mask=ops.cast(inputs["mask"], "bool"))
    else:
        logits = keras_loop.head(settings, sequence[:, 0], classes)
    made = keras.Model(inputs, logits)
    made.width = backbone.hidden_dim
    return made
