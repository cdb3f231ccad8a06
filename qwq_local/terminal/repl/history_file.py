"""Entries of earlier runs: a private file with one entry a line, shared by every `qwq chat`.

A line is a JSON array in ASCII: typed text and pasted text in turns, typed text first. Lines that cannot
be read, for example after a crash, are skipped. An entry is appended with one write. A file that has
grown too long is rewritten with the newest entries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qwq_local.errors import QwqError
from qwq_local.files import atomic_file, lock_open_file
from qwq_local.paths import make_private

MAX_ENTRIES = 5000
"""The number of entries in the file, at most."""

MAX_ENTRY_BYTES = 64 * 1024
"""The longest line in bytes; a longer entry is not written."""

MAX_BYTES = 16 * 1024 * 1024
"""Only this many bytes at the end of the file are read."""

_SLACK = 500


class HistoryFile:
    """Reads entries of earlier runs and appends new ones. A disk error loses history, nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[list[str]]:
        """Every entry as its parts, oldest first. Shortens a file that has grown too long."""
        try:
            with self._open() as file:
                entries, n_lines = _read(file)
        except (OSError, QwqError):
            return []
        if n_lines > MAX_ENTRIES + _SLACK or self._size() > MAX_BYTES:
            with suppress(OSError):
                self._shorten()
        return entries

    def append(self, parts: list[str]) -> None:
        """Append an entry, given as its parts."""
        line = json.dumps(parts).encode() + b"\n"
        if len(line) > MAX_ENTRY_BYTES:
            return
        with suppress(OSError, QwqError), self._open() as file:
            # After a crash the last line may lack its line end; an empty line does no harm.
            file.write(b"\n" + line if _ends_mid_line(file) else line)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, locked, open for reading and appending. It is created for its owner only."""
        make_private(self._path.parent)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a+b", buffering=0) as file:  # noqa: PTH123
                if not lock_open_file(descriptor, self._path, wait=True):
                    continue  # rewritten by another process while this one waited for the lock
                if os.name == "posix" and os.fstat(descriptor).st_mode & 0o077:
                    os.fchmod(descriptor, 0o600)
                yield file
                return

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def _shorten(self) -> None:
        """Write the newest entries beside the file and rename it, under the file's lock."""
        with self._open() as file:
            entries, _ = _read(file)
            with atomic_file(self._path, mode=0o600, sync=False) as new:
                new.writelines(json.dumps(parts).encode() + b"\n" for parts in entries)


def _read(file: BinaryIO) -> tuple[list[list[str]], int]:
    """The newest entries, oldest first, and the number of lines."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MAX_BYTES))
    lines = b"".join(iter(lambda: file.read(1 << 20), b"")).split(b"\n")
    entries = [parts for line in lines[-MAX_ENTRIES - _SLACK :] if (parts := _parts(line)) is not None]
    return entries[-MAX_ENTRIES:], len(lines)


def _parts(line: bytes) -> list[str] | None:
    """The parts of a line, or None if it is not an entry."""
    if not 2 < len(line) <= MAX_ENTRY_BYTES:
        return None
    try:
        parts = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
        return parts
    return None


def _ends_mid_line(file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"
