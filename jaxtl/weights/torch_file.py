"""Reads torch checkpoint files (.bin, .pth, .pt) into numpy, without torch and without running what they contain.

A torch checkpoint is a pickle whose tensors point into storages, and the storages as raw bytes. A pickle can call
any function in Python, so ours knows only the few names in `_GLOBALS`; the tensors come out as plain descriptions
(`_Tensor`), and each is checked against its storage before a byte is looked at.

Two formats: since torch 1.6 a zip archive (`NAME/data.pkl`, `NAME/data/KEY`); before that, and with
`_use_new_zipfile_serialization=False`, several pickles and then the storages (torchvision's vgg19-dcbb9e9d.pth).
"""

import collections
import io
import os
import pickle
import struct
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxtl.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Checkpoints of training programs hold the weights under one of these, beside the optimiser and the epoch.
_WRAPPERS = ("model", "state_dict", "model_state_dict")

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    offset: int  # in elements; not 0 only for the storage views of torch < 0.4
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @classmethod
    def rebuild(cls, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> "_Tensor":
        return cls(storage, offset, shape, strides)

    @classmethod
    def of_parameter(cls, data: Any, *_: Any) -> Any:
        return data

    def __setstate__(self, state: Any) -> None:
        """torch < 0.4 gives a Parameter its `requires_grad` and hooks this way; weights have no use for them."""


# Builtin types and bound methods only: a pickle may set attributes on what it is given, and could so change a plain
# function or a class of ours for the files read after it.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Tensor.rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor.rebuild,
    ("torch._utils", "_rebuild_parameter"): _Tensor.of_parameter,
    ("torch.nn.parameter", "Parameter"): _Tensor.of_parameter,  # torch < 0.4 pickles the class itself
    ("torch", "Size"): tuple,
    ("argparse", "Namespace"): types.SimpleNamespace,  # the flags that training programs save beside the weights
    **{("torch", name): name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Unpickles the names in `_GLOBALS` and nothing else."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="utf-8")  # torch 0.x under Python 2 wrote byte strings
        self.path = path
        self.dtypes: dict[str, np.dtype] = {}  # of the storages met, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            wanted = repr(f"{module}.{name}")
            raise UserError(
                f"{self.path}: refused: it asks for {wanted}, and loading that would execute code from the file; "
                "save the weights alone, torch.save(model.state_dict(), ...), or as safetensors"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _location, count, *view = pid
        if kind != "storage" or not isinstance(key, str):
            raise ValueError(f"unknown reference {kind!r}")
        dtype, offset = _DTYPES[storage], 0
        self.dtypes.setdefault(key, dtype)
        if view and view[0] is not None:  # legacy only: (key of the view, offset, count)
            _, offset, count = view[0]
        return _Storage(dtype, key, offset, count)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a torch checkpoint.

    A checkpoint wrapped as `{"model": {...}}` or `{"state_dict": {...}}` is unwrapped; what is not a tensor is left.

    Returns:
        Name -> read-only array of the shape and dtype saved (bfloat16 as `ml_dtypes.bfloat16`). Tensors that shared
        a storage (tied weights, views) still share memory.

    Raises:
        UserError: unreadable, truncated, no torch checkpoint, without tensors, or one that would execute code.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            tree, read, big_endian = _open_zip(file, path) if is_zip else _open_legacy(file, path)
            storages: dict[str, bytes] = {}
            arrays = {}
            for name, tensor in _tensors(tree).items():
                key = tensor.storage.key
                if key not in storages:
                    storages[key] = read(key)
                arrays[name] = _array(tensor, storages[key], big_endian)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle or archive can raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is not a torch checkpoint, or is damaged: {reason}") from error
    if not arrays:
        raise UserError(f"{path} holds no tensors, neither at the top nor under {', '.join(_WRAPPERS)}")
    return arrays


def _open_zip(file: BinaryIO, path: Path) -> tuple[Any, Callable[[str], bytes], bool]:
    """Returns the unpickled object, what reads a storage by key, and whether the bytes are big-endian."""
    archive = zipfile.ZipFile(file)
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        raise ValueError("compressed records")  # torch writes none, and one could unfold to any size
    records = archive.namelist()
    root = next(name for name in records if name.endswith("/data.pkl")).removesuffix("data.pkl")
    big_endian = f"{root}byteorder" in records and archive.read(f"{root}byteorder") == b"big"
    tree = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), path).load()
    return tree, lambda key: archive.read(f"{root}data/{key}"), big_endian


def _open_legacy(file: BinaryIO, path: Path) -> tuple[Any, Callable[[str], bytes], bool]:
    """As `_open_zip`. After the pickles come, per storage, an int64 count and the bytes, always little-endian."""
    for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        if _Unpickler(file, path).load() != expected:
            raise ValueError("neither a zip archive nor the format before torch 1.6")
    _Unpickler(file, path).load()  # sizes of the C types where it was written
    unpickler = _Unpickler(file, path)
    tree = unpickler.load()
    places = {}
    for key in _Unpickler(file, path).load():
        (count,) = struct.unpack("<q", file.read(8))
        start, length = file.tell(), count * unpickler.dtypes[key].itemsize
        if count < 0 or start + length > os.fstat(file.fileno()).st_size:
            raise ValueError("it ends before its tensors do")
        places[key] = (start, length)
        file.seek(start + length)

    def read(key: str) -> bytes:
        start, length = places[key]
        file.seek(start)
        return file.read(length)

    return tree, read, False


def _tensors(tree: Any) -> dict[str, _Tensor]:
    if not isinstance(tree, dict):
        return {}
    inner = next((tree[name] for name in _WRAPPERS if isinstance(tree.get(name), dict)), tree)
    return {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _array(tensor: _Tensor, data: bytes, big_endian: bool) -> np.ndarray:
    """Returns the tensor as a view of its storage's bytes; raises ValueError where it would reach outside them."""
    storage, offset, shape, strides = tensor
    if not all(isinstance(n, int) and n >= 0 for n in (storage.offset, storage.count, offset, *shape, *strides)):
        raise ValueError("a tensor with a negative size, stride or offset")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} sizes and {len(strides)} strides")
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    itemsize = storage.dtype.itemsize
    if last >= storage.count or (storage.offset + storage.count) * itemsize > len(data):
        raise ValueError("a tensor reaches outside its storage")
    values = np.frombuffer(data, storage.dtype, storage.count, storage.offset * itemsize)
    if big_endian:
        values = values.view(f"u{itemsize}").byteswap().view(storage.dtype)
    byte_strides = [stride * itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, byte_strides, writeable=False)
