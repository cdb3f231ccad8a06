"""A hub on loopback that sends the files of a folder with sendfile.

    python bench/loopback_hub.py FOLDER     prints its address, serves the files of FOLDER as owner/model

Enough of the API for huggingface_hub: model info with sizes and sha256, resolve with ranges and ETags.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_BLOCK = 2**20


@cache
def sha256(path: Path) -> str:
    """The file's hash, computed once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for one folder."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Headers alone."""
        self._answer()

    def do_GET(self) -> None:
        """Headers and bytes."""
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if "/tree/" in path:
            self._json([self._tree_entry(file) for file in sorted(self.folder.iterdir())])
        elif path.startswith("/api/models/"):
            siblings = [self._sibling(file) for file in sorted(self.folder.iterdir())]
            self._json({"id": "owner/model", "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            self._file(self.folder / path.rpartition("/")[2])

    def _sibling(self, file: Path) -> dict[str, object]:
        size = file.stat().st_size
        lfs = {"size": size, "sha256": sha256(file), "pointerSize": 135}
        return {"rfilename": file.name, "size": size, "blobId": "0" * 40, "lfs": lfs}

    def _tree_entry(self, file: Path) -> dict[str, object]:
        size = file.stat().st_size
        lfs = {"size": size, "oid": sha256(file), "pointerSize": 135}
        return {"type": "file", "path": file.name, "size": size, "oid": "0" * 40, "lfs": lfs}

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
            return
        size, etag = path.stat().st_size, sha256(path)
        start, end, status = 0, size, 200
        headers = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        if match := _RANGE.match(self.headers.get("Range", "")):
            start, end, status = int(match[1]), min(size, int(match[2] or size - 1) + 1), 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(status, headers | {"Content-Length": str(end - start)})
        if self.command == "GET":
            with path.open("rb") as file:
                while start < end:
                    start += os.sendfile(
                        self.connection.fileno(), file.fileno(), start, min(_BLOCK, end - start)
                    )

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def main() -> None:
    """Serve until killed."""
    folder = Path(sys.argv[1]).resolve()
    for file in folder.iterdir():
        sha256(file)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"folder": folder}))
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
