"""The real Hub client, in a process of its own since it reads HF_ENDPOINT when imported, against a small server."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError

from jaxtl.errors import UserError
from jaxtl.weights import hub
from jaxtl.weights.files import Checkpoint

REPO = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIDE = {"config.json": b'{"model_type": "vit"}', "preprocessor_config.json": b"{}", "vocab.txt": b"[PAD]\n[UNK]\n"}
UNWANTED = {
    "README.md": b"# a model",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"tf",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "training_args.bin": b"args",
}
REPOS = {
    "org/both": {**SIDE, **UNWANTED, "model.safetensors": b"safe" * 999, "pytorch_model.bin": b"torch"},
    "org/torch": {**SIDE, **UNWANTED, "pytorch_model.bin": b"torch" * 999},
    "org/shards": {
        **SIDE,
        **UNWANTED,
        "model.safetensors.index.json": b'{"weight_map": {}}',
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "pytorch_model.bin.index.json": b"{}",
        "pytorch_model-00001-of-00001.bin": b"torch",
    },
    "org/flax": {**SIDE, **UNWANTED},
    "org/gated": {**SIDE, "model.safetensors": b"safe"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as `snapshot_download` asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        files = REPOS.get(name)
        self.server.requests.append((self.command, self.path))
        if name == "org/down":
            self.answer(status=503)
        elif name == "org/portal":
            self.answer(b"<html>please log in</html>")
        elif name == "org/cut" or self.server.cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif files is None:
            self.answer(status=401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif is_api and parts[4] == "revision":
            self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
        elif is_api and parts[4] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for path, body in files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif name == "org/gated":
            self.answer(status=403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        else:
            body = files["/".join(parts[4:])]
            self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    do_HEAD = do_GET


@contextlib.contextmanager
def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.cut = [], False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def endpoint(server):
    return f"http://127.0.0.1:{server.server_port}"


def python(home, address, *arguments, **environment):
    """Runs Python in a process of its own, with a Hub and caches of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    own = {"HF_HOME": str(home), "JAXTL_CACHE": str(home), "HF_ENDPOINT": address, "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env={**own, "JAX_PLATFORMS": "cpu", **kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def server():
    with serve() as server:
        yield server


@pytest.fixture
def fetch(tmp_path):
    """Returns what runs `fetch` in a process of its own, with a cache of its own, for `{repo: folder or error}`."""

    def run(endpoint, *repos, **environment):
        code = (
            "import sys\n"
            "from jaxtl.errors import UserError\n"
            "from jaxtl.weights.hub import fetch\n"
            "for repo in sys.argv[1:]:\n"
            "    try:\n"
            "        print('folder', fetch(repo))\n"
            "    except UserError as error:\n"
            "        print('error', error)\n"
        )
        done = python(tmp_path, endpoint, "-c", code, *repos, **environment)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == len(repos), "not one line for each repo"
        results = [line.split(" ", 1) for line in lines]
        return [Path(text) if kind == "folder" else text for kind, text in results]

    return run


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_safetensors_are_preferred_torch_is_the_fallback_and_nothing_else_is_fetched(server, fetch):
    both, torch, shards = fetch(endpoint(server), "org/both", "org/torch", "org/shards")
    assert contents(both) == {**SIDE, "model.safetensors": b"safe" * 999}
    assert contents(torch) == {**SIDE, "pytorch_model.bin": b"torch" * 999}
    expected = [name for name in REPOS["org/shards"] if name.startswith("model")]
    assert contents(shards) == {**SIDE, **{name: REPOS["org/shards"][name] for name in expected}}
    for name in UNWANTED:
        assert not any(path.endswith(f"/{COMMIT}/{name}") for _, path in server.requests)


def test_a_repo_in_the_cache_is_used_without_a_network_and_without_downloading_again(server, fetch):
    first = fetch(endpoint(server), "org/both", "org/torch")
    server.requests.clear()
    assert fetch(endpoint(server), "org/both", "org/torch") == first
    assert not [path for method, path in server.requests if "/resolve/" in path]
    assert fetch(closed_port(), "org/both", "org/torch") == first
    assert fetch(endpoint(server), "org/both", "org/torch", HF_HUB_OFFLINE="1") == first


def test_a_dead_proxy_or_a_cut_connection_does_not_hide_the_cache(server, fetch):
    (first,) = fetch(endpoint(server), "org/both")
    server.cut = True
    dead_proxy = {"HTTP_PROXY": closed_port(), "NO_PROXY": ""}
    for address, environment in ((endpoint(server), {}), ("http://hub.invalid", dead_proxy)):
        cached, missing = fetch(address, "org/both", "org/torch", **environment)
        assert cached == first
        assert missing.startswith(f"cannot reach {address} for org/torch")


def test_no_network_and_no_cache_says_what_to_download_and_where_to_put_it(fetch):
    dead = closed_port()
    (message,) = fetch(dead, "org/both")
    assert message.startswith(f"cannot reach {dead} for org/both: ")
    assert "`hf download org/both --local-dir DIR`" in message
    assert "config.json" in message
    assert "model.safetensors" in message
    assert "--set model.weights=DIR" in message


def test_offline_mode_and_no_cache_says_that_offline_mode_is_why(server, fetch):
    (message,) = fetch(endpoint(server), "org/both", HF_HUB_OFFLINE="1")
    assert message.startswith("HF_HUB_OFFLINE is set and org/both is not whole in the cache")
    assert not server.requests


def test_every_answer_of_the_hub_that_is_no_file_is_a_one_line_error(server, fetch):
    repos = ("org/unknown", "org/gated", "org/flax", "org/down", "org/portal", "org/cut")
    unknown, gated, flax, down, portal, cut = fetch(endpoint(server), *repos)
    assert unknown.startswith(f"there is no repo org/unknown at {endpoint(server)}, or it is private")
    assert "HF_TOKEN" in unknown
    assert "hf auth login" in unknown
    assert gated.startswith("org/gated is gated")
    assert "HF_TOKEN" in gated
    assert flax.startswith("org/flax has no model.safetensors or pytorch_model.bin")
    assert "answered 503 for org/down" in down
    assert portal.startswith(f"{endpoint(server)} does not answer like a Hub")
    assert cut.startswith(f"cannot reach {endpoint(server)} for org/cut")


def test_an_interrupted_download_is_not_taken_for_a_whole_one(server, fetch):
    (folder,) = fetch(endpoint(server), "org/shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (found,) = fetch(closed_port(), "org/shards")
    if isinstance(found, Path):  # huggingface_hub 1 takes the cache as it is: then it is noticed on opening
        with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors"):
            Checkpoint(found)
    else:
        assert found.startswith("cannot reach")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left"),
        (RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("Task error: CAS Client Error: error sending request"), "HF_HUB_DISABLE_XET=1"),
        (OSError("Consistency check failed: file should be\nof size 9"), "fetching org/name from .* failed"),
        (HTTPError("cut\nshort"), "cannot reach"),
    ],
)
def test_what_a_test_server_cannot_cause_is_a_one_line_error_too(monkeypatch, error, expected):
    def fail(*_, local_files_only=False, **__):
        raise hub.LocalEntryNotFoundError("not in the cache") if local_files_only else error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=expected) as caught:
        hub.fetch("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["bert-base-uncased", "google/vit-base-patch16-224", "a/b.c_d-1"])
def test_repo_ids_are_told_apart(text):
    assert hub.is_repo_id(text)


@pytest.mark.parametrize(
    "text", ["", "a/b/c", "/abs/path", "./here", "../up", "~/home", "a b", "org/name.git", "C:\\x"]
)
def test_paths_are_not_taken_for_repo_ids(text):
    assert not hub.is_repo_id(text)
    with pytest.raises(UserError, match="neither a file or folder nor a Hugging Face repo id"):
        hub.fetch(text)


def test_a_description_is_config_and_tokenizer_and_no_weights_are_asked_for(server, tmp_path):
    code = "import sys; from jaxtl.weights.hub import fetch_description; print(fetch_description(sys.argv[1]))"
    done = python(tmp_path, endpoint(server), "-c", code, "org/both")
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip())) == SIDE
    asked = {path.rpartition("/")[2] for _, path in server.requests if "/resolve/" in path}
    assert asked == set(SIDE)


