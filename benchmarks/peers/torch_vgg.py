"""VGG19 in torch, in torchvision's layout, from a convolution on."""

import torch
from torch import nn

from benchmarks.peers import recipe, torch_heads
from benchmarks.peers.torch_loop import Images
from jaxtl.config import RANDOM, Experiment
from jaxtl.weights.files import Checkpoint

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # (convolutions, channels)


def build(experiment: Experiment, classes: int) -> "Classifier":
    """Returns the model of an experiment.

    Raises:
        ValueError: it is not VGG19, or does not freeze what comes before a convolution.
    """
    if experiment.model.preset != "vgg19":
        raise ValueError(f"this peer is VGG19, not {experiment.model.preset}")
    return Classifier(experiment, classes)


class Classifier(Images):
    """The last feature map, flattened, then the head; what comes before the first stage that learns is frozen."""

    width = None

    def __init__(self, experiment: Experiment, classes: int):
        super().__init__(experiment)
        layers, starts, channels = [], {}, 3
        for block, (count, width) in enumerate(BLOCKS, 1):
            for index in range(1, count + 1):
                starts[f"block{block}_conv{index}"] = len(layers)
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.backbone = nn.Sequential(*layers)
        first = recipe.learning(experiment.freeze).first
        if first not in (*starts, "head"):
            raise ValueError(f"this peer learns from a convolution on, or the head, not {first or 'everything'}")
        self.start = starts.get(first, len(layers))
        self._initialise(experiment.model.weights)
        self.freeze(list(self.backbone[: self.start]))
        side = experiment.model.image_size // 2 ** len(BLOCKS)
        self.head = torch_heads.head(experiment.model.head, side * side * channels, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits [batch, nodes] of images [batch, height, width, 3] uint8."""
        with torch.no_grad():
            pixels = self.pixels(images.to(self.mean.device)).contiguous(memory_format=torch.channels_last)
            hidden = self.backbone[: self.start](pixels)
        hidden = self.backbone[self.start :](hidden)
        return self.head(hidden.permute(0, 2, 3, 1).flatten(1))  # as the channels lie in memory

    def _initialise(self, weights: str) -> None:
        if weights != RANDOM:
            prefix = "features."  # torchvision's, and timm's
            found = Checkpoint(weights)
            arrays = {name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)}
            self.backbone.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
            return
        for layer in self.backbone:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
