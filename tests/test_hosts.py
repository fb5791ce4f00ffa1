"""Flags that speak of other processes."""

import socket
import subprocess
import sys

import pytest

from jaxtl import hosts
from jaxtl.errors import UserError

NONE = {"auto": False, "coordinator": None, "count": None, "number": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"auto": True, "coordinator": "a:1"}, "leave out"),
        ({"coordinator": "127.0.0.1:1"}, "--process_count, --process_id is missing"),
        ({"coordinator": "127.0.0.1:1", "count": 2, "number": 2}, "--process_id=2 must be from 0 to 1"),
        ({"coordinator": "here", "count": 1, "number": 0}, "expected HOST:PORT"),
        ({"coordinator": "127.0.0.1:1", "count": 2, "number": 0}, "several processes is not supported yet"),
    ],
)
def test_flags_that_do_not_fit_are_told(given, message):
    with pytest.raises(UserError, match=message):
        hosts.start(**{**NONE, **given})


def test_one_process_of_one_runs():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--process_count=1", "--process_id=0", "--list"]
    ended = subprocess.run([sys.executable, "-m", "jaxtl.main", *flags], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "quickstart" in ended.stdout


def test_run_folder_on_object_storage_is_refused_before_anything_is_written(tmp_path, monkeypatch, command):
    from jaxtl import main

    monkeypatch.chdir(tmp_path)
    status, _, told = command(main, "--experiment=quickstart", "--workdir=gs://bucket/run")
    assert status == 2
    assert "--workdir=gs://bucket/run: run folders on object storage are not supported yet" in told
    assert not list(tmp_path.iterdir())