def test_weights_are_told_to_be_missing_where_only_the_description_is_in_the_cache(server, tmp_path, fetch):
    """As after --explain, and then without a network: the weights are of a format that is read, but not here."""
    code = "import sys; from jaxtl.weights.hub import fetch_description; fetch_description(sys.argv[1])"
    assert python(tmp_path, endpoint(server), "-c", code, "org/both").returncode == 0
    (message,) = fetch(endpoint(server), "org/both", HF_HUB_OFFLINE="1")
    assert isinstance(message, str)
    assert "HF_HUB_OFFLINE is set and org/both is not whole in the cache" in message
    (message,) = fetch(closed_port(), "org/both")
    assert message.startswith("cannot reach")
    (folder,) = fetch(endpoint(server), "org/both")  # and with one they are fetched
    assert contents(folder) == {**SIDE, "model.safetensors": b"safe" * 999}


def test_explain_of_a_text_experiment_fetches_config_and_tokenizer_only(
    server, tmp_path, bert_folder, text_folder, monkeypatch
):
    files = {path.name: path.read_bytes() for path in bert_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    monkeypatch.setitem(REPOS, "org/bert", files)
    done = python(
        tmp_path, endpoint(server), "-m", "jaxtl.main", "--experiment=text_csv", "--explain",
        "--set=model.weights=org/bert", f"--set=data.train={text_folder / 'train.csv'}", "--set=data.max_length=40",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "192 training, 48 held-out examples; 2 classes: fake 96, real 96" in done.stdout
    assert "word pieces long" in done.stdout  # the tokenizer was used
    asked = {path.rpartition("/")[2] for _, path in server.requests if "/resolve/" in path}
    assert asked == set(files) - {"model.safetensors"}
    assert not (tmp_path / "run").exists()
