"""The hash that the hub states for a file, and a running hash to hold against it.

Large files are known by their sha256 (Git LFS), small ones by git's own blob id, the sha1 of a header and the
content (git-hash-object(1)). The hub's ETag is the one or the other, and names the blob in its cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

BLOCK_BYTES = 2**20
_FORMS = {"sha256": re.compile(r"[0-9a-f]{64}"), "git-sha1": re.compile(r"[0-9a-f]{40}")}


class RunningHash(Protocol):
    """What hashlib's objects do."""

    def update(self, content: bytes, /) -> None:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""


@dataclass(frozen=True, slots=True)
class ContentHash:
    """A file's hash in lower-case hexadecimal, and its kind. ValueError for anything else."""

    kind: Literal["sha256", "git-sha1"]
    hexadecimal: str

    def __post_init__(self) -> None:
        if not _FORMS[self.kind].fullmatch(self.hexadecimal):
            raise ValueError(f"{self.hexadecimal[:80]!r} is no {self.kind}")

    def start(self, n_bytes: int) -> RunningHash:
        """A hash that has taken in nothing yet of a file of `n_bytes`."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)

    def matches(self, content: bytes) -> bool:
        """Whether this is the hash of `content`."""
        running = self.start(len(content))
        running.update(content)
        return running.hexdigest() == self.hexadecimal


def hash_file(path: Path, kind: Literal["sha256", "git-sha1"]) -> Iterator[int | str]:
    """How many bytes are hashed, after every block, and at last the hash itself. Raises OSError."""
    empty = ContentHash(kind, "0" * (64 if kind == "sha256" else 40))
    with path.open("rb", buffering=0) as file:
        running, done = empty.start(path.stat().st_size), 0
        while block := file.read(BLOCK_BYTES):
            running.update(block)
            done += len(block)
            yield done
    yield running.hexdigest()
