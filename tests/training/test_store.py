"""Arrays kept in files: what is found is what was written, whatever happens to the files, whoever else is at work."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl.training import store as store_module
from jaxtl.training.store import ARRAY, DESCRIPTION, Store

SHAPE = (6, 4)
SIZE = 6 * 4 * 4
KEYS = tuple(digit * 64 for digit in "0123456789")
FLOAT32 = np.dtype(np.float32)


def values(seed=0):
    return np.random.default_rng(seed).standard_normal(SIZE // 4).astype(np.float32).reshape(SHAPE)


def put(store, key, array):
    with store.create(key, array.shape, array.dtype, {"of": "a test"}) as entry:
        entry.fill(array)
        entry.keep()


def get(store, key, mapped=False):
    return store.load(key, SHAPE, FLOAT32, mapped=mapped)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in (".lock", ".keys"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("mapped", [False, True])
def test_array_comes_back_bit_for_bit(tmp_path, dtype, mapped):
    array = (values() * 100).astype(jnp.dtype(dtype))
    put(Store(tmp_path, 1e6), KEYS[0], array)
    found = Store(tmp_path, 1e6).load(KEYS[0], SHAPE, array.dtype, mapped=mapped)
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    assert isinstance(found, np.memmap) == mapped
    assert names(tmp_path) == [KEYS[0]]
    assert get(Store(tmp_path, 1e6), KEYS[1]) is None


def truncated(entry):
    os.truncate(entry / ARRAY, SIZE - 1)


def longer(entry):
    os.truncate(entry / ARRAY, SIZE + 1)


def flipped(entry):
    content = bytearray((entry / ARRAY).read_bytes())
    content[SIZE // 2] ^= 1
    (entry / ARRAY).write_bytes(content)


def without_array(entry):
    (entry / ARRAY).unlink()


def without_description(entry):
    (entry / DESCRIPTION).unlink()


def described(**changed):
    def damage(entry):
        description = json.loads((entry / DESCRIPTION).read_text())
        (entry / DESCRIPTION).write_text(json.dumps({**description, **changed}))

    return damage


def garbage(text):
    return lambda entry: (entry / DESCRIPTION).write_bytes(text)


DAMAGES = {
    "truncated": truncated,
    "longer": longer,
    "flipped": flipped,
    "no array": without_array,
    "no description": without_description,
    "half a description": garbage(b'{"shape": [6'),
    "a list": garbage(b"[]"),
    "not text": garbage(b"\xff\xfe\x00"),
    "other shape": described(shape=[4, 6]),
    "other dtype": described(dtype="int32"),
    "no digest": described(sha256=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_entry_is_said_removed_and_made_anew(tmp_path, damage, capsys):
    put(Store(tmp_path, 1e6), KEYS[0], values())
    damage(tmp_path / KEYS[0])
    capsys.readouterr()
    store = Store(tmp_path, 1e6)
    assert get(store, KEYS[0]) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"damaged cache entry {tmp_path / KEYS[0]}" in line
    assert names(tmp_path) == []
    put(store, KEYS[0], values())
    np.testing.assert_array_equal(get(store, KEYS[0]), values())


def test_error_while_filling_leaves_nothing(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), Store(tmp_path, 1e6).create(KEYS[0], SHAPE, FLOAT32, {}) as entry:
        entry.array[:2] = 1
        assert len(names(tmp_path)) == 1
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def script(folder, body):
    """Starts a process that has a store, a key, and values to put."""
    lines = (
        "import os, pathlib, signal, time, numpy as np",
        "from jaxtl.training.store import Store",
        f"folder = pathlib.Path({str(folder)!r}); store = Store(folder, 1e6); key = {KEYS[0]!r}",
        f"values = np.frombuffer(bytes.fromhex({values().tobytes().hex()!r}), np.float32).reshape({SHAPE})",
        body,
    )
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)])


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_run_left_is_no_entry_and_makes_room(tmp_path, monkeypatch, locks):
    """At once, or, where a file system has no locks to tell that it is dead, after an hour."""
    body = f"""
