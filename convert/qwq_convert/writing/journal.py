"""What a conversion has finished in, a small file that survives it out; and back again in the next run.

One line of JSON each: first which conversion it is, then every tensor whose bytes are on the disk for good,
last that only the renaming is left. Each carries a check sum over itself and the conversion; a line that is
torn, damaged or of another conversion counts as not written. Knows no tensor data.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwq_convert.writing.positioned import BINARY

VERSION = 1
MAX_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Record:
    """What an earlier run left: which conversion it was, its finished tensors, whether all was verified."""

    conversion: str
    finished: frozenset[str]
    whole: bool


def read_journal(path: Path) -> Record | None:
    """What the journal at `path` tells; None when there is none or it makes no sense."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    # What follows the last line end was not written whole.
    entries = [_parse(line) for line in lines[:-1]]
    conversion = str(entries[0].get("conversion")) if entries else ""
    entries = [entry for entry in entries if entry == _checked(conversion, entry)]
    if not entries or entries[0].get("version") != VERSION:
        return None
    return Record(
        conversion,
        frozenset(str(entry["tensor"]) for entry in entries if "tensor" in entry),
        any(entry.get("whole") is True for entry in entries),
    )


class Journal:
    """The journal of a running conversion, open for appending."""

    def __init__(self, path: Path, conversion: str, *, goes_on: bool) -> None:
        """Begin a new journal, or go on with the one that is there. Raises OSError."""
        self.path = path
        self._conversion = conversion
        flags = os.O_RDWR | os.O_CREAT | BINARY | (0 if goes_on else os.O_TRUNC)
        self._fd = os.open(path, flags, 0o666)
        try:
            if goes_on:
                self._drop_torn_line()
            else:
                self._append([{"version": VERSION, "conversion": conversion}])
        except BaseException:
            self.close()
            raise

    def finished(self, names: Iterable[str]) -> None:
        """Note tensors whose bytes are on the disk for good. Raises OSError."""
        self._append([{"tensor": name} for name in names])

    def whole(self) -> None:
        """Note that everything is on the disk and verified. Raises OSError."""
        self._append([{"whole": True}])

    def close(self) -> None:
        """Close the file and keep it."""
        os.close(self._fd)

    def _append(self, entries: list[dict[str, object]]) -> None:
        checked = (_checked(self._conversion, entry) for entry in entries)
        content = b"".join(json.dumps(entry).encode() + b"\n" for entry in checked)
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            while content:
                content = content[os.write(self._fd, content) :]
            os.fsync(self._fd)
        except OSError:
            # A full disk takes half a line; the next run must not read it joined to another.
            os.ftruncate(self._fd, end)
            raise

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        os.ftruncate(self._fd, content.rfind(b"\n") + 1)


def _checked(conversion: str, entry: Mapping[str, object]) -> dict[str, object]:
    """The entry with its check sum, which is another one in the journal of another conversion."""
    content = {key: value for key, value in entry.items() if key != "check"}
    return content | {"check": zlib.crc32(json.dumps([conversion, content]).encode())}


def _parse(line: bytes) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
