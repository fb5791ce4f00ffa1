"""Run folders on object storage: the real client against a server on the loopback, see `gcs_server`."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtl
from jaxtl import bucket, compare, config, export, interrupt, main, predict, remote
from jaxtl.errors import Outage, UserError
from jaxtl.training import checkpoint

if not importlib.util.find_spec("gcsfs"):  # not imported: `bucket.Bucket` sets what it reads then
    pytest.skip("there is no gcsfs: pip install 'jaxtl[gcs]'", allow_module_level=True)
sys.path.append(str(Path(__file__).parent))
gcs_server = importlib.import_module("gcs_server")
interrupted = importlib.import_module("interrupted")
IMAGES, lines = interrupted.IMAGES, interrupted.lines

URL = "gs://b/runs/x"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(interrupt, "_asked", None)  # put back, whatever a mirror notes after its test
    made = gcs_server.Server("b")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", made.url)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # no search for credentials of a machine of Google's
    yield made
    made.stop()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns what has this process be as on another machine: with a cache of its own."""

    def become(name):
        monkeypatch.setenv("JAXTL_CACHE", str(tmp_path / name))
        return tmp_path / name

    become("first")
    return become


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "experiment.json"
    path.write_text(config.to_json(IMAGES))
    return f"--experiment={path}"


def state(folder):
    """What is in a folder, as far as it is pushed."""
    return {path: (folder / path).read_bytes() for path in bucket._walk(folder)}


def pulled(folder):
    bucket.pull(bucket.Bucket(URL), folder)
    return state(folder)


# --- a folder and a bucket ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, server, machine):
    folder = tmp_path / "folder"
    (folder / "checkpoints/2").mkdir(parents=True)
    (folder / "checkpoints/2/array").write_bytes(b"2" * 100)
    (folder / "metrics.jsonl").write_text("one\n")
    (folder / "experiment.json").write_text("{}")
    (folder / "empty").touch()
    return folder


def change(folder):
    """What training does to a run folder in the time between two pushes."""
    (folder / "checkpoints/4.orbax-checkpoint-tmp-7").mkdir()
    (folder / "checkpoints/4.orbax-checkpoint-tmp-7/array").write_bytes(b"4")
    (folder / "checkpoints/3").mkdir()
    (folder / "checkpoints/3/array").write_bytes(b"3" * 100)
    shutil.rmtree(folder / "checkpoints/2")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("two\n")
    (folder / "result.json").write_text("{}")
    (folder / ".result.json.tmp").write_text("{")
    (folder / "lock").write_text("me")


def pusher(folder, based):
    where = bucket.Bucket(URL)
    return bucket.Pushed(where, folder, where.read(bucket.MANIFEST).decode(), based, lambda: None)


def test_push_that_is_cut_off_anywhere_leaves_one_whole_state(folder, server, tmp_path):
    """After every number of requests that the server still answered: the state before, or the one after."""
    pusher(folder, tmp_path / "based.json").push()
    before, objects = state(folder), dict(server.objects["b"])
    assert pulled(tmp_path / "reader") == before
    change(folder)
    seen = []
    for answered in range(100):
        server.objects["b"] = dict(objects)
        left = iter(range(answered))
        server.before = lambda *_, left=left: setattr(server, "failing", 0 if next(left, None) is not None else 400)
        try:
            pusher(folder, tmp_path / "based.json").push()
            cut = False
        except UserError:
            cut = True
        server.before, server.failing = (lambda *_: None), 0
        seen.append(pulled(tmp_path / "reader"))
        assert seen[-1] in (before, state(folder))
        # The next push cleans up whatever that one left.
        pusher(folder, tmp_path / "based.json").push()
        assert pulled(tmp_path / "reader") == state(folder)
        listed = json.loads(server.objects["b"]["runs/x/manifest.json"])["files"]
        names = {f"runs/x/{entry['object']}" for entry in listed.values()}
        assert server.objects["b"].keys() - names == {"runs/x/manifest.json", "runs/x/pending.json"}
        if not cut:
            break
    assert not cut
    assert answered > 6
    assert before in seen
    assert not any("tmp" in path or path == "lock" for path in seen[-1])


def test_reader_of_a_state_that_is_being_replaced_gets_the_next_whole_one(folder, server, tmp_path):
    pusher(folder, tmp_path / "based.json").push()
    once = threading.Lock()

    def before(method, name):
        if method == "GET" and name.endswith("array") and once.acquire(blocking=False):
            change(folder)
            pusher(folder, tmp_path / "based.json").push()

    server.before = before
    assert pulled(tmp_path / "reader") == state(folder)
    assert "result.json" in state(folder)


