"""The folder of the KV store: entries found, the least recently used thrown away to make room for new ones.

There is no index: the entries are the index, so that two processes at once and a kill at any moment leave
nothing torn. Every entry appears whole by a rename; whatever is not one is removed. Knows no llama.cpp.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qwq_local.engine.kv_entry import SUFFIX, DamagedEntry, Entry, read_entry
from qwq_local.files import free_bytes, remove_quietly
from qwq_local.paths import make_private
from qwq_local.text import GIB, binary_size

_ENTRY_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
_HALF_WRITTEN = ".saving-"
# A file that is being written is younger than this at any time; an older one was left by a killed process.
_ABANDONED_S = 600
_SHARE_OF_FREE_DISK = 10


class NoRoom(Exception):
    """An entry would take more than the store may have; the text says what stands against it."""


@dataclass(frozen=True, slots=True)
class KvFolder:
    """The entries under `path`, which is made private to the user when there is something to write.

    `limit_bytes` None means a tenth of the disk that would be free without the store.
    """

    path: Path
    limit_bytes: int | None = None

    def entries(self, *, remove_damaged: bool = True) -> list[Entry]:
        """Every entry whose trailer fits it, last used first; what only bears the name of one is removed."""
        found = []
        for path in self._files(_ENTRY_NAME.fullmatch):
            try:
                found.append(read_entry(path))
            except DamagedEntry:
                if remove_damaged:
                    remove_quietly(path)
            except OSError:  # another process has just removed it
                continue
        return sorted(found, key=lambda entry: entry.used_s, reverse=True)

    def limit(self) -> int:
        """The bytes that the store may take up. Raises OSError."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        used = sum(entry.file_bytes for entry in self.entries(remove_damaged=False))
        return (free_bytes(self.path) + used) // _SHARE_OF_FREE_DISK

    def make_room(self, n_bytes: int) -> None:
        """Remove entries, least recently used first, until `n_bytes` more are within the limit.

        Raises NoRoom, with nothing removed for it, when they never are, and OSError.
        """
        make_private(self.path)
        self.remove_abandoned()
        limit, entries = self.limit(), self.entries()
        if n_bytes > limit:
            raise NoRoom(f"the KV store may have {binary_size(limit)} (--set kv_store=GIB)")
        used = sum(entry.file_bytes for entry in entries)
        while entries and used + n_bytes > limit:
            oldest = entries.pop()
            remove_quietly(oldest.path)
            used -= oldest.file_bytes
        free = free_bytes(self.path)
        if n_bytes > free:
            raise NoRoom(f"the disk has {binary_size(free)} left")

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """An empty file of this user alone to write an entry into; gone afterwards unless it was renamed."""
        make_private(self.path)
        descriptor, name = tempfile.mkstemp(prefix=_HALF_WRITTEN, dir=self.path)
        os.close(descriptor)
        try:
            yield Path(name)
        finally:
            remove_quietly(Path(name))

    def remove_abandoned(self, older_s: float = _ABANDONED_S) -> None:
        """Remove what killed processes left half-written."""
        for path in self._files(lambda name: name.startswith(_HALF_WRITTEN)):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > older_s:
                    path.unlink()

    def _files(self, is_wanted: Callable[[str], object]) -> Iterator[Path]:
        try:
            listed = list(os.scandir(self.path))
        except OSError:  # there is no store yet
            return
        for item in listed:
            if is_wanted(item.name) and item.is_file(follow_symlinks=False):
                yield Path(item.path)


def kv_folder(cache: Path, limit_gib: float | None = None) -> KvFolder:
    """The store of a user whose cache lies there; None as in KvFolder."""
    return KvFolder(cache / "kv", None if limit_gib is None else int(limit_gib * GIB))


def touch(path: Path) -> None:
    """Note that an entry was used now."""
    with suppress(OSError):
        os.utime(path)
