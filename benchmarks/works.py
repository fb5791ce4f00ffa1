"""The works that are compared: which experiment each is, with which settings, and where its inputs come from."""

import dataclasses
from collections.abc import Mapping

from jaxtl import experiments
from jaxtl.config import Experiment, override


@dataclasses.dataclass(frozen=True)
class Work:
    """A work.

    Attributes:
        experiment: name of the experiment.
        title: what it is, for the table.
        weights: which of the `--weights-..` flags it takes.
        data: which of the flags `--tfds` and `--covid` it takes.
        small: settings of the quick comparison: the real model and all epochs, few examples. The batch divides their
            number, as jaxtl fills up a short batch and the peers do not.
        settings: settings of every comparison.
    """

    experiment: str
    title: str
    weights: str
    data: str
    small: tuple[str, ...]
    settings: tuple[str, ...] = ()


_FEW_IMAGES = ("data.train_size=32", "data.eval_size=16", "train.batch_size=16", "train.eval_batch_size=16")
# One of each class: VGG19 takes longest.
_FEWER_IMAGES = (
    "data.train_size=10",
    "data.eval_size=10",
    "train.batch_size=10",
    "train.eval_batch_size=10",
    "train.eval_every=5",
)
_FEW_TEXTS = ("data.train_size=64", "data.eval_size=32", "train.eval_batch_size=32")
# Without the test file: it would be one evaluation of one side only.
_TEXT_FILES = ("data.train=Constraint_Train.csv", "data.validation=Constraint_Val.csv")

WORKS: dict[str, Work] = {
    "last_block": Work(
        "dinov2_cifar10",
        "DINOv2-small at 224, block 12 and after learn, CIFAR-10",
        weights="dinov2",
        data="tfds",
        small=_FEW_IMAGES,
    ),
    "vgg19": Work(
        "vgg19_cifar10",
        "VGG19 at 224, block5_conv1 and after learn, CIFAR-10",
        weights="vgg19",
        data="tfds",
        small=_FEWER_IMAGES,
    ),
    "text_feature_fc": Work(
        "bert_covid_feature",
        "frozen BERT, dense layer on [CLS], COVID-19 tweets",
        weights="bert",
        data="covid",
        small=_FEW_TEXTS,
        settings=(*_TEXT_FILES, "train.epochs=10"),
    ),
    "text_feature_bigru": Work(
        "bert_bigru_covid_feature",
        "frozen BERT, bidirectional GRU, COVID-19 tweets",
        weights="bert",
        data="covid",
        small=_FEW_TEXTS,
        settings=(*_TEXT_FILES, "train.epochs=10"),
    ),
    "text_finetune": Work(
        "bert_covid_finetune",
        "BERT and a dense layer on [CLS], everything learns, COVID-19 tweets",
        weights="bert",
        data="covid",
        small=_FEW_TEXTS,
        settings=_TEXT_FILES,
    ),
}


def experiment(
    work: Work, *, full: bool, weights: Mapping[str, str], data: Mapping[str, str], assignments: list[str]
) -> Experiment:
    """Returns the experiment of a work.

    Args:
        work: one of `WORKS`.
        full: all examples of the experiment instead of a few.
        weights, data: values of the flags, by the names in `Work`; empty: what the experiment says.
        assignments: `FIELD=VALUE`, applied last.

    Raises:
        UserError: an assignment that does not fit.
    """
    settings = [*work.settings, *(() if full else work.small)]
    if weights.get(work.weights):
        settings.append(f"model.weights={weights[work.weights]}")
    if data.get(work.data):
        settings.append(f"data.dir={data[work.data]}")
    return override(experiments.load(work.experiment), [*settings, *assignments])