def test_what_is_there_is_not_fetched_or_pushed_again(folder, server, tmp_path):
    pushed = pusher(folder, tmp_path / "based.json")
    pushed.push()
    pulled(tmp_path / "reader")
    (tmp_path / "reader/experiment.json").write_text("damaged")
    (tmp_path / "reader/more").write_text("not listed")
    server.requests.clear()
    assert pulled(tmp_path / "reader") == state(folder)
    assert {name for _, name in server.requests if name} == {"runs/x/manifest.json", "runs/x/experiment.json"}
    server.requests.clear()
    pushed.push()
    assert server.requests == []
    (folder / "result.json").write_text("{}")
    pushed.push()
    written = [name for method, name in server.requests if method == "WRITTEN"]
    assert written == [f"runs/x/{name}" for name in ("pending.json", "result.json", "manifest.json")]


def test_file_that_vanishes_while_it_is_copied_has_the_snapshot_taken_anew(folder, tmp_path, monkeypatch, server):
    link, calls = os.link, []

    def vanishing(source, target):
        calls.append(source)
        if len(calls) == 1:
            change(folder)  # as the checkpoint manager does
        link(source, target)

    monkeypatch.setattr(os, "link", vanishing)
    pusher(folder, tmp_path / "based.json").push()
    assert pulled(tmp_path / "reader") == state(folder)
    assert len(calls) > 1


def test_damaged_object_and_manifest_that_leads_elsewhere_are_refused(folder, tmp_path, server, monkeypatch):
    monkeypatch.setattr(bucket, "_TRIES", 2)
    pusher(folder, tmp_path / "based.json").push()
    server.objects["b"]["runs/x/metrics.jsonl"] = b"other"
    with pytest.raises(UserError, match=r"metrics.jsonl is not what manifest.json says"):
        remote.local(URL)
    entry = {"object": "metrics.jsonl", "size": 5, "sha256": ""}
    server.objects["b"]["runs/x/manifest.json"] = json.dumps({"files": {"../../evil": entry}}).encode()
    with pytest.raises(UserError, match="leads out of the folder"):
        remote.local(URL)


def test_server_that_answers_503_for_a_while_is_asked_again(folder, tmp_path, server):
    server.failing = 503
    threading.Timer(2.0, lambda: setattr(server, "failing", 0)).start()
    pusher(folder, tmp_path / "based.json").push()
    assert pulled(tmp_path / "reader") == state(folder)


# --- two machines ------------------------------------------------------------------------------------------


def test_second_run_takes_over_and_the_first_ends_with_its_host(server, machine, capsys):
    early = remote.Mirror(URL).__enter__()
    (early.folder / "first").touch()
    machine("second")
    with remote.mirrored(URL) as second:
        (second / "second").touch()
    with pytest.raises(UserError, match=r"process \d+ on \S+, since .* has taken over gs://b/runs/x.*this run has"):
        early.__exit__(None, None, None)
    assert "it is told to stop" in capsys.readouterr().err
    assert (early.folder / "first").exists()
    machine("third")
    assert state(remote.local(URL)).keys() == {"second"}


@pytest.mark.slow
def test_training_that_is_taken_over_stops_within_a_step(server, machine, settings, command, monkeypatch):
    monkeypatch.setattr(remote, "EVERY", 0.05)
    monkeypatch.setattr(interrupt, "_asked", None)
    other = json.dumps({"token": "t", "host": "elsewhere", "process": 7, "time": "now"}).encode()

    def before(method, name):
        if method == "POST" and "runs/x/manifest.json" in server.objects["b"]:
            server.objects["b"]["runs/x/owner.json"] = other

    server.before = before
    status, _, errors = command(main, settings, f"--workdir={URL}")
    assert status == 2
    assert errors.splitlines()[-1].startswith("jaxtl: error: process 7 on elsewhere, since now, has taken over gs://b")
    assert "runs/x/result.json" not in server.objects["b"]


