"""Finished runs, found in folders and read as far as they are compared."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtl import config, storage
from jaxtl.data import decode, sources
from jaxtl.errors import UserError
from jaxtl.evaluation import pages, predictions, terminal
from jaxtl.evaluation.predictions import Predictions
from jaxtl.training import run as run_folder

_SIDE = 128  # pixels of a thumbnail: twice what it is shown in, for screens with fine pixels


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as far as it is compared.

    Attributes:
        name: the end of its path, as much as tells it from the others.
        result: what its result.json holds.
        history: the lines of its metrics.jsonl.
        predictions: to the examples that it is judged by; None where it keeps none.
        texts: of these examples by id; empty for images.
    """

    name: str
    folder: Path
    experiment: config.Experiment
    result: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    predictions: Predictions | None
    texts: Mapping[str, str]

    @property
    def split(self) -> str:
        """The split that it is judged by."""
        return terminal.judged_split(self.result)[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that it tells apart."""
        return tuple(self.result["classes"])

    @property
    def seed(self) -> int:
        """Of all that is random in it."""
        return self.experiment.train.seed


def find(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Returns the run folders among these and in those that hold runs, and what was left out of them, one line each.

    Left out are runs that an `--overwrite` has moved aside, runs that have not finished, and what is no run.
    """
    found, left_out = [], []
    for folder in folders:
        inner = sorted(path.parent for path in folder.glob(f"*/{run_folder.EXPERIMENT}")) if folder.is_dir() else []
        for path in [folder] if (folder / run_folder.EXPERIMENT).is_file() or not inner else inner:
            if not path.exists():
                left_out.append(f"{path}: there is no such folder")
            elif not (path / run_folder.EXPERIMENT).is_file():
                left_out.append(f"{path}: no run")
            elif storage.moved_aside(path):
                left_out.append(f"{path}: moved aside by --overwrite; rename it to have it compared")
            elif not (path / run_folder.RESULT).is_file():
                left_out.append(f"{path}: not finished")
            elif path.resolve() not in (other.resolve() for other in found):
                found.append(path)
    return found, left_out


def read(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Returns the finished runs of these folders, and what was left out, one line each.

    Raises:
        UserError: no run is left.
    """
    found, left_out = find(folders)
    runs = []
    for folder, name in zip(found, _names(found), strict=True):
        try:
            runs.append(_read(folder, name))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError(f"there is no finished run to compare: {'; '.join(left_out) or 'no folder is given'}")
    return runs, left_out


def _read(folder: Path, name: str) -> Run:
    experiment, result = run_folder.read_experiment(folder), run_folder.read_result(folder)
    history, found, texts = run_folder.read_metrics(folder), None, {}
    classes, figures = result["classes"], terminal.judged_split(result)[1]
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes) and isinstance(figures, dict)):
        raise UserError(f"{folder / run_folder.RESULT} is damaged: it holds no classes, or no figures")
    if (folder / predictions.ARRAYS).exists():
        found = predictions.read(folder / predictions.ARRAYS, len(classes))
        if not found.ids:
            raise UserError(f"{folder / predictions.ARRAYS} is damaged: it holds no answers")
        texts = _texts(folder / run_folder.REPORT / predictions.TABLE)
    return Run(name, folder, experiment, result, history, found, texts)


def _texts(table: Path) -> dict[str, str]:
    """Returns text by id; nothing where there is no table, or one without texts."""
    csv.field_size_limit(2**31 - 1)  # as texts are read: the default is less than a long article
    try:
        with table.open(encoding="utf-8", newline="") as file:
            return {row["id"]: row["text"] for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}


def pictures(run: Run, ids: Sequence[str]) -> dict[str, str]:
    """Returns images of the examples that a run was judged by, small, as `data:` addresses by id.

    Raises:
        UserError: the data are not there any more, or are others, or cannot be read.
    """
    listing = sources.listings(dataclasses.replace(run.experiment.data, download=False))[-1]
    rows = {id: row for row, id in enumerate(listing.ids)}
    if missing := [id for id in ids if id not in rows]:
        raise UserError(f"there is no {missing[0]} any more")
    try:
        images = decode.thumbnails(listing.take(np.array([rows[id] for id in ids])), _SIDE)
    except Exception as error:  # whatever a damaged image makes Pillow raise
        raise UserError(f"an image cannot be read: {error}") from None
    return {id: pages.thumbnail(image) for id, image in zip(ids, images, strict=True)}


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns as much of the end of each path as tells them apart."""
    paths = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return []
