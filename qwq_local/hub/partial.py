"""A blob that is not complete yet: its bytes and the journal of what is there, both on disk.

`<etag>.qwq-partial` has the bytes and may have holes. `<etag>.qwq-journal` has lines of JSON: the first says
which blob it is for, each further one is a range that was written, or the entity tag of the bytes. Lines are
only appended, so a process that is killed leaves at most one torn line, which the next run skips. After a
power failure the journal may be ahead of the bytes; then the hash of the whole file is wrong, and the file is
fetched again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwq_local.errors import PullError
from qwq_local.files import BINARY, PartialFile, append, sync_folder, write_atomically
from qwq_local.hub.cache import JOURNAL, partial_path, remove_partial
from qwq_local.hub.transfer import ByteRange, ByteRanges

FORMAT = 1
MAX_JOURNAL_BYTES = 64 * 2**20
MAX_LINE_CHARS = 1000


class PartialBlob:
    """The bytes of one blob so far. Only the process that holds the blob's lock may open one.

    `done` are the ranges that are here, `etag` is the entity tag that they came with.
    """

    def __init__(self, blob: Path, n_bytes: int) -> None:
        """Continue with what an earlier run left for the same blob, or start empty. Raises PullError."""
        self.path = partial_path(blob)
        self._journal_path = blob.with_name(blob.name + JOURNAL)
        self._blob = blob
        self.n_bytes = n_bytes
        self.done = ByteRanges()
        self.etag = ""
        self._journal = -1
        with self._disk_errors():
            blob.parent.mkdir(parents=True, exist_ok=True)
            self._read_journal()
            self._file = PartialFile(self.path)
            try:
                self._check_against_file()
            except BaseException:
                self.close()
                raise

    def write(self, offset: int, content: bytes) -> None:
        """Write bytes at their place. Raises PullError when the disk refuses them."""
        with self._disk_errors():
            self._file.write(content, offset)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Up to `n_bytes` of what was written at `offset`. Raises PullError when the disk fails."""
        try:
            return self._file.read(n_bytes, offset)
        except OSError as error:
            raise PullError(f"{self.path} cannot be read ({error.strerror}).") from None

    def record(self, written: ByteRange) -> None:
        """Note a range as written, so that no later run fetches it."""
        self.done.add(written)
        self._append([written.start, written.end])

    def record_etag(self, etag: str) -> None:
        """Note the entity tag that the bytes come with."""
        self.etag = etag
        self._append({"etag": etag})

    def restart(self) -> None:
        """Drop everything that came."""
        self.done, self.etag = ByteRanges(), ""
        with self._disk_errors():
            self._file.truncate(0)
            self._rewrite_journal()

    def publish(self) -> None:
        """Sync the bytes to the disk and give them the blob's name, in place of a blob that is there."""
        with self._disk_errors():
            self._file.sync()
            self.close()
            self._file.publish(self._blob)
            self._journal_path.unlink(missing_ok=True)
            sync_folder(self._blob.parent)

    def remove(self) -> None:
        """Delete the bytes and the journal."""
        self.close()
        remove_partial(self.path)

    def close(self) -> None:
        """Close both files and keep them. A second call does nothing."""
        self._file.close()
        self._close_journal()

    def _check_against_file(self) -> None:
        """Drop ranges beyond the end of the file, and rewrite the journal without a torn line."""
        file_bytes = self._file.n_bytes
        self.done = ByteRanges(ByteRange(each.start, min(each.end, file_bytes)) for each in self.done)
        if not self.done.n_bytes:
            self.etag = ""
            self._file.truncate(0)
        self._rewrite_journal()

    def _read_journal(self) -> None:
        try:
            if self._journal_path.stat().st_size > MAX_JOURNAL_BYTES:
                return
            lines = self._journal_path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return
        # The last piece is empty or torn.
        entries = [_entry(line) for line in lines[:-1]]
        if not entries or entries[0] != {"qwq-pull": FORMAT, "n_bytes": self.n_bytes}:
            return
        for entry in entries[1:]:
            if isinstance(entry, dict):
                etag = entry.get("etag")
                self.etag = etag if isinstance(etag, str) and etag.isprintable() else ""
            elif (written := _range(entry, self.n_bytes)) is not None:
                self.done.add(written)

    def _rewrite_journal(self) -> None:
        entries: list[object] = [{"qwq-pull": FORMAT, "n_bytes": self.n_bytes}]
        if self.etag:
            entries.append({"etag": self.etag})
        entries += [[each.start, each.end] for each in self.done]
        content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        self._close_journal()
        beside = self._journal_path.with_name(f"{self._journal_path.name}.new")
        write_atomically(self._journal_path, content, beside=beside, sync=False)
        self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_APPEND | BINARY)

    def _close_journal(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _append(self, entry: object) -> None:
        with self._disk_errors():
            append(self._journal, (json.dumps(entry) + "\n").encode())

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PullError(
                f"{self.path.parent} cannot be written ({error.strerror}). What came is kept: "
                "free some space or set HF_HUB_CACHE to a folder on another disk, and run the command again."
            ) from None


def _entry(line: str) -> object:
    if len(line) > MAX_LINE_CHARS:
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _range(entry: object, n_bytes: int) -> ByteRange | None:
    match entry:
        case [int(start), int(end)] if 0 <= start < end <= n_bytes:
            return ByteRange(start, end)
    return None
