"""A hub on loopback: enough of the API for the unmodified huggingface_hub client, with faults on request.

Files are behind a redirect to a second server ("storage"), like large files on the real hub. All
requests and the number of bytes sent are recorded.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 64 * 1024
_RANGE = re.compile(r"bytes=(\d+)-(\d+)?")

Headers = dict[str, str]


@dataclass
class Asked:
    """A request, and what was sent for it."""

    server: str
    method: str
    path: str
    headers: Headers
    status: int = 0
    sent: int = 0


@dataclass
class Reply:
    """The planned reply of the storage; a fault changes it."""

    status: int
    headers: Headers
    body: memoryview
    start: int
    cut_after: int | None = None


Fault = Callable[[Reply], None]


@dataclass
class StoredFile:
    """A file of the repository; `stated` is the content that the API claims, if it differs."""

    content: bytes
    is_large: bool = True
    stated: bytes | None = None
    etag: str | None = None
    stated_size: int | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content if self.stated is None else self.stated).hexdigest()

    @property
    def git_sha1(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def hub_etag(self) -> str:
        return self.sha256 if self.is_large else self.git_sha1


@dataclass
class LocalHub:
    """Repositories by name, each with its files; `faults` are used up by the storage's answers, in order.

    `api_faults` are statuses (with headers) that the hub itself answers first. `hold_at` stops sending after
    that many bytes in all, and sets `held`. Nothing is sent before `least_open` connections are open at once.
    """

    repos: dict[str, dict[str, StoredFile]]
    faults: list[Fault] = field(default_factory=list)
    api_faults: list[tuple[int, Headers, bytes]] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    loops: bool = False
    asked: list[Asked] = field(default_factory=list)
    hold_at: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    on_storage_request: Callable[[int], None] = lambda _number: None
    least_open: int = 1
    enough_open: threading.Event = field(default_factory=threading.Event)
    commit: str = COMMIT
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    n_open: int = 0
    most_open: int = 0

    @property
    def sent(self) -> int:
        """How many bytes of files the storage has sent."""
        return sum(asked.sent for asked in self.asked)

    def storage_requests(self) -> list[Asked]:
        """The requests for bytes that reached the storage."""
        return [asked for asked in self.asked if asked.server == "storage"]

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve on two free ports; the address for HF_ENDPOINT."""
        hub, storage = self._server("hub"), self._server("storage")
        self.storage_url = f"http://127.0.0.1:{storage.server_address[1]}"
        self.hub_url = f"http://127.0.0.1:{hub.server_address[1]}"
        for server in (hub, storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self.hub_url
        finally:
            self.released.set()
            self.enough_open.set()
            for server in (hub, storage):
                server.shutdown()
                server.server_close()

    def _server(self, kind: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "kind": kind})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.block_on_close = False
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    kind: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.kind, self.command, self.path, headers)
        with self.hub.lock:
            self.hub.asked.append(asked)
        if self.kind == "storage":
            self._storage(asked)
        else:
            self._hub(asked)

    def _hub(self, asked: Asked) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            fault = self.hub.api_faults.pop(0) if self.hub.api_faults else None
        if fault is not None:
            return self._send(asked, fault[0], fault[1], fault[2])
        if path == "/api/models":
            wanted = parse_qs(urlsplit(self.path).query).get("search", [""])[0].lower()
            found = [{"id": repo} for repo in self.hub.repos if wanted[:4] in repo.lower()]
            return self._json(asked, found)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._model_info(asked, match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(asked, match[1], match[3])
        return self._refuse(asked, 404, "EntryNotFound")

    def _model_info(self, asked: Asked, repo: str) -> None:
        if repo not in self.hub.repos:
            return self._refuse(asked, 401, "RepoNotFound")
        if not self._may_read(asked, repo):
            return self._refuse(asked, 403, "GatedRepo")
        siblings = []
        for name, file in self.hub.repos[repo].items():
            size = len(file.content) if file.stated_size is None else file.stated_size
            entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": file.git_sha1}
            if file.is_large:
                entry["lfs"] = {"size": size, "sha256": file.sha256, "pointerSize": 135}
            siblings.append(entry)
        return self._json(asked, {"id": repo, "sha": self.hub.commit, "siblings": siblings, "tags": []})

    def _resolve(self, asked: Asked, repo: str, name: str) -> None:
        file = self.hub.repos.get(repo, {}).get(name)
        if file is None:
            return self._refuse(asked, 404, "EntryNotFound")
        if not self._may_read(asked, repo):
            return self._refuse(asked, 403, "GatedRepo")
        headers = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{file.hub_etag}"'}
        if not file.is_large:
            return self._send(asked, 200, headers, file.content)
        headers |= {
            "X-Linked-Etag": f'"{file.hub_etag}"',
            "X-Linked-Size": str(len(file.content)),
            "Location": self.path if self.hub.loops else f"{self.hub.storage_url}/{repo}/{name}?signature=1",
        }
        return self._send(asked, 302, headers, b"")

    def _may_read(self, asked: Asked, repo: str) -> bool:
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        return repo not in self.hub.gated or token == self.hub.token

    def _storage(self, asked: Asked) -> None:
        repo, _, name = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        owner_repo, name = f"{repo}/{name.partition('/')[0]}", name.partition("/")[2]
        self.hub.on_storage_request(len(self.hub.storage_requests()))
        file = self.hub.repos[owner_repo][name]
        etag = file.etag or f'"{hashlib.sha256(file.content).hexdigest()[:32]}"'
        reply = _planned(file.content, etag, asked.headers)
        with self.hub.lock:
            if self.hub.faults:
                self.hub.faults.pop(0)(reply)
            self.hub.n_open += 1
            self.hub.most_open = max(self.hub.most_open, self.hub.n_open)
            if self.hub.n_open >= self.hub.least_open:
                self.hub.enough_open.set()
        self.hub.enough_open.wait()
        try:
            self._send_file(asked, reply)
        finally:
            with self.hub.lock:
                self.hub.n_open -= 1

    def _send_file(self, asked: Asked, reply: Reply) -> None:
        asked.status = reply.status
        self.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(reply.body) if reply.cut_after is None else reply.cut_after
        for start in range(0, end, PIECE):
            piece = reply.body[start : min(start + PIECE, end)]
            self._maybe_hold(len(piece))
            self.wfile.write(piece)
            with self.hub.lock:
                asked.sent += len(piece)
        if reply.cut_after is not None:
            self.close_connection = True

    def _maybe_hold(self, n_bytes: int) -> None:
        with self.hub.lock:
            holds = self.hub.hold_at is not None and self.hub.sent + n_bytes > self.hub.hold_at
        if holds:
            self.hub.held.set()
            self.hub.released.wait()
            raise ConnectionAbortedError

    def _refuse(self, asked: Asked, status: int, code: str) -> None:
        self._send(asked, status, {"X-Error-Code": code}, b"{}")

    def _json(self, asked: Asked, content: object) -> None:
        self._send(asked, 200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send(self, asked: Asked, status: int, headers: Headers, body: bytes) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _planned(content: bytes, etag: str, headers: Headers) -> Reply:
    match = _RANGE.fullmatch(headers.get("range", ""))
    same = headers.get("if-range", etag) == etag
    if match is None or not same:
        return Reply(200, {"ETag": etag}, memoryview(content), 0)
    start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if start > end:
        return Reply(416, {"Content-Range": f"bytes */{len(content)}"}, memoryview(b""), 0)
    stated = {"ETag": etag, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
    return Reply(206, stated, memoryview(content)[start : end + 1], start)


def fine(_: Reply) -> None:
    """No fault: lets one answer pass."""


def cut(after: int) -> Fault:
    """The connection ends after `n_bytes` of the body."""

    def change(reply: Reply) -> None:
        reply.cut_after = min(after, len(reply.body))

    return change


def wrong_bytes(reply: Reply) -> None:
    """One byte is changed."""
    body = bytearray(reply.body)
    body[len(body) // 2] ^= 1
    reply.body = memoryview(bytes(body))


def status(number: int, **headers: str) -> Fault:
    """Another status and no file."""

    def change(reply: Reply) -> None:
        reply.status, reply.body = number, memoryview(b"")
        reply.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    return change


def web_page(reply: Reply) -> None:
    """A login page instead of the file."""
    reply.status, reply.body = 200, memoryview(b"<html>Please log in</html>")
    reply.headers = {"Content-Type": "text/html; charset=utf-8"}


def longer(reply: Reply) -> None:
    """The storage states one byte more than there are."""
    stated = reply.headers["Content-Range"]
    head, _, total = stated.rpartition("/")
    reply.headers["Content-Range"] = f"{head}/{int(total) + 1}"


def another_range(reply: Reply) -> None:
    """The reply is for another range than requested."""
    reply.headers["Content-Range"] = "bytes 7-8/" + reply.headers["Content-Range"].rpartition("/")[2]


def whole_files_only(content: bytes) -> Fault:
    """Ranges are ignored."""

    def change(reply: Reply) -> None:
        reply.status, reply.body, reply.start = 200, memoryview(content), 0
        reply.headers.pop("Content-Range", None)

    return change
