"""The model of this folder: a backbone of transformers (or VGG19), and the head that was trained on it.

    import sys; sys.path.append(FOLDER)
    from modeling_jaxtl import load

    model = load(FOLDER)                                                   # a torch.nn.Module, in eval mode
    logits = model(input_ids=ids, attention_mask=mask)                     # texts
    logits = model(pixel_values=pixels)                                    # images
    model.classes                                                          # what the logits stand for, in order

Needs torch, safetensors and, but for VGG19, transformers. Reads config.json and model.safetensors (the backbone, which
`transformers` loads without this file too), head.json and head.safetensors. For inference: there is no dropout.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def load(folder: str | Path) -> "Model":
    """Returns the model of a folder."""
    folder = Path(folder)
    head = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    model = Model(backbone(folder, head), Head(load_file(folder / "head.safetensors")), head["reads"], head["classes"])
    return model.eval()


def backbone(folder: Path, head: dict) -> nn.Module:
    """Returns the backbone alone: a model of transformers, or `VGG`."""
    if not head["architecture"]:
        return VGG(load_file(folder / "model.safetensors"))
    import transformers

    kind = getattr(transformers, head["architecture"])
    # Those that have a pooler have one by default; here they have it where the head reads it.
    pooler = {"add_pooling_layer": head["reads"] == "pooled"} if kind.__name__ in _WITH_POOLER else {}
    return kind.from_pretrained(folder, **pooler)


_WITH_POOLER = ("BertModel", "ViTModel", "DeiTModel")


class Model(nn.Module):
    """Backbone and head: -> logits [batch, classes]."""

    def __init__(self, backbone: nn.Module, head: nn.Module, reads: str, classes: list[str]):
        super().__init__()
        self.backbone, self.head, self.reads, self.classes = backbone, head, reads, classes

    def forward(
        self,
        *,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images float [batch, 3, size, size]; or ids [batch, length], filled up at the end, and a mask, 1 for text."""
        if input_ids is None:
            return self.head(self.features(self.backbone(pixel_values)))
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(self.features(output), attention_mask.sum(dim=1))

    def features(self, output) -> torch.Tensor:
        """Returns what the head reads of the backbone's output."""
        if self.reads == "logits":
            return output if torch.is_tensor(output) else output.logits
        if self.reads == "flatten":
            return output.permute(0, 2, 3, 1).flatten(1)  # the head was trained on channels last
        if self.reads == "pooled":
            return output.pooler_output
        tokens = output.last_hidden_state
        if self.reads == "cls":
            return tokens[:, 0]
        if self.reads == "cls_patches":
            return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
        return tokens


class Head(nn.Module):
    """A bidirectional GRU over all tokens, or a hidden layer with ReLU, or neither; then a linear layer.

    Which, and how wide, the weights tell.
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.gru = self.hidden = None
        if "gru.weight_ih_l0" in weights:
            rows, inputs = weights["gru.weight_ih_l0"].shape
            self.gru = nn.GRU(inputs, rows // 3, batch_first=True, bidirectional=True)
        if "hidden.weight" in weights:
            self.hidden = nn.Linear(*weights["hidden.weight"].shape[::-1])
        self.classifier = nn.Linear(*weights["classifier.weight"].shape[::-1])
        self.load_state_dict(weights)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Features [batch, width], or of a GRU [batch, length, width] with the lengths, -> logits [batch, classes]."""
        if self.gru is not None:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            x = self.gru(packed)[1].transpose(0, 1).flatten(1)  # the last states of both directions
        if self.hidden is not None:
            x = torch.relu(self.hidden(x))
        return self.classifier(x)


class VGG(nn.Module):
    """VGG19 with torchvision's names, up to the last feature map, or with the classifier where its weights are."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        numbers = sorted({int(found[1]) for name in weights if (found := re.match(r"features\.(\d+)\.", name))})
        layers = []
        for number, following in zip(numbers, [*numbers[1:], numbers[-1] + 3], strict=True):
            outputs, inputs = weights[f"features.{number}.weight"].shape[:2]
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            if following - number == 3:  # a number is left out where a pooling layer is
                layers.append(nn.MaxPool2d(2))
        self.features, self.classifier = nn.Sequential(*layers), None
        if "classifier.0.weight" in weights:
            dense = [nn.Linear(*weights[f"classifier.{number}.weight"].shape[::-1]) for number in (0, 3, 6)]
            self.classifier = nn.Sequential(
                dense[0], nn.ReLU(), nn.Dropout(), dense[1], nn.ReLU(), nn.Dropout(), dense[2]
            )
        self.load_state_dict(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, size, size] -> [batch, channels, size / 32, size / 32], or logits."""
        x = self.features(x)
        return x if self.classifier is None else self.classifier(x.flatten(1))