def test_machine_that_comes_back_keeps_what_it_could_not_push(server, machine, capsys):
    with remote.mirrored(URL) as folder:
        (folder / "a").write_text("1")
    (folder / "b").write_text("could not be pushed")
    with remote.mirrored(URL) as again:
        assert (again / "b").exists()  # nobody else was there: it goes on from it
    assert "runs/x/b" in server.objects["b"]
    (folder / "c").write_text("could not be pushed")
    machine("second")
    with remote.mirrored(URL) as other:
        (other / "a").write_text("2")
    machine("first")
    with remote.mirrored(URL) as back:
        assert {path: found for path, found in state(back).items() if path != "lock"} == state(other)
    assert "what it could not push will be gs://b/runs/x.2" in capsys.readouterr().err
    machine("third")
    aside = next(name for name in server.objects["b"] if name.startswith("runs/x.") and name.endswith("/c"))
    assert (remote.local(f"gs://b/{aside.removesuffix('/c')}") / "c").read_text() == "could not be pushed"


def test_a_command_that_would_be_refused_stops_nobody(server, machine, settings, command):
    early = remote.Mirror(URL).__enter__()
    shutil.copy(settings.partition("=")[2], early.folder / "experiment.json")
    early._push()
    machine("second")
    status, _, errors = command(main, settings, "--set=train.epochs=7", f"--workdir={URL}")
    assert status == 2
    assert f"{URL} holds a run with other settings (train.epochs)" in errors
    status, _, errors = command(main, settings, "--mode=eval", f"--workdir={URL}")
    assert status == 2
    assert f"works on {URL}, or was killed: wait until it has ended" in errors
    status, _, errors = command(main, settings, "--mode=eval", "--workdir=gs://b/runs/y")
    assert status == 2
    assert "there is no run at gs://b/runs/y" in errors
    assert not any(name.startswith("runs/y") for name in server.objects["b"])
    (early.folder / "more").touch()
    early.__exit__(None, None, None)
    assert "runs/x/more" in server.objects["b"]


def test_copies_for_reading_are_made_one_after_the_other(folder, server, tmp_path):
    pusher(folder, tmp_path / "based.json").push()
    errors = []

    def read():
        try:
            assert state(remote.local(URL)) == state(folder)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(("given", "told"), [("gs://", "gs://BUCKET/runs/x"), ("gs://b", "gs://b/runs/x")])
def test_url_without_a_folder_is_told_how_to_name_one(given, told, settings, command):
    status, _, errors = command(main, settings, f"--workdir={given}")
    assert (status, len(errors.splitlines())) == (2, 1)
    assert f"names no folder in a bucket: give one, as in {told}" in errors


def test_folder_made_by_hand_counts_as_empty(server, machine):
    server.objects["b"]["runs/x/"] = b""
    with remote.mirrored(URL) as folder:
        (folder / "a").touch()
    assert "runs/x/a" in server.objects["b"]


def test_one_machine_runs_a_url_once(server, machine):
    with remote.mirrored(URL), pytest.raises(UserError, match=r"gs://b/runs/x is in use by process \d+"):
        remote.Mirror(URL).__enter__()


def test_files_that_are_no_run_are_left_alone(server, machine):
    server.objects["b"]["runs/x/photo.jpg"] = b"mine"
    with pytest.raises(UserError, match="holds files but no run"), remote.mirrored(URL):
        pass
    assert server.objects["b"] == {"runs/x/photo.jpg": b"mine"}


# --- the commands ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_on_a_bucket_is_trained_read_and_evaluated_as_a_local_one(
    server, machine, settings, command, tmp_path, monkeypatch
):
    status, output, errors = command(main, settings, f"--workdir={URL}")
    assert status == 0, errors
    assert f"{URL}/result.json" in output
    names = {name.removeprefix("runs/x/") for name in server.objects["b"]}
    assert {"manifest.json", "owner.json", "result.json", "predictions.npz", "report/predictions.csv"} <= names
    assert "pending.json" not in names
    assert command(main, settings, f"--workdir={tmp_path / 'local'}")[0] == 0

    cache = machine("second")
    status, output, errors = command(main, settings, f"--workdir={URL}")
    assert status == 0, errors
    assert f"finished before; {URL}/result.json" in output
    copy = remote.local(URL)
    assert {path.name for path in copy.iterdir()} == {path.name for path in (tmp_path / "local").iterdir()} - {"lock"}
    assert lines(copy) == lines(tmp_path / "local")
    assert checkpoint.load(copy).record["sha256"] == checkpoint.load(tmp_path / "local").record["sha256"]

    status, output, errors = command(main, settings, "--mode=eval", f"--workdir={URL}")
    assert status == 0, errors
    assert output.splitlines()[-1] == f"{URL}/evaluations/held_out.json"
    assert "runs/x/evaluations/held_out.json" in server.objects["b"]

    shutil.rmtree(cache)
    image = np.zeros((8, 8, 3), np.uint8)
    assert jaxtl.load(URL).predict([image]) == jaxtl.load(tmp_path / "local").predict([image])
    assert not list(cache.rglob("checkpoints"))  # which a reader does not need
    from PIL import Image

    status, _, errors = command(export, URL, tmp_path / "exported", "--format=stablehlo")
    assert status == 0, errors
    Image.fromarray(image).save(tmp_path / "image.png")
    status, output, errors = command(predict, URL, tmp_path / "image.png")
    assert status == 0, errors
    assert "image.png" in output
    for found in (URL, "gs://b/runs", "gs://b/ru*/*"):
        status, output, errors = command(compare, found, tmp_path / "local", f"--output={tmp_path / 'page.html'}")
        assert status == 0, errors
        assert "local" in output


