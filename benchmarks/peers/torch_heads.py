"""Heads in torch, with the initial values of jaxtl's: the output layer from zero, biases from zero."""

import torch
from torch import nn

from jaxtl.config import Head


def nodes(classes: int) -> int:
    """Returns the number of outputs: one for two classes, whose sigmoid is the second's probability."""
    return 1 if classes == 2 else classes


def head(settings: Head, inputs: int, classes: int) -> nn.Module:
    """Returns the head that an experiment asks for; `fc` and `mlp` take [batch, inputs], `bigru` sequences."""
    if settings.kind == "bigru":
        return BiGru(inputs, settings.hidden, settings.dropout, nodes(classes))
    if settings.kind == "fc":
        return nn.Sequential(nn.Dropout(settings.dropout), _output(inputs, nodes(classes)))
    hidden = nn.Linear(inputs, settings.hidden)
    nn.init.zeros_(hidden.bias)
    return nn.Sequential(hidden, nn.ReLU(), nn.Dropout(settings.dropout), _output(settings.hidden, nodes(classes)))


class BiGru(nn.Module):
    """A GRU in each direction on packed sequences, their last states side by side, dropout, dense."""

    def __init__(self, inputs: int, hidden: int, dropout: float, nodes: int):
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.output = _output(2 * hidden, nodes)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Returns logits [batch, nodes] of [batch, length, inputs]; `lengths` int64 [batch], on the CPU."""
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)  # [directions, batch, hidden]
        return self.output(self.dropout(last.transpose(0, 1).flatten(1)))


def _output(inputs: int, nodes: int) -> nn.Linear:
    layer = nn.Linear(inputs, nodes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
