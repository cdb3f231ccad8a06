"""The files that a conversion writes: whole under their final names, or partial with a journal.

The journal beside the first partial file names the tensors that are on the disk for good. The next run of the
same conversion continues after them. Files get their final names when all are whole, verified and synced.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwq_convert import ggml
from qwq_convert.disk import partial_path, write_errors
from qwq_convert.layout import PlannedFile, PlannedTensor
from qwq_local.errors import ConvertError
from qwq_local.files import BINARY, PartialFile, allocated_bytes, append, sync_folder
from qwq_local.files import free_bytes as free_bytes_of

GIB, MIB = 2**30, 2**20
JOURNAL_VERSION = 1
MAX_JOURNAL_BYTES = 2**26
_PART = re.compile(r"-\d{5}-of-\d{5}(?=(\.gguf)?$)")


def journal_path(files: Sequence[PlannedFile]) -> Path:
    """Where the journal of a conversion to `files` is."""
    return partial_path(files[0].path).with_suffix(".partial.journal")


def check_output(
    files: Sequence[PlannedFile], fingerprint: str, free_bytes: Callable[[Path], int] = free_bytes_of
) -> None:
    """Raises ConvertError when the files' names are taken or their folder lacks room for them."""
    folder = files[0].path.parent
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder. Create it or write elsewhere.")
    if not _only_names_are_missing(read_journal(journal_path(files)), files, fingerprint):
        _check_names(files)
    # The run continues or overwrites what an interrupted one left.
    reused = [path for file in files for path in (partial_path(file.path), file.path)]
    free = free_bytes(folder) + sum(map(allocated_bytes, [*reused, *_split_differently(files)]))
    needed = sum(file.n_bytes for file in files)
    if free < needed:
        sizes = [f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / MIB:.1f} MiB" for n in (needed, free)]
        raise ConvertError(
            f"{folder}: needs {sizes[0]}, {sizes[1]} free. Free some space or write to another disk."
        )


class ConversionOutput:
    """The files of one conversion while they are written. A context manager; other processes are locked out.

    `finished` are the tensors that an earlier run left whole. `started_over` says that the files on the disk
    were those of another conversion.
    """

    def __init__(self, files: Sequence[PlannedFile], fingerprint: str, record_every_s: float) -> None:
        """Touches no file before the context is entered. The journal grows every `record_every_s` seconds."""
        self._files = files
        self._fingerprint = fingerprint
        self._record_every_s = record_every_s
        self._partials: list[tuple[PlannedFile, PartialFile]] = []
        self._journal: Journal | None = None
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: Future[None] | None = None
        self._unsynced: list[str] = []
        self._may_record = True
        self._last_sync = time.monotonic()
        self.finished: frozenset[str] = frozenset()
        self.started_over = False

    def __enter__(self) -> ConversionOutput:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # An error that is already being raised matters more than one of the last record.
        with suppress(ConvertError):
            self._sync_all()
        self._close()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the files are now."""
        partials = [partial_path(file.path) for file in self._files]
        return tuple(p if p.exists() else file.path for p, file in zip(partials, self._files, strict=True))

    def writer_of(self, number: int, tensor: PlannedTensor) -> Callable[[int, ggml.Bytes], None]:
        """A function that writes bytes at a place of `tensor` in file `number`; threads may share it."""
        planned, partial = self._partials[number]
        start = len(planned.header) + tensor.offset

        def write(offset: int, content: ggml.Bytes) -> None:
            with write_errors(partial.path):
                partial.write(content.data, start + offset)

        return write

    def mark_finished(self, name: str) -> None:
        """Note that the tensor `name` is written whole; the journal names it when the disk has it."""
        self._unsynced.append(name)
        is_idle = self._syncing is None or self._syncing.done()
        if is_idle and time.monotonic() - self._last_sync >= self._record_every_s:
            self._wait()
            self._syncing = self._syncer.submit(self._sync, self._unsynced)
            self._unsynced, self._last_sync = [], time.monotonic()

    def publish(self) -> int:
        """Give the files their names, once they are whole; returns their size in bytes."""
        self._sync_all()
        # Hours have passed since the first check. A file that appeared meanwhile is not overwritten.
        _check_names([planned for planned, _ in self._partials])
        if self._journal is not None:
            with write_errors(self._journal.path):
                self._journal.append({"whole": True})
        # The first part last: it is the one that people open.
        for planned, partial in reversed(self._partials):
            with write_errors(partial.path):
                partial.publish(planned.path)
        folder = self._files[0].path.parent
        with write_errors(folder):
            sync_folder(folder)
        journal_path(self._files).unlink(missing_ok=True)
        return sum(file.n_bytes for file in self._files)

    def _open(self) -> None:
        path = journal_path(self._files)
        record = read_journal(path)
        was_there = _length_of(partial_path(self._files[0].path)) > 0
        only_names_are_missing = _only_names_are_missing(record, self._files, self._fingerprint)
        for file in self._files:
            if not only_names_are_missing or partial_path(file.path).exists():
                self._partials.append((file, _locked(partial_path(file.path))))
        # From here on no other process writes. One that wrote until now may have changed the journal.
        if read_journal(path) != record:
            raise ConvertError(f"{path}: another process was writing it. Run the same command again.")
        names = frozenset(tensor.name for file in self._files for tensor in file.layout.tensors)
        if only_names_are_missing:
            self.finished = names
            return
        _check_names(self._files)
        is_same = record is not None and record.conversion == self._fingerprint
        is_whole = all(planned.n_bytes == partial.n_bytes for planned, partial in self._partials)
        if record is not None and is_same and record.finished and is_whole:
            self.finished = record.finished & names
            with write_errors(path):
                self._journal = Journal(path, self._fingerprint, is_new=False)
            return
        self.started_over = was_there and not is_same
        # The new journal first: the old one names bytes that are about to be overwritten.
        with write_errors(path):
            self._journal = Journal(path, self._fingerprint, is_new=True)
        # Each file is its header and zeros: old content is gone, and padding need not be written.
        for planned, partial in self._partials:
            with write_errors(partial.path):
                partial.truncate(0)
                partial.truncate(planned.n_bytes)
                partial.write(planned.header, 0)
        for other in _split_differently(self._files):
            _locked(other).remove()
            other.with_suffix(".partial.journal").unlink(missing_ok=True)
            self.started_over = True

    def _sync(self, names: Sequence[str]) -> None:
        if not names or self._journal is None or not self._may_record:
            return
        # After one failed sync the next may succeed although the disk has lost what it was given.
        self._may_record = False
        for _, partial in self._partials:
            with write_errors(partial.path):
                partial.sync()
        with write_errors(self._journal.path):
            self._journal.append(*({"tensor": name} for name in names))
        self._may_record = True

    def _wait(self) -> None:
        """Wait for the sync in the background, whose error is raised once."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _sync_all(self) -> None:
        self._wait()
        names, self._unsynced = self._unsynced, []
        self._sync(names)

    def _close(self) -> None:
        """Keep what the next run can continue from, and nothing else."""
        self._syncer.shutdown()
        if self._journal is not None:
            self._journal.close()
        path = journal_path(self._files)
        record = read_journal(path)
        is_worth_keeping = record is not None and (record.finished or record.whole)
        if self._partials and not is_worth_keeping:
            path.unlink(missing_ok=True)
        for _, partial in self._partials:
            partial.close() if is_worth_keeping else partial.remove()


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """What an earlier run left: which conversion it was, its finished tensors, whether all was verified."""

    conversion: str
    finished: frozenset[str]
    whole: bool


