import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxtl.errors import UserError
from jaxtl.weights import torch_file
from jaxtl.weights.torch_file import read_torch

torch = pytest.importorskip("torch")

REPO = Path(__file__).resolve().parents[2]
ZIP_OR_LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(obj, path, zipped=True):
    torch.save(obj, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_equal(array, tensor):
    """Bit for bit, NaNs included: through bytes, since numpy cannot hold torch's bfloat16."""
    assert array.shape == tuple(tensor.shape)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    assert np.ascontiguousarray(array).tobytes() == raw.tobytes()


@ZIP_OR_LEGACY
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", np.float32),
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float64", np.float64),
        ("int64", np.int64),
        ("int32", np.int32),
        ("int16", np.int16),
        ("int8", np.int8),
        ("uint8", np.uint8),
        ("bool", np.bool_),
    ],
)
def test_every_dtype_is_read_bit_for_bit(tmp_path, zipped, dtype, expected):
    tensor = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 50).to(getattr(torch, dtype))
    array = read_torch(save({"w": tensor}, tmp_path / "x.bin", zipped))["w"]
    assert array.dtype == expected
    assert_equal(array, tensor)


@ZIP_OR_LEGACY
def test_views_transposes_and_odd_shapes_are_read_with_their_strides(tmp_path, zipped):
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    tensors = {
        "whole": base,
        "slice": base[1:3, :, 2],  # an offset and two strides
        "transposed": base.permute(2, 0, 1),
        "step": base.reshape(-1)[7::3],
        "expanded": torch.tensor([1.5]).expand(3, 4),  # stride 0
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    arrays = read_torch(save(tensors, tmp_path / "x.pth", zipped))
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert_equal(arrays[name], tensor)


@ZIP_OR_LEGACY
def test_tied_weights_are_read_once_and_stay_equal(tmp_path, zipped):
    table = torch.randn(6, 4)
    path = save({"embeddings": table, "decoder": table, "row": table[2]}, tmp_path / "x.bin", zipped)
    arrays = read_torch(path)
    assert np.shares_memory(arrays["embeddings"], arrays["decoder"])
    assert_equal(arrays["row"], table[2])


@ZIP_OR_LEGACY
def test_a_module_state_dict_with_parameters_and_buffers_is_read(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()  # an OrderedDict with a _metadata attribute
    arrays = read_torch(save(state, tmp_path / "x.pth", zipped))
    parameters = read_torch(save(dict(module.named_parameters()), tmp_path / "p.pth", zipped))
    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        assert_equal(arrays[name], tensor)
    for name, parameter in module.named_parameters():
        assert_equal(parameters[name], parameter)


@ZIP_OR_LEGACY
@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_a_training_checkpoint_is_unwrapped_and_its_other_contents_left(tmp_path, zipped, wrapper):
    import argparse

    tensor = torch.randn(2, 3)
    saved = {
        wrapper: collections.OrderedDict(w=tensor, version=3),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 3)}}},
        "epoch": 299,
        "args": argparse.Namespace(lr=5e-4),
    }
    arrays = read_torch(save(saved, tmp_path / "x.pth", zipped))
    assert list(arrays) == ["w"]
    assert_equal(arrays["w"], tensor)


def test_a_big_endian_archive_is_swapped(tmp_path):
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    little = save({"w": tensor}, tmp_path / "little.bin")
    with zipfile.ZipFile(little) as source, zipfile.ZipFile(tmp_path / "big.bin", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            target.writestr(name, data)
    assert_equal(read_torch(tmp_path / "big.bin")["w"], tensor)


# --- written by hand: what torch of today does not write -------------------------------------------------


class Global:
    """Pickles as the global `module.name`, called with `args` if there are any; `state` is set on the result."""

    def __init__(self, module, name, args=None, state=None):
        self.module, self.name, self.args, self.state = module, name, args, state


class Reference(tuple):
    """Pickles as a persistent id."""


class HandPickler(pickle._Pickler):
    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Reference) else None

    def save(self, obj, *args, **kwargs):
        if not isinstance(obj, Global):
            return super().save(obj, *args, **kwargs)
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        if obj.args is not None:
            super().save(obj.args)
            self.write(pickle.REDUCE)
        if obj.state is not None:
            super().save(obj.state)
            self.write(pickle.BUILD)


def hand_pickle(obj):
    stream = io.BytesIO()
    HandPickler(stream, protocol=2).dump(obj)
    return stream.getvalue()


def write_zip(path, obj, data=bytes(range(48))):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", hand_pickle(obj))
        archive.writestr("archive/data/0", data)
    return path


