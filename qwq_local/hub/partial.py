"""A file that is still arriving: its bytes and the journal of which of them are there, on disk.

Beside the blob it will become lie `<etag>.qwq-partial`, which may have holes, and `<etag>.qwq-journal`: lines
of JSON, the first says what of, the others are spans that are written or the entity tag they came with. Lines
are only appended, so a process killed at any moment leaves at worst one torn line, which is skipped. What is
found after a loss of power may be wrong: the hash of the whole tells.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from qwq_local.errors import PullError
from qwq_local.files import BINARY, PartialFile, append, sync_folder, write_atomically
from qwq_local.hub.ranges import Span, Spans

PARTIAL = ".qwq-partial"
JOURNAL = ".qwq-journal"
FORMAT = 1
MAX_JOURNAL_BYTES = 64 * 2**20
MAX_LINE_CHARS = 1000


class Partial:
    """The bytes of one file so far. Only the holder of the file's lock may open one."""

    def __init__(self, blob: Path, n_bytes: int) -> None:
        """Pick up what an earlier run left for the same blob, or start with nothing. Raises PullError."""
        self.path = partial_path(blob)
        self._journal_path = blob.with_name(blob.name + JOURNAL)
        self._blob = blob
        self.n_bytes = n_bytes
        self.done = Spans()
        self.etag = ""
        self._journal = -1
        try:
            blob.parent.mkdir(parents=True, exist_ok=True)
            self._read_journal()
            self._file = PartialFile(self.path)
            try:
                self._keep(self._file.n_bytes)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise self._cannot_write(error) from None

    def write(self, position: int, content: bytes) -> None:
        """Put bytes at their place. Raises PullError when the disk does not take them."""
        try:
            self._file.write(content, position)
        except OSError as error:
            raise self._cannot_write(error) from None

    def read(self, start: int, n_bytes: int) -> bytes:
        """At most `n_bytes` that were written from `start` on. Raises PullError when the disk fails."""
        try:
            return self._file.read(n_bytes, start)
        except OSError as error:
            raise PullError(f"{self.path} cannot be read ({error.strerror}).") from None

    def record(self, span: Span) -> None:
        """Note that the bytes of a span are written, so that no later run fetches them."""
        self.done.add(span)
        self._append([span.start, span.end])

    def record_etag(self, etag: str) -> None:
        """Note the entity tag that the bytes come with."""
        self.etag = etag
        self._append({"etag": etag})

    def restart(self) -> None:
        """Forget everything that came."""
        self.done, self.etag = Spans(), ""
        try:
            self._file.truncate(0)
            self._rewrite_journal()
        except OSError as error:
            raise self._cannot_write(error) from None

    def publish(self) -> None:
        """Bring the bytes to the disk and give them the blob's name, in place of what had it before."""
        try:
            self._file.sync()
            self.close()
            self._file.publish(self._blob)
            self._journal_path.unlink(missing_ok=True)
            sync_folder(self._blob.parent)
        except OSError as error:
            raise self._cannot_write(error) from None

    def remove(self) -> None:
        """Delete partial file and journal."""
        self.close()
        remove_partial(self.path)

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        self._file.close()
        self._close_journal()

    def _keep(self, file_bytes: int) -> None:
        """Trust the journal no further than the file reaches, and write it anew without its torn line."""
        reach = [Span(span.start, min(span.end, file_bytes)) for span in self.done]
        self.done = Spans(span for span in reach if span.n_bytes > 0)
        if not self.done:
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
        # The last piece is empty, or a line that was torn.
        entries = [_entry(line) for line in lines[:-1]]
        if not entries or entries[0] != {"qwq-pull": FORMAT, "n_bytes": self.n_bytes}:
            return
        for entry in entries[1:]:
            if isinstance(entry, dict):
                etag = entry.get("etag")
                self.etag = etag if isinstance(etag, str) and etag.isprintable() else ""
            elif (span := _span(entry, self.n_bytes)) is not None:
                self.done.add(span)

    def _rewrite_journal(self) -> None:
        entries: list[object] = [{"qwq-pull": FORMAT, "n_bytes": self.n_bytes}]
        if self.etag:
            entries.append({"etag": self.etag})
        entries += [[span.start, span.end] for span in self.done]
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
        try:
            append(self._journal, (json.dumps(entry) + "\n").encode())
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> PullError:
        return PullError(
            f"{self.path.parent} cannot be written ({error.strerror}). What came is kept: "
            "free some space or set HF_HUB_CACHE to a folder on another disk, and run the command again."
        )


def partial_path(blob: Path) -> Path:
    """Where the bytes of a blob lie while it arrives."""
    return blob.with_name(blob.name + PARTIAL)


def remove_partial(path: Path) -> None:
    """Delete a partial file and what belongs to it; what is gone already is no error."""
    stem = path.name.removesuffix(PARTIAL)
    for name in (path.name, stem + JOURNAL, stem + JOURNAL + ".new"):
        path.with_name(name).unlink(missing_ok=True)


def _entry(line: str) -> object:
    if len(line) > MAX_LINE_CHARS:
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _span(entry: object, n_bytes: int) -> Span | None:
    match entry:
        case [int(start), int(end)] if 0 <= start < end <= n_bytes:
            return Span(start, end)
    return None
