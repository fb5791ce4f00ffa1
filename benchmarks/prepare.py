"""What the peers read: an experiment with its inputs at hand, and its examples as arrays.

    python -m benchmarks.prepare FOLDER

Weights and data that `FOLDER/experiment.json` names are fetched where need be, and the file is written again with
their places. The examples, decoded or tokenised, go to `FOLDER/examples.npz`. A process of its own: the peak memory of
a process counts that of the one which started it.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from jaxtl import config, storage

EXPERIMENT, EXAMPLES = "experiment.json", "examples.npz"


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of one split.

    Attributes:
        inputs: images `[n, height, width, 3]` uint8, or the token ids of all texts, end to end, int32.
        labels: `[n]` int32.
        offsets: `[n + 1]`, of texts: text i is `inputs[offsets[i] : offsets[i + 1]]`.
    """

    inputs: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """`[n]`, of texts."""
        return np.diff(self.offsets)


def read(path: Path) -> tuple[Split, Split, int]:
    """Returns training and held-out examples and the number of classes."""
    with np.load(path) as arrays:
        splits = [
            Split(arrays[f"{name}_inputs"], arrays[f"{name}_labels"], arrays.get(f"{name}_offsets"))
            for name in ("train", "held_out")
        ]
        return *splits, int(arrays["classes"])


def prepare(folder: Path) -> None:
    """Does what the module's docstring says.

    Raises:
        UserError: data or weights are not to be had.
    """
    from jaxtl.data import published, sources, tokens
    from jaxtl.training.network import locate, tokenizer_folder

    experiment = config.from_json((folder / EXPERIMENT).read_text(encoding="utf-8"), EXPERIMENT)
    data = experiment.data
    if isinstance(data, config.Text) and data.name and not data.dir:  # jaxtl's cache is empty in every run
        data = dataclasses.replace(data, dir=str(published.fetch(data.name, data.download)))
    drawn = sources.listings(data)
    weights = locate(experiment.model.weights)
    if isinstance(data, config.Text):
        tokenizer = tokens.load_tokenizer(tokenizer_folder(data, weights))
        splits = sources.tokenised(drawn, tokenizer, data.max_length)
    else:
        splits = sources.read(drawn, data.resize, experiment.model.image_size)
    arrays = {"classes": np.asarray(len(splits[0].class_names))}
    for name, split in zip(("train", "held_out"), splits, strict=False):
        arrays[f"{name}_labels"] = split.labels
        if isinstance(data, config.Text):
            arrays[f"{name}_inputs"], arrays[f"{name}_offsets"] = split.inputs.values, split.inputs.offsets
        else:
            arrays[f"{name}_inputs"] = split.inputs
    np.savez(folder / EXAMPLES, **arrays)
    model = dataclasses.replace(experiment.model, weights=str(weights or config.RANDOM))
    storage.write(folder / EXPERIMENT, config.to_json(dataclasses.replace(experiment, model=model, data=data)))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