with store.create(key, {SHAPE}, np.dtype(np.float32), {{}}) as entry:
    entry.array[:3] = values[:3]
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert script(tmp_path, body).wait(60) == -signal.SIGKILL
    (left,) = tmp_path.glob(".jaxtl-*")
    store = Store(tmp_path, 1e6)
    assert get(store, KEYS[0]) is None
    if locks:
        put(store, KEYS[0], values())
        assert names(tmp_path) == [KEYS[0]]
        return

    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    put(store, KEYS[0], values())
    assert names(tmp_path) == sorted([left.name, KEYS[0]])  # it might be at work
    hours_ago = time.time() - 7200
    os.utime(left, (hours_ago, hours_ago))
    put(store, KEYS[1], values())
    assert left.exists()  # its file is written to
    os.utime(left / ARRAY, (hours_ago, hours_ago))
    put(store, KEYS[2], values())
    assert names(tmp_path) == list(KEYS[:3])
    np.testing.assert_array_equal(get(store, KEYS[0]), values())


def test_two_processes_that_make_the_same_entry_at_once_both_get_it_and_one_remains(tmp_path):
    folder = tmp_path / "store"

    def body(me, other):
        return f"""
meet = pathlib.Path({str(tmp_path)!r})
with store.create(key, {SHAPE}, np.dtype(np.float32), {{}}) as entry:
    (meet / "{me}").touch()
    while not (meet / "{other}").exists():
        time.sleep(0.01)
    entry.array[...] = values
    found = entry.keep()
assert np.array_equal(found, values)
assert np.array_equal(store.load(key, {SHAPE}, np.dtype(np.float32), mapped=False), values)
"""

    processes = [script(folder, body("one", "two")), script(folder, body("two", "one"))]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert names(folder) == [KEYS[0]]
    np.testing.assert_array_equal(get(Store(folder, 1e6), KEYS[0]), values())


def test_entry_that_another_run_begins_is_not_taken_for_abandoned(tmp_path, monkeypatch):
    """Between the file and its lock, another run that looks for abandoned ones has to wait."""
    others = []

    def lock(file, locked=store_module._lock):
        if not others:
            others.append(threading.Thread(target=put, args=(Store(tmp_path, 1e6), KEYS[1], values(1))))
            others[0].start()
            others[0].join(0.3)  # it does not end before it is our turn no more
        locked(file)

    monkeypatch.setattr(store_module, "_lock", lock)
    put(Store(tmp_path, 1e6), KEYS[0], values())
    others[0].join(60)
    assert names(tmp_path) == list(KEYS[:2])


def test_entry_of_the_run_that_was_faster_is_used(tmp_path):
    with Store(tmp_path, 1e6).create(KEYS[0], SHAPE, FLOAT32, {}) as entry:
        entry.array[...] = 0
        put(Store(tmp_path, 1e6), KEYS[0], values())
        np.testing.assert_array_equal(entry.keep(), values())
    assert names(tmp_path) == [KEYS[0]]


def test_entries_used_longest_ago_make_room(tmp_path):
    store = Store(tmp_path, 1e6)
    for age, key in enumerate(KEYS[:4]):  # the first is the newest
        put(store, key, values())
        os.utime(tmp_path / key, (time.time() - 1000 * (age + 1),) * 2)
    get(Store(tmp_path, 1e6), KEYS[3])  # now it is
    later = Store(tmp_path, 4 * SIZE)
    put(later, KEYS[4], values())
    assert names(tmp_path) == [KEYS[0], KEYS[1], KEYS[3], KEYS[4]]
    put(later, KEYS[5], values())
    put(later, KEYS[6], values())
    assert names(tmp_path) == [KEYS[3], KEYS[4], KEYS[5], KEYS[6]]


