"""Opens a checkpoint on disk, a folder in Hugging Face layout or a single file, as a mapping name -> array."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes  # also teaches numpy the name bfloat16, which safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxtl.errors import UserError
from jaxtl.weights.torch_file import read_torch

# What a folder is searched for, in this order; of the patterns after them, one match and no more.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PATTERNS = ("*.safetensors", "*.pth")
_TORCH_SUFFIXES = (".bin", ".pth", ".pt")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)

# jaxtl keeps parameters in float32, whatever they were stored in. Integers and booleans stay as they are.
_TO_FLOAT32 = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64))


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint, by the names they were saved under.

    Safetensors are read one by one, when asked for, and each time; a torch file is read whole when it is opened.
    Floating-point tensors come as float32; arrays may be read-only.

    Attributes:
        files: the file, or the shards, that hold the tensors.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a folder or a file.

        Args:
            path: a folder with `model.safetensors` or `pytorch_model.bin`, whole or in shards with their
                `.index.json`, or with exactly one other `.safetensors` or `.pth`; safetensors are preferred. Or a
                single `.safetensors`, `.bin`, `.pth` or `.pt` file.

        Raises:
            UserError: nothing there, no weights in the folder, a shard missing or outside the folder, a damaged
                file, or a torch file that would execute code.
        """
        path = Path(path).expanduser()
        self.files, indexed = _find(path)
        self._shards = {file: _open(file) for file in self.files}
        self._owner = {name: file for file, shard in self._shards.items() for name in shard.keys()}  # noqa: SIM118
        if missing := sorted(indexed - self._owner.keys()):
            raise UserError(
                f"{path}: the index names {len(missing)} tensors that are in no shard, {missing[0]!r} for one; "
                "the files are not of one checkpoint, download them again"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._owner[name]
        shard = self._shards[file]
        if isinstance(shard, dict):
            array = shard[name]
        else:
            try:
                array = shard.get_tensor(name)
            except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: float8 and such
                raise UserError(f"{file}: {name} cannot be read: {_one_line(error)}") from error
        return array.astype(np.float32) if array.dtype in _TO_FLOAT32 else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor to find out
        return name in self._owner

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor; of safetensors, without reading it. Raises KeyError for an unknown name."""
        shard = self._shards[self._owner[name]]
        return shard[name].shape if isinstance(shard, dict) else tuple(shard.get_slice(name).get_shape())

    def digest(self) -> str:
        """Returns a SHA-256 in hex over the files, their names and all their bytes. Reads every file once.

        The same whether the checkpoint was opened by its folder or its file, and wherever it lies.
        """
        total = hashlib.sha256()
        for file in sorted(self.files, key=lambda file: file.name):
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
            total.update(f"{file.name}\0{content}\n".encode())
        return total.hexdigest()


def _find(path: Path) -> tuple[tuple[Path, ...], set[str]]:
    """Returns the files of the checkpoint at `path`, and the tensor names its index promises (empty: no index)."""
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise UserError(f"{path} is not a checkpoint file: expected a folder, or one of {', '.join(_SUFFIXES)}")
        return (path,), set()
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: there is no such file or folder")
    for name in _NAMES:
        if (path / name).is_file():
            return _indexed(path / name) if name.endswith(".index.json") else ((path / name,), set())
    for pattern in _PATTERNS:
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if len(found) == 1:
            return (found[0],), set()
        if found:
            names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
            raise UserError(
                f"{path} holds {len(found)} {pattern} files ({names}) and no index (.index.json): "
                "give the path of the one you mean, or the index of these shards"
            )
    looked_for = ", ".join(_NAMES + tuple(f"a single {pattern}" for pattern in _PATTERNS))
    raise UserError(f"{path} holds no weights: looked for {looked_for}")


def _indexed(index: Path) -> tuple[tuple[Path, ...], set[str]]:
    try:
        owner = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(owner.values()))
        if not shards:
            raise ValueError("its weight_map is empty")
        outside = [name for name in shards if Path(name).name != name or name in ("", "..")]
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of shards, or is damaged: {_one_line(error)}") from error
    if outside:
        raise UserError(f"{index} names the shard {outside[0]!r}: refused, shards must lie beside their index")
    files = tuple(index.parent / name for name in shards)
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{index} names {len(files)} shards, of which {len(missing)} are missing ({missing[0]} for one): "
            "download them into the same folder"
        )
    return files, set(owner)


def _open(file: Path) -> safe_open | dict[str, np.ndarray]:
    try:
        with file.open("rb") as stream:
            head = stream.read(32)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is a Git LFS pointer, not the weights themselves: run `git lfs pull` there")
        if file.suffix in _TORCH_SUFFIXES:
            return read_torch(file)
        return safe_open(file, framework="numpy")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{file} is not a safetensors file, or is damaged: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