def write_legacy(path, obj, data=bytes(range(48)), itemsize=4):
    head = b"".join(
        pickle.dumps(item, protocol=2) for item in (torch_file._LEGACY_MAGIC, torch_file._LEGACY_PROTOCOL, {})
    )
    storage = pickle.dumps(["0"], protocol=2) + struct.pack("<q", len(data) // itemsize) + data
    path.write_bytes(head + hand_pickle(obj) + storage)
    return path


def tensor_global(offset=0, shape=(3, 4), strides=(4, 1), count=12, key="0", view=()):
    storage = Reference(("storage", Global("torch", "FloatStorage"), key, "cpu", count, *view))
    return Global("torch._utils", "_rebuild_tensor", (storage, offset, shape, strides))


def test_a_parameter_and_a_storage_view_of_torch_before_0_4_are_read(tmp_path):
    view = (("view", 4, 6),)  # elements 4 to 9 of the storage
    old = {
        "parameter": Global("torch.nn.parameter", "Parameter", (tensor_global(view=(None,)),), (True, False, {})),
        "view": tensor_global(offset=1, shape=(5,), strides=(1,), view=view),
    }
    arrays = read_torch(write_legacy(tmp_path / "x.pth", old))
    values = np.frombuffer(bytes(range(48)), "<f4")
    np.testing.assert_array_equal(arrays["parameter"], values.reshape(3, 4))
    np.testing.assert_array_equal(arrays["view"], values[5:10])


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@ZIP_OR_LEGACY
def test_a_file_that_would_execute_code_is_refused_and_nothing_is_executed(tmp_path, zipped):
    canary = tmp_path / "executed"
    path = save({"w": torch.zeros(2), "x": Malicious(f"touch {canary}")}, tmp_path / "x.bin", zipped)
    with pytest.raises(UserError, match=r"x\.bin: refused: .*(posix|nt)\.system.* execute code") as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("jaxtl.weights.torch_file", "os.system"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("pickle", "loads"),
    ],
)
def test_a_global_off_the_list_is_refused_even_where_it_is_only_named(tmp_path, module, name):
    with pytest.raises(UserError, match="refused"):
        read_torch(write_zip(tmp_path / "x.bin", {"w": tensor_global(), "x": Global(module, name)}))


@pytest.mark.parametrize("allowed", [key for key in torch_file._GLOBALS if "Storage" not in key[1]], ids=".".join)
def test_a_file_cannot_set_attributes_on_the_allowed_globals_for_the_files_after_it(tmp_path, allowed):
    state = (None, {"__defaults__": ("evil",)})  # pickle gives the second of a pair to setattr
    path = write_zip(tmp_path / "evil.bin", {"w": tensor_global(), "x": Global(*allowed, state=state)})
    with pytest.raises(UserError, match="damaged"):
        read_torch(path)


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@WRITERS
@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": (5, 1)},  # last element 2 * 5 + 3 = 13 of 12
        {"strides": (2**62, 1)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (-4, 1)},
        {"shape": (-3, 4)},
        {"shape": (2**63, 4), "strides": (0, 0)},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (3, 4, 1)},
        {"shape": (1,) * 100, "strides": (1,) * 100},
        {"shape": 3},
        {"shape": ("3", 4)},
        {"offset": 0.5},
        {"count": 13},
        {"count": 2**62},
        {"count": -1},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"view": (("v", 8, 12),)},
        {"view": (("v", -1, 12),)},
    ],
    ids=str,
)
def test_a_tensor_that_reaches_outside_its_storage_is_an_error(tmp_path, write, arguments):
    if "view" in arguments and write is write_zip:
        arguments = {**arguments, "count": 13}  # the zip format has no views
    with pytest.raises(UserError, match="damaged"):
        read_torch(write(tmp_path / "x.bin", {"w": tensor_global(**arguments)}))


@WRITERS
def test_the_hand_written_files_are_right_where_nothing_is_wrong(tmp_path, write):
    array = read_torch(write(tmp_path / "x.bin", {"w": tensor_global()}))["w"]
    np.testing.assert_array_equal(array, np.frombuffer(bytes(range(48)), "<f4").reshape(3, 4))
    assert not array.flags.writeable


def test_a_compressed_archive_is_an_error_and_not_unfolded(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", hand_pickle({"w": tensor_global()}))
        archive.writestr("archive/data/0", bytes(48))
    with pytest.raises(UserError, match="compressed"):
        read_torch(tmp_path / "x.bin")


# --- damaged -----------------------------------------------------------------------------------------------


@ZIP_OR_LEGACY
def test_a_truncated_file_is_a_one_line_error_wherever_it_ends(tmp_path, zipped):
    whole = save({"a": torch.randn(10, 3), "b": torch.randn(7)}, tmp_path / "x.bin", zipped).read_bytes()
    path = tmp_path / "short.bin"
    for length in {*range(0, len(whole), 7), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"short\.bin is not a torch checkpoint, or is damaged") as caught:
            read_torch(path)
        assert "\n" not in str(caught.value)


@ZIP_OR_LEGACY
def test_random_damage_gives_a_user_error_or_arrays_and_nothing_else(tmp_path, zipped):
    whole = save({"a": torch.randn(4, 3), "b": torch.randn(7)}, tmp_path / "x.bin", zipped).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in random.integers(len(whole), size=4):
            damaged[position] = random.integers(256)
        (tmp_path / "y.bin").write_bytes(damaged)
        try:
            arrays = read_torch(tmp_path / "y.bin")
        except UserError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 - most of the damaged files raise, not all
        else:
            assert all(isinstance(array, np.ndarray) for array in arrays.values())


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"<!DOCTYPE html>", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(99)]
)
def test_a_file_of_another_kind_is_a_one_line_error(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a torch checkpoint") as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)


@ZIP_OR_LEGACY
def test_a_checkpoint_without_tensors_is_an_error(tmp_path, zipped):
    with pytest.raises(UserError, match="holds no tensors"):
        read_torch(save({"epoch": 3}, tmp_path / "x.bin", zipped))
    with pytest.raises(UserError, match="holds no tensors"):
        read_torch(save([torch.zeros(2)], tmp_path / "y.bin", zipped))


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_torch(path)


def test_torch_is_not_imported_to_read_a_torch_file(tmp_path):
    path = save({"w": torch.ones(2, 2)}, tmp_path / "x.bin")
    code = (
        "import sys, pathlib; from jaxtl.weights.files import Checkpoint; from jaxtl.weights.torch_file import "
        "read_torch; assert read_torch(pathlib.Path(sys.argv[1]))['w'].sum() == 4; "
        "assert Checkpoint(sys.argv[1])['w'].sum() == 4; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPO, check=True)
