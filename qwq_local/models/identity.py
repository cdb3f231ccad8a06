"""Which weights a model file has: by header, size and time at once, by the SHA-256 of its content later.

The caches of Hugging Face and ollama name a file by its SHA-256. For any other file it is computed once, in
the background, and stored under the file's device, inode, size and time. A file that changes gets another
time, so an old SHA-256 is never used for it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from qwq_local.engine.kv_entry import ModelIdentity
from qwq_local.errors import QwqError
from qwq_local.files import write_atomically
from qwq_local.models.catalog import SHA256, blob_sha256
from qwq_local.models.header import Header
from qwq_local.paths import make_private

_PIECE_BYTES = 1 << 23
# After each piece the worker rests this many times as long as the piece took: the machine is answering.
_REST = 3
_LOWEST_PRIORITY = 19


class ModelIdentities:
    """Identities of model files. Computed digests are stored under `folder`. `close` stops the computing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._headers: dict[tuple[str, ...], str] = {}
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None

    def of(self, header: Header) -> ModelIdentity:
        """The identity of a model. Raises OSError when a file is gone."""
        keys = tuple(_file_key(part.path) for part in header.parts)
        if keys not in self._headers:
            self._headers[keys] = header_sha256(header)
        return ModelIdentity(self._headers[keys], self._content([part.path for part in header.parts]))

    def learn(self, header: Header) -> None:
        """Start to compute missing digests of the content in the background."""
        missing = [part.path for part in header.parts if not self._known(part.path)]
        if missing and self._worker is None:
            self._worker = threading.Thread(target=self._learn, args=(missing,), name="sha256", daemon=True)
            self._worker.start()

    def record(self, path: Path, sha256: str) -> None:
        """Store the SHA-256 of a file, for example after a verified download."""
        with suppress(OSError, QwqError):
            folder = make_private(self._folder)
            write_atomically(folder / _file_key(path), sha256.encode(), mode=0o600, sync=False)

    def close(self) -> None:
        """Stop computing. An unfinished digest starts over in the next run."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()

    def _content(self, paths: list[Path]) -> str:
        """The SHA-256 of a file, or of the SHA-256s of several; empty unless all are known."""
        known = [self._known(path) for path in paths]
        if not all(known):
            return ""
        return known[0] if len(known) == 1 else hashlib.sha256("".join(known).encode()).hexdigest()

    def _known(self, path: Path) -> str:
        if named := blob_sha256(path):
            return named
        try:
            with (self._folder / _file_key(path)).open("rb") as file:
                text = file.read(65).decode("ascii", "replace")
        except OSError:
            return ""
        return text if SHA256.fullmatch(text) else ""

    def _learn(self, paths: list[Path]) -> None:
        if sys.platform == "linux":
            # Only Linux gives a thread its own priority.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        for path in paths:
            with suppress(OSError):
                key = _file_key(path)
                sha256 = self._sha256(path)
                if sha256 and _file_key(path) == key:
                    self.record(path, sha256)

    def _sha256(self, path: Path) -> str:
        """The SHA-256 of the content; empty after `close`."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        with path.open("rb", buffering=0) as file:
            began = time.monotonic()
            while n_read := file.readinto(buffer):
                digest.update(buffer[:n_read])
                if self._stop.wait(_REST * (time.monotonic() - began)):
                    return ""
                began = time.monotonic()
        return digest.hexdigest()


def header_sha256(header: Header) -> str:
    """A SHA-256 over the header, size and time of every part."""
    digest = hashlib.sha256()
    for part in header.parts:
        status = part.path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        with part.path.open("rb") as file:
            digest.update(file.read(part.data_start))
    return digest.hexdigest()


def _file_key(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
