"""Fetching published data from a server of our own: once, whole or not at all, and one line for whatever goes wrong."""

import concurrent.futures
import contextlib
import hashlib
import http.server
import shutil
import socket
import threading

import pooch
import pytest

from jaxtl import storage
from jaxtl.data import published
from jaxtl.errors import UserError

FILES = {
    "train.csv": b"id,tweet,label\n1,a,real\n2,b,fake\n",
    "val.csv": b"id,tweet,label\n1,c,real\n2,d,fake\n",
    "test.csv": b"id,tweet,label\n1,e,real\n2,f,real\n3,g,fake\n",
}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`: bytes, a status, or `cut`: an answer that ends early."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.removeprefix("/data/")
        self.server.requests.append(name)
        answer = self.server.files.get(name, 404)
        body = FILES[name] if answer == "cut" else b"" if isinstance(answer, int) else answer
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-5] if answer == "cut" else body)


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.requests, server.files = [], dict(FILES)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    use(monkeypatch, f"http://127.0.0.1:{server.server_port}/data/")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the files come to lie."""
    monkeypatch.setenv("JAXTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "data" / "tiny"


def use(monkeypatch, address):
    """Puts the set `tiny` into the table: a digest is known of two files, the counts of the third."""
    digests = [hashlib.sha256(FILES[name]).hexdigest() for name in ("train.csv", "val.csv")]
    entry = published.Published(
        address,
        "label",
        published.File("train.csv", digests[0]),
        published.File("val.csv", digests[1]),
        published.File("test.csv", labels=(("real", 2), ("fake", 1))),
    )
    monkeypatch.setitem(published.SETS, "tiny", entry)


def problem(download=True):
    with pytest.raises(UserError) as caught:
        published.fetch("tiny", download)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".csv"}


def test_files_are_fetched_once(server, folder):
    assert published.fetch("tiny", True) == folder
    assert contents(folder) == FILES
    assert server.requests == list(FILES)
    assert published.fetch("tiny", True) == published.fetch("tiny", False) == folder
    assert server.requests == list(FILES)


def test_processes_that_start_together_fetch_once(server, folder):
    """Or one would take away what another has found whole. Locks keep threads apart as they do processes."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(published.fetch, ["tiny"] * 4, [True] * 4)) == [folder] * 4
    assert server.requests == list(FILES)
    assert contents(folder) == FILES


@pytest.mark.parametrize("name", list(FILES))
def test_a_damaged_or_missing_file_is_fetched_again_and_no_other(server, folder, name):
    published.fetch("tiny", True)
    server.requests.clear()
    (folder / name).write_bytes(FILES[name].replace(b"1,", b"9,"))  # of the labels that were published
    published.fetch("tiny", True)
    (folder / name).unlink()
    published.fetch("tiny", True)
    assert contents(folder) == FILES
    assert server.requests == [name] * 2


def test_the_first_copy_of_a_file_without_a_known_digest_is_remembered(server, folder):
    published.fetch("tiny", True)
    digest = hashlib.sha256(FILES["test.csv"]).hexdigest()
    assert (folder / "test.csv.sha256").read_text() == f"{digest}  test.csv\n"  # as sha256sum writes it
    (folder / "test.csv").write_bytes(b"damaged")
    server.files["test.csv"] = FILES["test.csv"].replace(b"e", b"x")  # the same counts, other bytes
    assert "what is fetched as test.csv is another file" in problem()


def test_files_put_into_the_cache_by_hand_are_checked_and_used(folder, monkeypatch):
    use(monkeypatch, "http://example.invalid/")
    folder.mkdir(parents=True)
    for name, body in FILES.items():
        (folder / name).write_bytes(body)
    assert published.fetch("tiny", False) == folder
    assert (folder / "test.csv.sha256").is_file()


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("train.csv", FILES["val.csv"], "what is fetched as train.csv is another file"),
        ("test.csv", FILES["val.csv"], "what is fetched as test.csv is another file"),
        ("test.csv", b"<html>please log in</html>", "is a login page or proxy in the way?"),
        ("test.csv", b"\xff\xfe\x00", "is another file"),
        ("val.csv", 404, "val.csv was answered with 404"),
        ("val.csv", 403, "val.csv was answered with 403"),
        ("val.csv", 503, "val.csv was answered with 503"),
        ("test.csv", "cut", "test.csv cannot be fetched"),
    ],
)
def test_an_answer_that_is_not_the_whole_file_leaves_nothing_in_its_place(server, folder, name, answer, expected):
    server.files[name] = answer
    message = problem()
    assert expected in message
    assert f"from http://127.0.0.1:{server.server_port}/data/ into a folder and --set data.dir=FOLDER" in message
    before = list(FILES)[: list(FILES).index(name)]
    assert contents(folder) == {name: FILES[name] for name in before}
    server.files.update(FILES)
    published.fetch("tiny", True)
    assert contents(folder) == FILES


def test_an_interrupted_download_leaves_nothing(server, folder, monkeypatch):
    def interrupt(self, url, path, caller):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pooch.HTTPDownloader, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            published.fetch("tiny", True)
    assert contents(folder) == {}
    published.fetch("tiny", True)
    assert contents(folder) == FILES


def test_no_network_says_what_to_get_from_where_and_how_to_use_it(folder, monkeypatch):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    use(monkeypatch, address)
    message = problem()
    assert message.startswith("train.csv cannot be fetched (")
    assert "Connection refused): is there a network?" in message
    assert f"put train.csv, val.csv, test.csv from {address} into a folder and --set data.dir=FOLDER" in message
    use(monkeypatch, "http://jaxtl.invalid/")
    assert "train.csv cannot be fetched" in problem()


def test_a_server_that_does_not_answer_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(published, "_TIMEOUT", 0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        use(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert "train.csv cannot be fetched (timed out)" in problem()


def test_nothing_is_fetched_where_that_is_not_allowed(server, folder):
    by_hand = "data.download is false: put train.csv, val.csv, test.csv from http://"
    message = problem(download=False)
    assert message.startswith(f"there is no train.csv, val.csv, test.csv in {folder}, and {by_hand}")
    assert not server.requests
    published.fetch("tiny", True)
    (folder / "val.csv").unlink()
    message = problem(download=False)
    # All of them: a folder given as data.dir takes the place of the cache.
    assert message.startswith(f"there is no val.csv in {folder}, and {by_hand}")


def test_a_cache_that_cannot_be_written_to_is_one_line(server, folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXTL_CACHE", str(tmp_path / "file"))
    message = problem()
    assert message.startswith(f"{tmp_path / 'file'}/data/tiny: ")
    assert "set JAXTL_CACHE to a folder that can be written to" in message


def test_a_full_disk_is_one_line(server, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "move", full)
    assert f"{folder}: no space left; set JAXTL_CACHE" in problem()
    assert contents(folder) == {}


def test_the_cache_is_in_the_home_folder_unless_the_environment_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXTL_CACHE", "~/elsewhere")
    assert storage.cache_folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("JAXTL_CACHE", "")
    assert storage.cache_folder() == tmp_path / ".cache" / "jaxtl"


def test_an_unknown_set_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"there is no such data set \(did you mean 'covid_fake_news'\?\)"):
        published.fetch("covid_fakenews", True)


def test_the_counts_of_the_covid_test_file_are_those_published():
    counts = dict(published.SETS["covid_fake_news"].test.labels)
    assert counts == {"real": 1120, "fake": 1020}
    assert sum(counts.values()) == 2140
