import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtl.errors import UserError
from jaxtl.weights import files
from jaxtl.weights.files import Checkpoint

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([7, 8], np.int64)


def save_torch(tensors, path):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)


def save(tensors, path):
    (save_file if path.suffix == ".safetensors" else save_torch)(tensors, path)
    return path


def shard(folder, kind="safetensors"):
    """Writes `a` and `b` as two shards with their index, and returns the path of the index."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    save({"a": A}, folder / names[0])
    save({"b": B}, folder / names[1])
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}))
    return index


def error_of(path):
    """The one line that opening `path` gives."""
    with pytest.raises(UserError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "other.safetensors", "vgg19-dcbb9e9d.pth"])
def test_a_folder_and_the_file_in_it_open_as_the_same_tensors(tmp_path, name):
    path = save({"a": A, "b": B}, tmp_path / name)
    for checkpoint in (Checkpoint(tmp_path), Checkpoint(path), Checkpoint(str(path))):
        assert checkpoint.files == (path,)
        assert sorted(checkpoint) == ["a", "b"]
        assert len(checkpoint) == 2
        assert "a" in checkpoint
        assert "c" not in checkpoint
        assert checkpoint.shape("a") == (2, 3)
        np.testing.assert_array_equal(checkpoint["a"], A, strict=True)
        np.testing.assert_array_equal(checkpoint["b"], B, strict=True)
        for look_up in (checkpoint.__getitem__, checkpoint.shape):
            with pytest.raises(KeyError):
                look_up("c")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_open_as_one_checkpoint(tmp_path, kind):
    shard(tmp_path, kind)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) == 2
    assert sorted(checkpoint) == ["a", "b"]
    assert checkpoint.shape("a") == (2, 3)
    np.testing.assert_array_equal(checkpoint["a"], A, strict=True)
    np.testing.assert_array_equal(checkpoint["b"], B, strict=True)


def test_files_are_looked_for_in_the_documented_order(tmp_path):
    writers = {
        "model.safetensors": lambda: save({"a": A}, tmp_path / "model.safetensors"),
        "model.safetensors.index.json": lambda: shard(tmp_path),
        "pytorch_model.bin": lambda: save({"a": A}, tmp_path / "pytorch_model.bin"),
        "pytorch_model.bin.index.json": lambda: shard(tmp_path, "bin"),
    }
    assert tuple(writers) == files._NAMES
    (tmp_path / "flax_model.msgpack").write_bytes(b"never read")
    (tmp_path / "training_args.bin").write_bytes(b"never read")
    save({"a": A}, tmp_path / "other.pth")
    assert Checkpoint(tmp_path).files[0].name == "other.pth"
    for name in reversed(files._NAMES):
        writers[name]()
        assert Checkpoint(tmp_path).files[0].name.startswith(name.split(".")[0])
        assert len(Checkpoint(tmp_path).files) == (2 if "index" in name else 1)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.float32])
def test_safetensors_of_any_float_width_come_as_float32_and_integers_as_they_are(tmp_path, dtype):
    values = np.array([[1.5, -2.25], [0.0, 1024.0]])  # exact in all four
    save_file({"w": values.astype(dtype), "ids": B, "mask": B > 7}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint["w"], values.astype(np.float32), strict=True)
    assert checkpoint["ids"].dtype == np.int64
    assert checkpoint["mask"].dtype == np.bool_


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_torch_files_of_any_float_width_come_as_float32(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    values = torch.tensor([[1.5, -2.25], [0.0, 1024.0]])
    torch.save({"w": values.to(getattr(torch, dtype))}, tmp_path / "x.pt")
    np.testing.assert_array_equal(Checkpoint(tmp_path / "x.pt")["w"], values.numpy(), strict=True)


def test_shapes_of_safetensors_come_without_reading_the_tensors(tmp_path, monkeypatch):
    save({"a": A}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("read a tensor"))
    assert {name: checkpoint.shape(name) for name in checkpoint} == {"a": (2, 3)}
    assert "a" in checkpoint


def test_a_dtype_numpy_lacks_is_a_user_error_that_names_the_tensor(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match=r"model\.safetensors: w cannot be read"):
        Checkpoint(path)["w"]


# --- digest ----------------------------------------------------------------------------------------------


def test_the_digest_names_the_content_and_not_the_place(tmp_path):
    for folder in ("one", "two", "other"):
        (tmp_path / folder).mkdir()
    save({"a": A, "b": B}, tmp_path / "one" / "model.safetensors")
    save({"a": A, "b": B}, tmp_path / "two" / "model.safetensors")
    save({"a": A + 1, "b": B}, tmp_path / "other" / "model.safetensors")
    one = Checkpoint(tmp_path / "one").digest()
    assert len(one) == 64
    assert Checkpoint(tmp_path / "one" / "model.safetensors").digest() == one
    assert Checkpoint(tmp_path / "two").digest() == one
    assert Checkpoint(tmp_path / "other").digest() != one


def test_the_digest_covers_every_shard(tmp_path):
    shard(tmp_path)
    before = Checkpoint(tmp_path).digest()
    save({"b": B + 1}, tmp_path / "model-00002-of-00002.safetensors")
    assert Checkpoint(tmp_path).digest() != before


# --- what is wrong ---------------------------------------------------------------------------------------


def test_nothing_there_is_an_error_that_says_so(tmp_path):
    assert "no such file or folder" in error_of(tmp_path / "nowhere")


def test_an_empty_folder_is_an_error_that_says_what_was_looked_for(tmp_path):
    message = error_of(tmp_path)
    for name in (*files._NAMES, *files._PATTERNS):
        assert name in message


def test_a_file_of_another_kind_is_an_error_that_lists_the_kinds(tmp_path):
    (tmp_path / "model.msgpack").write_bytes(b"x")
    assert ".safetensors, .bin, .pth, .pt" in error_of(tmp_path / "model.msgpack")


def test_several_files_to_choose_from_are_an_error_that_names_them(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save({"a": A}, tmp_path / name)
    assert "a.safetensors, b.safetensors" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "..", "", ".", "sub/x.safetensors"])
def test_an_index_cannot_reach_outside_its_folder(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    save({"a": A}, tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "refused" in error_of(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x"]}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_index_is_a_user_error(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "not an index of shards" in error_of(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard_is_an_error_that_names_it(tmp_path, kind):
    index = shard(tmp_path, kind)
    gone = next(tmp_path.glob(f"*2-of-00002.{kind}"))
    gone.unlink()
    message = error_of(tmp_path)
    assert index.name in message
    assert gone.name in message


def test_shards_of_another_checkpoint_are_an_error_that_names_a_tensor(tmp_path):
    shard(tmp_path)
    save({"c": A}, tmp_path / "model-00002-of-00002.safetensors")
    assert "'b'" in error_of(tmp_path)


def test_truncated_safetensors_are_a_user_error_wherever_they_end(tmp_path):
    whole = save({"a": A, "b": B}, tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "damaged" in error_of(path)


def test_a_truncated_torch_file_is_a_user_error(tmp_path):
    path = save({"a": A}, tmp_path / "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in error_of(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_told_apart_from_damage(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 346293852\n")
    assert "git lfs pull" in error_of(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_an_unreadable_file_is_a_user_error(tmp_path):
    path = save({"a": A}, tmp_path / "model.safetensors")
    path.chmod(0)
    assert "cannot be read" in error_of(path)