def test_entries_of_this_run_and_files_of_others_never_make_room(tmp_path):
    for key in KEYS[:2]:
        put(Store(tmp_path, 1e6), key, values())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / ARRAY).write_bytes(bytes(8))
    os.utime(tmp_path / "thesis", (0, 0))  # older than any entry
    (tmp_path / "notes").write_text("x")
    store = Store(tmp_path, 3 * SIZE + 8)
    get(store, KEYS[0])
    put(store, KEYS[2], values())
    with pytest.raises(OSError, match="leaves no room"):
        put(store, KEYS[3], np.concatenate([values(), values()]))
    assert names(tmp_path) == [*KEYS[:3], "notes", "thesis"]  # and nothing was deleted in vain
    put(store, KEYS[3], values())
    assert names(tmp_path) == [KEYS[0], KEYS[2], KEYS[3], "notes", "thesis"]


@pytest.mark.parametrize("limit", [0, SIZE - 1])
def test_what_is_larger_than_the_limit_is_not_kept(tmp_path, limit):
    with pytest.raises(OSError, match="leaves no room"):
        put(Store(tmp_path, limit), KEYS[0], values())
    assert names(tmp_path) == []
    put(Store(tmp_path, SIZE), KEYS[0], values())


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        put(Store(tmp_path, 1e6), KEYS[0], values())
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made_is_an_error_when_writing_and_empty_when_reading(tmp_path):
    (tmp_path / "file").write_text("x")
    store = Store(tmp_path / "file" / "store", 1e6)
    assert get(store, KEYS[0]) is None
    with pytest.raises(OSError, match="file"):
        put(store, KEYS[0], values())


def test_array_that_is_mapped_or_written_makes_no_room_until_it_is_let_go(tmp_path):
    put(Store(tmp_path, 1e6), KEYS[0], values())
    found = get(Store(tmp_path, 1e6), KEYS[0], mapped=True)[1:]
    with Store(tmp_path, 1e6).create(KEYS[1], SHAPE, FLOAT32, {}) as entry:
        with pytest.raises(OSError, match="leaves no room"):
            put(Store(tmp_path, SIZE), KEYS[2], values())
        entry.array[...] = values()
        kept = entry.keep()
    del entry
    with pytest.raises(OSError, match="leaves no room"):
        put(Store(tmp_path, 2 * SIZE), KEYS[2], values())
    with pytest.raises(ValueError, match="read-only"):
        kept[0, 0] = 1
    assert names(tmp_path) == [KEYS[0], KEYS[1]]
    del found, kept
    put(Store(tmp_path, SIZE), KEYS[2], values())
    assert names(tmp_path) == [KEYS[2]]


@pytest.mark.parametrize("mapped", [False, True])
def test_array_of_nothing_is_an_entry_too(tmp_path, mapped):
    """Of several processes, one may have no example of a small split."""
    put(Store(tmp_path, 1e6), KEYS[0], np.empty((0, 4), np.float32))
    found = Store(tmp_path, 1e6).load(KEYS[0], (0, 4), FLOAT32, mapped=mapped)
    assert found.shape == (0, 4)
    assert names(tmp_path) == [KEYS[0]]


def test_entry_that_cannot_be_read_is_left_where_it_is(tmp_path, monkeypatch, capsys):
    put(Store(tmp_path, 1e6), KEYS[0], values())

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", refuse)
        assert get(Store(tmp_path, 1e6), KEYS[0]) is None
    assert "cannot be read: Permission denied; it is computed anew" in capsys.readouterr().err
    np.testing.assert_array_equal(get(Store(tmp_path, 1e6), KEYS[0]), values())


def test_last_gigabyte_of_the_disk_is_left_to_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=10**9 + SIZE - 1))
    with pytest.raises(OSError, match="would leave less than 1 GB"):
        put(Store(tmp_path, 1e6), KEYS[0], values())
    assert names(tmp_path) == []


def test_entries_make_room_on_the_disk_and_none_is_deleted_in_vain(tmp_path, monkeypatch):
    for age, key in enumerate(KEYS[:3]):
        put(Store(tmp_path, 1e6), key, values())
        os.utime(tmp_path / key, (time.time() - 1000 * (age + 1),) * 2)

    def disk(size):
        """As large as this and a gigabyte."""
        taken = sum(file.stat().st_size for file in tmp_path.glob(f"*/{ARRAY}"))
        monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=10**9 + size - taken))

    disk(3 * SIZE)
    put(Store(tmp_path, 1e6), KEYS[3], values())
    assert names(tmp_path) == [KEYS[0], KEYS[1], KEYS[3]]
    disk(3 * SIZE)
    with pytest.raises(OSError, match="would leave less than 1 GB"):
        put(Store(tmp_path, 1e6), KEYS[4], np.concatenate([values()] * 4))
    assert names(tmp_path) == [KEYS[0], KEYS[1], KEYS[3]]


