"""Stand-ins on this machine for the two hubs: what their own client libraries ask for, and how hubs fail."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

API = "api"
REVISION = "api/revision"
"""Where a file's name may stand: what a hub tells of a repository, and what Hugging Face tells of its revision."""


@dataclass
class Repo:
    """A repository, and what goes wrong with it; `errors` and `cut` may change between two requests."""

    files: dict[str, bytes]
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of a file, `API` or `REVISION`: the HTTP status, and Hugging Face's code for why, with which it is refused."""
    cut: dict[str, int] = field(default_factory=dict)
    """Of a file: after how many bytes the connection breaks; what is asked of the rest of it is refused."""
    stalled: threading.Event | None = None
    """When there: at a cut the server sets this and waits, instead of breaking the connection."""
    in_storage: frozenset[str] = frozenset()
    """Files that Hugging Face keeps in its Xet storage; the storage, too, is here, and refuses everything."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(self.files.items()))).hexdigest()


@dataclass(frozen=True)
class Request:
    """What a client has asked for."""

    method: str
    repo: str
    file: str
    range: str | None


class HubServer(ThreadingHTTPServer):
    """Both hubs at one address; `requests` is what they were asked for, in order."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may go away in the middle: some tests end it there."""

    def got(self, repo: str) -> set[str]:
        """The files of a repository whose content was asked for."""
        asked = {request.file for request in self.requests if request.method == "GET" and request.repo == repo}
        return asked - {API, REVISION}

    def ranges(self, file: str) -> list[str]:
        """What was asked of the rest of a file, after a part of it."""
        return [request.range for request in self.requests if request.file == file and request.range]


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[HubServer]:
    with HubServer(repos) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def unreachable() -> str:
    """An address at which nothing answers: connections are refused."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        model = r"(?P<repo>[\w.-]+/[\w.-]+)"
        routes = (
            (f"/api/models/{model}", self._hugging_face_model, API),
            (f"/api/models/{model}/revision/main", self._hugging_face_model, REVISION),
            (f"/api/models/{model}/tree/\\w+", self._hugging_face_tree, API),
            (f"/{model}/resolve/\\w+/(?P<file>.+)", self._file, ""),
            (f"/api/v1/models/{model}/repo/files", self._modelscope_files, API),
            (f"/api/v1/models/{model}/repo", self._file, parse_qs(url.query).get("FilePath", [""])[0]),
        )
        for pattern, answer, file in routes:
            if match := re.fullmatch(pattern, url.path):
                return self._answer_about(match["repo"], file or match["file"], answer)
        if url.path == "/xet-token":
            token = {"X-Xet-Cas-Url": f"{self.server.url}/storage", "X-Xet-Access-Token": "token"}
            return self._send(b"", 200, token | {"X-Xet-Token-Expiration": "99999999999"})
        return self._refuse(403 if url.path.startswith("/storage/") else 404)

    def _answer_about(self, name: str, file: str, answer: Callable[[str, Repo, str], None]) -> None:
        self.server.requests.append(Request(self.command, name, file, self.headers["Range"]))
        repo = self.server.repos.get(name)
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif file in repo.errors:
            self._refuse(*repo.errors[file])
        elif file not in (API, REVISION, *repo.files):
            self._refuse(404, "EntryNotFound")
        else:
            answer(name, repo, file)

    # --- what Hugging Face tells of a model

    def _hugging_face_model(self, name: str, repo: Repo, _: str) -> None:
        siblings = [{"rfilename": file} for file in repo.files]
        self._send_json({"id": name, "sha": repo.commit, "siblings": siblings, "private": False, "tags": []})

    def _hugging_face_tree(self, name: str, repo: Repo, _: str) -> None:
        files = repo.files.items()
        self._send_json([{"type": "file", "path": file, "size": len(data), "oid": _sha1(data)} for file, data in files])

    # --- what ModelScope tells of a model

    def _modelscope_files(self, name: str, repo: Repo, _: str) -> None:
        folders = {file.split("/")[0] for file in repo.files if "/" in file}
        entries = [{"Name": folder, "Path": folder, "Type": "tree", "Size": 0} for folder in folders]
        for file, data in repo.files.items():
            sha256 = hashlib.sha256(data).hexdigest()
            entries.append({"Name": file, "Path": file, "Type": "blob", "Size": len(data), "Sha256": sha256})
        self._send_json({"Code": 200, "Success": True, "Data": {"Files": entries}})

    # --- what both send

    def _file(self, name: str, repo: Repo, file: str) -> None:
        data = repo.files[file]
        headers = {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": repo.commit}
        if file in repo.in_storage:
            headers |= {"X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": f"{self.server.url}/xet-token"}
        part = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if part is None:
            return self._send(data, 200, headers, repo.cut.get(file), repo.stalled)
        if file in repo.cut:
            return self._refuse(503)
        start = int(part[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(data[start:], 206, headers)

    def _refuse(self, status: int, code: str = "") -> None:
        body = json.dumps({"Code": status, "Message": "refused", "Success": False}).encode()
        self._send(body, status, {"X-Error-Code": code} if code else {})

    def _send_json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), 200, {"Content-Type": "application/json"})

    def _send(
        self,
        body: bytes,
        status: int,
        headers: dict[str, str],
        cut: int | None = None,
        stalled: threading.Event | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
            if stalled is not None:
                stalled.set()
                self.server.closing.wait()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