@pytest.mark.slow
def test_overwritten_run_is_moved_aside_in_the_bucket_too(server, machine, settings, command):
    assert command(main, settings, "--set=train.max_steps=1", f"--workdir={URL}")[0] == 0
    status, _, errors = command(main, settings, "--set=train.max_steps=2", f"--workdir={URL}")
    assert status == 2
    assert f"{URL} holds a run with other settings" in errors
    machine("second")
    status, _, errors = command(main, settings, "--set=train.max_steps=2", f"--workdir={URL}", "--overwrite")
    assert status == 0, errors
    assert f"the run that was in {URL} is now in {URL}.2" in errors
    machine("third")
    aside = errors.partition(" is now in ")[2].split()[0]
    steps = [json.loads((remote.local(name) / "result.json").read_text())["steps"] for name in (URL, aside)]
    assert steps == [2, 1]


@pytest.mark.slow
def test_member_of_a_suite_starts_from_another_and_is_read_elsewhere(server, machine, command, tmp_path):
    path = tmp_path / "two.py"
    path.write_text(
        "import dataclasses\nfrom jaxtl import config\n"
        f"one = config.from_json({config.to_json(IMAGES)!r}, 'one')\n"
        "model = dataclasses.replace(one.model, weights='suite:one')\n"
        "def experiment():\n"
        "    return config.Suite((('one', one), ('two', dataclasses.replace(one, model=model))))\n"
    )
    status, _, errors = command(main, f"--suite={path}", "--workdir=gs://b/both", "--set=train.max_steps=2")
    assert status == 0, errors
    machine("second")
    image = np.zeros((8, 8, 3), np.uint8)
    assert len(jaxtl.load(["gs://b/both/one", "gs://b/both/two"]).predict([image])) == 1
    status, _, errors = command(main, f"--suite={path}", "--workdir=gs://b/both", "--set=train.max_steps=2")
    assert status == 0, errors
    assert "compiled" not in errors
    status, _, errors = command(compare, "gs://b/both", f"--output={tmp_path / 'page.html'}")
    assert status == 0, errors


@pytest.mark.parametrize("module", [main, predict, compare])
def test_missing_bucket_or_backend_is_one_line(module, server, machine, settings, command, monkeypatch):
    flags = [settings, "--workdir=gs://none/x"] if module is main else ["gs://none/x"]
    status, _, errors = command(module, *flags)
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "gs://none/x" in errors
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    status, _, errors = command(module, *flags)
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "pip install 'jaxtl[gcs]'" in errors


def test_no_access_is_a_mistake_and_an_outage_is_not(server, machine, settings, command):
    server.failing = 403
    status, _, errors = command(main, settings, f"--workdir={URL}")
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "gs://b/runs/x cannot be reached: Forbidden" in errors
    server.failing = 0
    mirror = remote.Mirror(URL).__enter__()
    (mirror.folder / "a").touch()
    server.failing = 410  # which gcsfs does not try again
    with pytest.raises(Outage, match=r"all is in .*/work/x, from where the same command on this machine goes on"):
        mirror.__exit__(None, None, None)
    server.failing = 0
    with remote.mirrored(URL):
        pass
    assert "runs/x/a" in server.objects["b"]


# --- the real command, killed ------------------------------------------------------------------------------

# gcsfs tries a request six times, in half a minute: here in a second and a half.
RUN = """
import asyncio, sys, types
import gcsfs.retry
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 20))
sys.path.append(sys.argv[1])
from jaxtl import remote
remote.EVERY = 0.05
import faults
faults.main(sys.argv[2], sys.argv[3:])
"""


