"""Last-block fine-tuning of DINOv2 in torch + transformers, as a careful user of those libraries would write it.

The frozen part runs under no_grad, pixels stay uint8 until the batch is on its way into the model, the last partial
batch of an epoch is kept, and evaluation runs in inference mode. Data and recipe are those of a jaxtl experiment.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Dinov2Model

from jaxtl.config import Experiment
from jaxtl.data.listing import Examples
from jaxtl.training.freeze import train_from

_MEAN, _DEVIATION = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Classifier(torch.nn.Module):
    """Class token after the final norm, dense, ReLU, dropout, dense; learns from `first_trained` (from 0) on."""

    def __init__(self, weights: str, classes: int, experiment: Experiment, first_trained: int):
        super().__init__()
        head = experiment.model.head
        self.backbone = Dinov2Model.from_pretrained(weights)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(self.backbone.config.hidden_size, head.hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(head.dropout),
            torch.nn.Linear(head.hidden, classes),
        )
        self.first_trained = first_trained
        self.backbone.requires_grad_(False)
        for module in (*self.backbone.encoder.layer[first_trained:], self.backbone.layernorm):
            module.requires_grad_(True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits [batch, classes] of normalised pixels [batch, 3, size, size]."""
        layers = self.backbone.encoder.layer
        with torch.no_grad():
            hidden = self.backbone.embeddings(pixels)
            for layer in layers[: self.first_trained]:
                hidden = layer(hidden)
        for layer in layers[self.first_trained :]:
            hidden = layer(hidden)
        return self.head(self.backbone.layernorm(hidden)[:, 0])


def train(experiment: Experiment, train_set: Examples, eval_set: Examples, precision: str) -> dict[str, Any]:
    """Trains and evaluates; returns accuracy, loss and times like a jaxtl run's result.

    Raises:
        ValueError: the experiment asks for what this peer does not have.
    """
    settings = experiment.train
    head, optim = experiment.model.head, experiment.optim
    has = (head.kind, head.reads, experiment.data.scale, experiment.data.augment, experiment.freeze)
    if has != ("mlp", "cls", "imagenet", "none", train_from("block_12")):
        raise ValueError("this peer trains block 12 and an mlp on the class token, without augmentation")
    if (optim.name, optim.schedule, optim.warmup, optim.clip_norm, settings.max_steps) != (
        "adam",
        "constant",
        0,
        0,
        None,
    ):
        raise ValueError("this peer trains whole epochs with Adam at a constant rate")
    torch.manual_seed(settings.seed)
    model = Classifier(experiment.model.weights, len(train_set.class_names), experiment, first_trained=11)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=experiment.optim.learning_rate)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    order = np.random.default_rng(settings.seed)
    seconds = []
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        model.train()
        rows = order.permutation(len(train_set.labels))
        losses = []
        for start in range(0, len(rows), settings.batch_size):
            batch = rows[start : start + settings.batch_size]
            with autocast:
                logits = model(_pixels(train_set.inputs[batch], experiment.model.image_size))
                loss = F.cross_entropy(logits.float(), torch.from_numpy(train_set.labels[batch]).long())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        print(f"torch epoch {epoch + 1}: train loss {np.mean(losses):.4f}, {seconds[-1]:.1f} s", flush=True)
    accuracy, loss = _evaluate(model, eval_set, experiment, autocast)
    return {
        "accuracy": accuracy,
        "loss": loss,
        "train_loss": float(np.mean(losses)),
        "trainable_parameters": sum(parameter.numel() for parameter in learning),
        "seconds_train": sum(seconds),
        "seconds_per_epoch": sum(seconds) / len(seconds),
    }


def _evaluate(model: Classifier, eval_set: Examples, experiment: Experiment, autocast: Any) -> tuple[float, float]:
    model.eval()
    size, batch_size = experiment.model.image_size, experiment.train.eval_batch_size
    with torch.inference_mode(), autocast:
        logits = torch.cat(
            [
                model(_pixels(eval_set.inputs[start : start + batch_size], size)).float()
                for start in range(0, len(eval_set.labels), batch_size)
            ]
        )
    labels = torch.from_numpy(eval_set.labels).long()
    return (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def _pixels(images: np.ndarray, size: int) -> torch.Tensor:
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float()
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return (pixels / 255 - _MEAN) / _DEVIATION