def read_journal(path: Path) -> JournalRecord | None:
    """The content of the journal at `path`; None when there is none or it is unreadable."""
    try:
        if path.stat().st_size > MAX_JOURNAL_BYTES:
            return None
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    # Whatever follows the last line end was not written whole.
    entries = [_parse(line) for line in lines[:-1]]
    conversion = str(entries[0].get("conversion")) if entries else ""
    entries = [entry for entry in entries if entry == _checked(conversion, entry)]
    if not entries or entries[0].get("version") != JOURNAL_VERSION:
        return None
    return JournalRecord(
        conversion,
        frozenset(str(entry["tensor"]) for entry in entries if "tensor" in entry),
        any(entry.get("whole") is True for entry in entries),
    )


class Journal:
    """The journal of a running conversion, open for appending.

    Each line is a JSON object: first which conversion it is, then every tensor whose bytes are on the disk
    for good, last that only the renaming is left. It carries a check sum of itself and the conversion. A line
    that is torn, damaged or of another conversion counts as not written.
    """

    def __init__(self, path: Path, conversion: str, *, is_new: bool) -> None:
        """Begin a new journal, or continue the one on the disk. Raises OSError."""
        self.path = path
        self._conversion = conversion
        flags = os.O_RDWR | os.O_CREAT | BINARY | (os.O_TRUNC if is_new else 0)
        self._fd = os.open(path, flags, 0o666)
        try:
            if is_new:
                self.append({"version": JOURNAL_VERSION, "conversion": conversion})
            else:  # drop a torn line
                os.ftruncate(self._fd, path.read_bytes().rfind(b"\n") + 1)
        except BaseException:
            self.close()
            raise

    def append(self, *entries: Mapping[str, object]) -> None:
        """Add lines, and wait until the disk has them. Raises OSError."""
        checked = (_checked(self._conversion, entry) for entry in entries)
        append(self._fd, b"".join(json.dumps(entry).encode() + b"\n" for entry in checked), sync=True)

    def close(self) -> None:
        """Close the file and keep it."""
        os.close(self._fd)


def _checked(conversion: str, entry: Mapping[str, object]) -> dict[str, object]:
    """The entry with its check sum, which differs in the journal of another conversion."""
    content = {key: value for key, value in entry.items() if key != "check"}
    return content | {"check": zlib.crc32(json.dumps([conversion, content]).encode())}


def _parse(line: bytes) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _locked(path: Path) -> PartialFile:
    """The partial file, open and locked."""
    with write_errors(path):
        partial = PartialFile(path)
        try:
            partial.lock()
        except BaseException:
            partial.close()
            raise
    return partial


def _only_names_are_missing(
    record: JournalRecord | None, files: Sequence[PlannedFile], fingerprint: str
) -> bool:
    """Whether an earlier run of the same conversion ended while it gave the whole files their names."""
    if record is None or not record.whole or record.conversion != fingerprint:
        return False
    return all(file.n_bytes in map(_length_of, (file.path, partial_path(file.path))) for file in files)


def _check_names(files: Sequence[PlannedFile]) -> None:
    for file in files:
        if file.path.is_dir():
            raise ConvertError(f"{file.path}: is a folder. Give the name of the file to write.")
        if file.path.exists() or file.path.is_symlink():
            raise ConvertError(f"{file.path}: exists already. Remove it or write to another name.")


def _split_differently(files: Sequence[PlannedFile]) -> list[Path]:
    """The partial files of an interrupted conversion to the same name in another number of parts."""
    folder, name = files[0].path.parent, files[0].path.name
    if len(files) > 1:
        name = _PART.sub("", name)
    others = set(folder.glob("*.partial")) - {partial_path(file.path) for file in files}
    return sorted(path for path in others if _PART.sub("", path.stem) == name)


def _length_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