def command_line(tmp_path, machine, settings, moment="SIGKILL@", *flags):
    """The arguments of `subprocess.run` and `Popen`: all machines share the compiled programs."""
    caches = {"JAXTL_CACHE": str(tmp_path / machine), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    arguments = [sys.executable, "-c", RUN, Path(__file__).parent, moment, settings, f"--workdir={URL}", *flags]
    return {"args": arguments, "env": {**os.environ, **caches}, "text": True}


def started(*args):
    return subprocess.run(**command_line(*args), capture_output=True, timeout=240)


@pytest.mark.slow
def test_run_killed_in_the_middle_of_pushes_goes_on_elsewhere_bit_for_bit(server, machine, settings, tmp_path, command):
    moments = (
        "SIGKILL@jaxtl.training.loop:_Loop._report#5",
        "SIGKILL@jaxtl.bucket:Bucket.put#3",
        "SIGKILL@jaxtl.bucket:Bucket.put#30+",
        "SIGKILL@jaxtl.bucket:Bucket.delete#1",
        "SIGKILL@jaxtl.bucket:Bucket.write#5",
        "SIGTERM@jaxtl.training.loop:_Loop._report#2",
    )
    steps = []
    for number, moment in enumerate(moments):
        ended = started(tmp_path, f"machine-{number}", settings, moment)
        assert ended.returncode == (143 if "TERM" in moment else -signal.SIGKILL), ended.stderr
        if "runs/x/manifest.json" in server.objects["b"] and pulled(tmp_path / "reader"):
            saved = checkpoint.load(tmp_path / "reader")
            steps.append(saved.step if saved else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 0  # SIGTERM: what it saved is there
    ended = started(tmp_path, "last", settings)
    assert ended.returncode == 0, ended.stderr
    assert f"going on after step {steps[-1]}" in ended.stderr
    assert command(main, settings, f"--workdir={tmp_path / 'local'}")[0] == 0
    pulled(tmp_path / "reader")
    ours, theirs = checkpoint.load(tmp_path / "reader"), checkpoint.load(tmp_path / "local")
    assert ours.record["sha256"] == theirs.record["sha256"]
    assert lines(tmp_path / "reader") == lines(tmp_path / "local")
    assert (tmp_path / "reader/predictions.npz").read_bytes() == (tmp_path / "local/predictions.npz").read_bytes()


@pytest.mark.slow
def test_server_that_is_gone_at_the_end_costs_nothing_but_the_push(server, machine, settings, tmp_path, monkeypatch):
    def before(method, name):
        if len(server.requests) >= 30 and not server.gone:  # in the middle of a push
            server.gone = True
            threading.Thread(target=server.stop).start()

    server.before = before
    ended = started(tmp_path, "machine", settings)
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("jaxtl: error: gs://b/runs/x cannot be reached")
    folder = Path(last.partition("all is in ")[2].partition(",")[0])
    assert json.loads((folder / "result.json").read_text())["steps"] == 9
    again = gcs_server.Server("b")
    again.objects = server.objects
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", again.url)
        ended = started(tmp_path, "machine", settings)
        assert ended.returncode == 0, ended.stderr
        assert "finished before" in ended.stdout
        assert "runs/x/result.json" in again.objects["b"]
    finally:
        again.stop()


@pytest.mark.slow
def test_two_processes_pull_each_for_itself_and_the_first_pushes(server, machine, settings, tmp_path):
    def both(*moments):
        flags = [f"--coordinator=127.0.0.1:{interrupted.free_port()}", "--process_count=2"]
        processes = [
            subprocess.Popen(
                **command_line(tmp_path, "machine", settings, moment, *flags, f"--process_id={number}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for number, moment in enumerate(moments)
        ]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [process.returncode for process in processes], outputs

    statuses, outputs = both("SIGKILL@", "SIGTERM@jaxtl.training.loop:_Loop._report#2")
    assert statuses == [143, 143], outputs
    pulled(tmp_path / "reader")
    saved = checkpoint.load(tmp_path / "reader")
    assert 0 < saved.step < 9
    shutil.rmtree(tmp_path / "machine")
    statuses, outputs = both("SIGKILL@", "SIGKILL@")
    assert statuses == [0, 0], outputs
    assert f"going on after step {saved.step}" in outputs[0]
    assert len(list((tmp_path / "machine/remote").glob("*/process-1/x"))) == 1
    assert "runs/x/result.json" in server.objects["b"]
