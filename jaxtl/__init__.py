"""jaxtl: transfer learning in JAX, with freezing that the trainer can see and exploit.

Experiments are run by `python -m jaxtl.main`. What they trained is used by `python -m jaxtl.predict`, or here:

    import jaxtl

    model = jaxtl.load("runs/reviews")
    model.predict(["Arrived broken, but the service was kind."])
"""

import os
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxtl.evaluation.predict import Predictor

__version__ = metadata.version("jaxtl")


def load(
    runs: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    ensemble: Literal["mean", "vote"] = "mean",
    batch_size: int | None = None,
) -> "Predictor":
    """Returns a finished run, ready to predict; or several that answer together.

        model = jaxtl.load("runs/reviews")
        model.predict(["a text", "another"])         # [Prediction(label=.., probability=.., probabilities=..), ..]
        model.predict_proba(["a text", "another"])   # [inputs, classes] float64, columns as in model.class_names
        for answer in model.stream(a_generator): ..  # any number of inputs, in the same memory

        model = jaxtl.load(["runs/vit", "runs/dinov2"])  # an ensemble
        model.predict(["cat.jpg", Image.open("dog.png"), pixels])

    A run on texts takes strings; one on images takes paths, Pillow images and arrays `[height, width, 3]` uint8, and
    prepares them as it did in training. An input that cannot be read becomes an answer with an `error`.

    Args:
        runs: the run folder (`gs://BUCKET/RUN` is fetched), or several, of any architectures, that tell apart the same
            classes of the same kind of input.
        ensemble: how several runs answer together: by the `mean` of their probabilities, or by `vote`: the class that
            most of them choose, where these are equally many the one with the greatest mean probability.
        batch_size: inputs that the device takes at once; None: as in the run's evaluation (`train.eval_batch_size`).

    Raises:
        UserError (`jaxtl.errors`): there is no finished run that tells classes apart, or they do not go together.
    """
    from jaxtl import remote
    from jaxtl.evaluation import predict  # and with it JAX, which takes seconds

    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    copies = [remote.local(folder, without=["checkpoints"]) for folder in folders]
    return predict.Predictor(copies, ensemble, batch_size)
