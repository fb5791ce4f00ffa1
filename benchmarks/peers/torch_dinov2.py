"""DINOv2 in torch + transformers, from a block on."""

import torch
from transformers import Dinov2Model

from benchmarks.peers import recipe, torch_heads
from benchmarks.peers.torch_loop import Images
from jaxtl.config import RANDOM, Experiment


def build(experiment: Experiment, classes: int) -> "Classifier":
    """Returns the model of an experiment.

    Raises:
        ValueError: it does not freeze a prefix of the blocks, or has random weights.
    """
    if experiment.model.weights == RANDOM:
        raise ValueError("this peer starts from pretrained weights")
    return Classifier(experiment, classes)


class Classifier(Images):
    """Class token after the final norm, then the head; what comes before the first block that learns is frozen."""

    def __init__(self, experiment: Experiment, classes: int):
        super().__init__(experiment)
        self.backbone = Dinov2Model.from_pretrained(experiment.model.weights, dtype=torch.float32)
        config = self.backbone.config
        first = recipe.learning(experiment.freeze).first
        starts = {f"block_{index + 1}": index for index in range(config.num_hidden_layers)}
        if first not in (*starts, "head"):
            raise ValueError(f"this peer learns from a block on, or the head, not {first or 'everything'}")
        self.start = starts.get(first, config.num_hidden_layers)
        norm = [self.backbone.layernorm] if first == "head" else []
        self.freeze([self.backbone.embeddings, *self.backbone.encoder.layer[: self.start], *norm])
        self.head = torch_heads.head(experiment.model.head, config.hidden_size, classes)
        self.width = config.hidden_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits [batch, nodes] of images [batch, height, width, 3] uint8."""
        layers = self.backbone.encoder.layer
        with torch.no_grad():
            hidden = self.backbone.embeddings(self.pixels(images.to(self.mean.device)))
            for layer in layers[: self.start]:
                hidden = layer(hidden)
        for layer in layers[self.start :]:
            hidden = layer(hidden)
        return self.head(self.backbone.layernorm(hidden)[:, 0])
