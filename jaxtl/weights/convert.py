"""The one converter: checkpoints of others <-> our parameters, by the table of the family."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from jaxtl.errors import UserError
from jaxtl.weights.tables import Table


class Source(Protocol):
    """What is read of a checkpoint; `jaxtl.weights.files` makes one, a plain dict of arrays nearly is one."""

    def keys(self) -> Any: ...  # noqa: D102
    def __getitem__(self, name: str) -> np.ndarray: ...


def read(table: Table, source: Source, targets: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """Returns the parameters that a checkpoint holds, in our layout, float32.

    Args:
        table: rows for every target.
        source: the checkpoint, arrays by name.
        targets: abstract parameters by path; every one is filled, but those of a stage that the table calls optional
            and of which the checkpoint has nothing.
        where: names the checkpoint in errors.

    Raises:
        UserError: one message with every mismatch: parameters not found, of another shape, and arrays of the
            checkpoint that are neither used nor known to be superfluous.
    """
    by_name = {_strip(name, table.prefixes): name for name in source.keys()}  # noqa: SIM118
    filled, missing, shapes, used = {}, [], [], set()
    present = {row.stage for row in table.rows if any(name in by_name for name, _ in row.sources)}
    for row in table.rows:
        if row.stage in table.optional and row.stage not in present:
            continue
        found = next(((name, transform) for name, transform in row.sources if name in by_name), None)
        if found is None:
            missing.append(f"{row.path} (their {' or '.join(name for name, _ in row.sources)})")
            continue
        name, transform = found
        used.add(name)
        array, expected = source[by_name[name]], targets[row.path].shape
        with contextlib.suppress(ValueError):  # another number of dimensions: reported as it is
            array = transform.read(array)
        if array.shape != expected:
            shapes.append(f"{row.path}: {_shape(expected)} here, {_shape(array.shape)} there")
        else:
            # A copy: what was read may be a view of a file that is about to be closed.
            filled[row.path] = np.array(array, np.float32, order="C")
    ignored = re.compile("|".join(table.ignored) or r"(?!)")
    unused = [name for name in by_name if name not in used and not ignored.fullmatch(name)]
    complaints = [
        f"{what}: {', '.join(_grouped(names))}"
        for what, names in (("missing", missing), ("other shapes", shapes), ("not understood", unused))
        if names
    ]
    if complaints:
        raise UserError(f"{where} is not a checkpoint of this model; " + "; ".join(complaints))
    return filled


def write(table: Table, params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Returns our parameters under the names and in the layout of the table's first source; inverse of `read`.

    Args:
        table: the rows to write.
        params: parameters by path; those that no row names (a head of ours) are left out.
        prefix: put before the backbone's names, as in `vit.`; stages that the table calls unprefixed have none.
    """
    written = {}
    for row in table.rows:
        name, transform = row.sources[0]
        written[name if row.stage in table.unprefixed else prefix + name] = np.ascontiguousarray(
            transform.write(np.asarray(params[row.path]))
        )
    return written


def _grouped(lines: list[str]) -> list[str]:
    """Returns the lines with those that differ in the number of a layer alone made one: all are told, once."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"(block_|layer[_.])\d+", r"\1*", line), []).append(line)
    return [
        same[0] if len(same) == 1 else f"{key} in {len(same)} {'layers' if 'layer_*' in key else 'blocks'}"
        for key, same in groups.items()
    ]


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
