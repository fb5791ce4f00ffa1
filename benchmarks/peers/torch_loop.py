"""Training and evaluation in torch, as a careful user would write it: what the models of all works share.

What is frozen is in evaluation mode and, by the models, under `no_grad`. Autocast in bfloat16, the fused optimiser,
batches of the length of their longest text, the loss left on the device until the end of the epoch, and inference mode
for evaluation.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from benchmarks.peers import batches, recipe
from benchmarks.peers.score import Best, score
from benchmarks.prepare import Split
from jaxtl.config import Experiment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_MATRICES = (nn.Linear, nn.Conv2d, nn.GRU)  # their weights decay; biases, norms, tokens and embeddings do not


class Classifier(nn.Module):
    """A frozen or learning backbone with a head on it.

    Subclasses set `backbone`, `head` and `width`, call `freeze`, and take in `forward` what `inputs` returns.
    """

    width: int | None  # of the backbone; None where it has no single one

    def freeze(self, frozen: list[nn.Module]) -> None:
        """Freezes these modules: no gradients, and evaluation mode for good."""
        self._frozen = frozen
        for module in frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        """Sets the mode of what learns."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def inputs(self, split: Split, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Returns the arguments of `forward` for these rows."""
        raise NotImplementedError


class Images(Classifier):
    """A classifier of images, which travel to the device as bytes and grow there."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        self.image_size = experiment.model.image_size
        imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        mean, deviation = imagenet if experiment.data.scale == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))

    def inputs(self, split: Split, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Returns images [batch, height, width, 3] uint8."""
        return (torch.from_numpy(split.inputs[rows]),)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Returns images as the model takes them: [batch, 3, size, size] float32, channels last in memory."""
        pixels = images.permute(0, 3, 1, 2).float()
        size = (self.image_size, self.image_size)
        shrinks = max(images.shape[1:3]) > self.image_size
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
        return (pixels / 255 - self.mean) / self.deviation


def configure(experiment: Experiment) -> None:
    """Seeds, and has float32 mean float32 on GPUs too; to be called before the model is built."""
    torch.manual_seed(experiment.train.seed)
    torch.backends.cudnn.allow_tf32 = False


def train(model: Classifier, experiment: Experiment, train_set: Split, eval_set: Split) -> dict[str, Any]:
    """Trains and evaluates as the experiment says.

    Returns:
        `accuracy` and `loss` of the kept evaluation, those of every one in `evaluations`, `train_loss` of the last
        epoch, `trainable_parameters`, and `seconds_train`, `seconds_evaluate`, `seconds_compile` (none).
    """
    settings = experiment.train
    model.to(DEVICE)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = settings.epochs * recipe.steps_per_epoch(len(train_set.labels), settings.batch_size)
    optimizer = _optimizer(model, experiment)
    schedule = transformers.get_scheduler(
        {"constant": "constant_with_warmup"}.get(experiment.optim.schedule, experiment.optim.schedule),
        optimizer,
        num_warmup_steps=recipe.warmup_steps(experiment, steps),
        num_training_steps=steps,
    )
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    random = np.random.default_rng(settings.seed)
    seconds, best, evaluations = {"train": 0.0, "evaluate": 0.0}, Best(settings.select), []
    for epoch in range(1, settings.epochs + 1):
        began = time.perf_counter()
        model.train()
        total = torch.zeros((), device=DEVICE)
        for rows in batches.training_rows(train_set, settings.batch_size, random):
            with autocast:
                logits = model(*model.inputs(train_set, rows))
            loss = _loss(logits.float(), torch.from_numpy(train_set.labels[rows]).to(DEVICE))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if experiment.optim.clip_norm:
                nn.utils.clip_grad_norm_(learning, experiment.optim.clip_norm)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        train_loss = total.item() / len(train_set.labels)  # waits for the device
        seconds["train"] += time.perf_counter() - began
        print(f"epoch {epoch}: train loss {train_loss:.4f}", flush=True)
        if recipe.evaluates(experiment, epoch):
            began = time.perf_counter()
            found = score(predict(model, eval_set, settings.eval_batch_size, autocast), eval_set.labels)
            seconds["evaluate"] += time.perf_counter() - began
            best.offer(found)
            evaluations.append((found.accuracy, found.loss))
            print(f"epoch {epoch}: held out {found}", flush=True)
    return {
        "accuracy": best.score.accuracy,
        "loss": best.score.loss,
        "evaluations": evaluations,
        "train_loss": train_loss,
        "trainable_parameters": sum(parameter.numel() for parameter in learning),
        "seconds_train": seconds["train"],
        "seconds_evaluate": seconds["evaluate"],
        "seconds_compile": 0.0,
    }


def predict(model: Classifier, split: Split, batch_size: int, autocast: torch.autocast) -> np.ndarray:
    """Returns logits float32 [examples, nodes], in the order of the examples."""
    model.eval()
    order = batches.evaluation_rows(split, batch_size)
    with torch.inference_mode(), autocast:
        logits = torch.cat([model(*model.inputs(split, rows)).float() for rows in order]).cpu().numpy()
    back = np.empty_like(logits)
    back[np.concatenate(order)] = logits
    return back


def environment() -> dict[str, Any]:
    """Returns device and versions and, of an accelerator, its peak memory."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if DEVICE.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _optimizer(model: Classifier, experiment: Experiment) -> torch.optim.Optimizer:
    groups = recipe.learning(experiment.freeze)
    rates = recipe.rates(experiment, model.width)
    matrices = {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if isinstance(module, _MATRICES)
        for own, _ in module.named_parameters(recurse=False)
        if own.startswith("weight")
    }
    sorted_out: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups.head if name.startswith("head.") else groups.backbone
            sorted_out.setdefault((group, name in matrices), []).append(parameter)
    decay = experiment.optim.weight_decay if experiment.optim.name == "adamw" else 0.0
    settings = [
        {"params": parameters, "lr": rates[group], "weight_decay": decay if decays else 0.0}
        for (group, decays), parameters in sorted_out.items()
    ]
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[experiment.optim.name](settings, fused=True)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    return F.cross_entropy(logits, labels.long())
