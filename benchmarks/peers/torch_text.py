"""BERT in torch + transformers, frozen or not, with a dense layer on [CLS] or a bidirectional GRU."""

import contextlib

import numpy as np
import torch
from transformers import BertModel

from benchmarks.peers import batches, recipe, torch_heads
from benchmarks.peers.torch_loop import Classifier as Base
from benchmarks.prepare import Split
from jaxtl.config import RANDOM, Experiment


def build(experiment: Experiment, classes: int) -> "Classifier":
    """Returns the model of an experiment.

    Raises:
        ValueError: it freezes a part of the backbone, or has random weights.
    """
    if experiment.model.weights == RANDOM:
        raise ValueError("this peer starts from pretrained weights")
    return Classifier(experiment, classes)


class Classifier(Base):
    """The class token, or all tokens, after the last layer, then the head."""

    def __init__(self, experiment: Experiment, classes: int):
        super().__init__()
        weights = experiment.model.weights
        self.backbone = BertModel.from_pretrained(weights, add_pooling_layer=False, dtype=torch.float32)
        first = recipe.learning(experiment.freeze).first
        if first not in (None, "head"):
            raise ValueError(f"this peer learns everything, or the head, not {first} and after")
        self.frozen = first == "head"
        self.freeze([self.backbone] if self.frozen else [])
        self.width = self.backbone.config.hidden_size
        self.head = torch_heads.head(experiment.model.head, self.width, classes)
        self.sequence = experiment.model.head.reads == "sequence"

    def inputs(self, split: Split, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Returns token ids int32 [batch, length of the longest], and the lengths int64 [batch]."""
        ids, lengths = batches.padded(split, rows)
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Returns logits [batch, nodes]. `lengths` is on the CPU."""
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        device = self.backbone.device
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            states = self.backbone(ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state
        return self.head(states, lengths) if self.sequence else self.head(states[:, 0])