def test_entry_makes_no_room_where_nobody_can_tell_whether_it_is_in_use(tmp_path, monkeypatch):
    """On a file system without locks, until a week has passed; and one of another user never."""
    put(Store(tmp_path, 1e6), KEYS[0], values())
    days_ago = time.time() - 6 * 86400
    os.utime(tmp_path / KEYS[0], (days_ago, days_ago))
    os.utime(tmp_path / KEYS[0] / ARRAY, (0, 0))
    os.utime(tmp_path / KEYS[0] / DESCRIPTION, (0, 0))
    for error in (OSError(errno.ENOLCK, "No locks available"), PermissionError(errno.EACCES, "Permission denied")):

        def refuse(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("fcntl.flock", refuse)
            with pytest.raises(OSError, match="leaves no room"):
                put(Store(tmp_path, SIZE), KEYS[1], values())
    assert names(tmp_path) == [KEYS[0]]
    os.utime(tmp_path / KEYS[0], (days_ago - 2 * 86400,) * 2)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    put(Store(tmp_path, SIZE), KEYS[1], values())
    assert names(tmp_path) == [KEYS[1]]


def test_entry_that_cannot_be_removed_makes_no_room(tmp_path, monkeypatch):
    put(Store(tmp_path, 1e6), KEYS[0], values())

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", refuse)
        with pytest.raises(OSError, match="leaves no room"):
            put(Store(tmp_path, SIZE), KEYS[1], values())
    np.testing.assert_array_equal(get(Store(tmp_path, 1e6), KEYS[0]), values())


def test_run_that_needs_what_another_one_makes_waits_for_it(tmp_path, capfd):
    begun, going = tmp_path / "begun", tmp_path / "going"
    making = f"""
with store.alone([key, "1" * 64]):
    pathlib.Path({str(begun)!r}).touch()
    while not pathlib.Path({str(going)!r}).exists():
        time.sleep(0.01)
    with store.create(key, {SHAPE}, np.dtype(np.float32), {{}}) as entry:
        entry.array[...] = values
        entry.keep()
"""
    waiting = f"""
with store.alone(["2" * 64, key]):
    assert np.array_equal(store.load(key, {SHAPE}, np.dtype(np.float32), mapped=False), values)
"""
    folder = tmp_path / "store"
    first = script(folder, making)
    while not begun.exists():
        assert first.poll() is None
        time.sleep(0.01)
    with Store(folder, 1e6).alone([KEYS[3]]):  # another entry
        pass
    second = script(folder, waiting)
    told = ""
    while "waiting for it" not in told:
        assert second.poll() is None
        time.sleep(0.01)
        told += capfd.readouterr().err
    going.touch()
    assert [process.wait(60) for process in (first, second)] == [0, 0]


def test_run_that_died_while_making_an_entry_is_not_waited_for(tmp_path):
    body = """
with store.alone([key]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert script(tmp_path, body).wait(60) == -signal.SIGKILL
    assert script(tmp_path, "with store.alone([key]): pass").wait(60) == 0


def test_folder_for_reading_alone_has_nobody_wait(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", refuse)
        with Store(tmp_path, 1e6).alone(KEYS[:2]):
            entered = True
    assert entered


def test_folder_deleted_while_filling_loses_the_entry_but_not_the_array(tmp_path):
    with Store(tmp_path, 1e6).create(KEYS[0], SHAPE, FLOAT32, {}) as entry:
        entry.array[...] = values()
        (temporary,) = tmp_path.glob(".jaxtl-*")
        for file in temporary.iterdir():
            file.unlink()
        temporary.rmdir()
        with pytest.raises(FileNotFoundError):
            entry.keep()
        np.testing.assert_array_equal(entry.array, values())
    assert names(tmp_path) == []
