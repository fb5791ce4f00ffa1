"""A server of Google Cloud Storage's JSON API, in memory, for the real client: STORAGE_EMULATOR_HOST is to be its URL.

As far as gcsfs uses it for whole objects: upload (in one request, or resumable), download, metadata, list, delete.
https://docs.cloud.google.com/storage/docs/json_api
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 5  # entries of a list in one answer: fewer than Google's, so that there is a second one


class Server(ThreadingHTTPServer):
    """Serves from when it is made until `stop`.

    Attributes:
        objects: what they hold, by bucket and name.
        requests: (method, name) of all, and ("WRITTEN", name) of what was uploaded.
        failing: the status of all answers, unless 0.
        before: called with method and name before each answer.
    """

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects = {bucket: {} for bucket in buckets}
        self.uploads, self.requests, self.failing, self.before = {}, [], 0, lambda method, name: None
        self.gone = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def handle_error(self, *_) -> None:
        """Clients may go without waiting for an answer: that is what the tests do."""

    def stop(self) -> None:
        self.gone = True  # to the connections that there are
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", parts.path)
        bucket, name = unquote(match[2]), unquote(match[4] or "")
        self.server.requests.append((self.command, name))
        self.server.before(self.command, name)
        if self.server.gone:
            self.close_connection = True
            return
        objects = self.server.objects.get(bucket)
        if self.server.failing:
            self.answer(self.server.failing, {"error": {"code": self.server.failing, "message": "told to fail"}})
        elif objects is None:
            self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        elif match[1] == "/upload":
            self.upload(bucket, objects, query, sent)
        elif self.command == "GET" and not match[3]:
            self.answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
        elif self.command == "GET" and not name:
            self.answer(200, listed(bucket, objects, query))
        elif name not in objects:
            self.answer(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
        elif self.command == "DELETE":
            objects.pop(name, None)
            self.answer(204)
        elif match[1] == "/download" or query.get("alt") == "media":
            self.answer(200, objects[name])
        else:
            self.answer(200, described(bucket, name, objects))

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def upload(self, bucket: str, objects: dict[str, bytes], query: dict[str, str], sent: bytes) -> None:
        if query["uploadType"] == "multipart":
            mark = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = (part.partition(b"\n\n")[2] for part in sent.split(mark, 2)[1:3])
            name = json.loads(about)["name"]
            data = data[: data.rindex(b"\n" + mark)] if mark in data else data
        elif "upload_id" not in query:
            self.server.uploads[number := str(len(self.server.uploads))] = (query["name"], bytearray())
            where = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return self.answer(200, Location=where)
        else:
            name, data = self.server.uploads[query["upload_id"]]
            first, last, total = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
            assert first == len(data)
            data += sent
            if last + 1 < total:
                return self.answer(308, Range=f"bytes=0-{last}")
        objects[name] = bytes(data)
        self.server.requests.append(("WRITTEN", name))
        self.answer(200, described(bucket, name, objects))
        return None


def described(bucket: str, name: str, objects: dict[str, bytes]) -> dict[str, str]:
    size = str(len(objects[name]))
    return {"kind": "storage#object", "name": name, "bucket": bucket, "id": f"{bucket}/{name}", "size": size}


def listed(bucket: str, objects: dict[str, bytes], query: dict[str, str]) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    found = {}  # name, or prefix that ends with the delimiter -> whether it is an object
    for name in sorted(objects):
        if name.startswith(prefix):
            head, cut, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else ("", "", "")
            found[prefix + head + cut if cut else name] = not cut
    start = int(query.get("pageToken", 0))
    page = list(found.items())[start : start + PAGE]
    answer = {"kind": "storage#objects", "items": [described(bucket, name, objects) for name, one in page if one]}
    if prefixes := [name for name, one in page if not one]:
        answer["prefixes"] = prefixes
    if start + PAGE < len(found):
        answer["nextPageToken"] = str(start + PAGE)
    return answer
