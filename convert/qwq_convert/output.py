"""Planned files in, whole files under their final names out, whatever interrupts the writing.

A journal beside the first partial file tells which tensors are on the disk for good, and the next run of the
same conversion goes on from there. Final names are taken when all is whole, verified and on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qwq_convert import ggml
from qwq_convert.layout import FileLayout, PlannedFile, PlannedTensor
from qwq_convert.writing.lock import lock
from qwq_convert.writing.positioned import BINARY, allocated_bytes, sync_folder, write_at
from qwq_local.errors import ConvertError

GIB, MIB = 2**30, 2**20
_PART = re.compile(r"-\d{5}-of-\d{5}(?=(\.gguf)?$)")


def check_output(
    files: Sequence[PlannedFile], fingerprint: str, free_bytes: Callable[[Path], int] | None = None
) -> None:
    """ConvertError unless the files' names are free to take and their folder has room for them."""
    folder = files[0].path.parent
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder. Create it or write elsewhere.")
    if not _only_names_are_missing(read_journal(journal_path(files)), files, fingerprint):
        _check_names(files)
    # What an interrupted run left behind is gone on with or written over.
    free = (free_bytes or _free_bytes)(folder)
    free += sum(allocated_bytes(path) for file in files for path in (partial_path(file.path), file.path))
    free += sum(allocated_bytes(path) for path in _otherwise_split(files))
    needed = sum(file.n_bytes for file in files)
    if free < needed:
        raise ConvertError(
            f"{folder}: needs {_size_text(needed)}, {_size_text(free)} free. "
            "Free some space or write to another disk."
        )


def journal_path(files: Sequence[PlannedFile]) -> Path:
    """Where the journal of a conversion to `files` is."""
    return partial_path(files[0].path).with_suffix(".partial.journal")


class ConversionOutput:
    """The files of one conversion while they are written, held by this process alone; a context manager.

    `finished` are the tensors that an earlier run left whole; `started_over` says that what lay there was of
    another conversion.
    """

    def __init__(self, files: Sequence[PlannedFile], fingerprint: str, record_every_s: float) -> None:
        """Nothing is touched before the context is entered; the journal grows every `record_every_s`."""
        self._files = files
        self._fingerprint = fingerprint
        self._record_every_s = record_every_s
        self._partials: list[PartialFile] = []
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
        # The error that is under way matters more than one of the last record.
        with suppress(ConvertError):
            self._sync_all()
        self._close()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the files are now."""
        return tuple(
            path if (path := partial_path(file.path)).exists() else file.path for file in self._files
        )

    def writer_of(self, number: int, tensor: PlannedTensor) -> Callable[[int, ggml.Bytes], None]:
        """What puts bytes at a place of `tensor`, which is in file `number`; for several threads at once."""
        partial = self._partials[number]

        def write(offset: int, content: ggml.Bytes) -> None:
            partial.write(tensor.offset + offset, content)

        return write

    def mark_finished(self, name: str) -> None:
        """All bytes of the tensor `name` were written; the journal says so when they are on the disk."""
        self._unsynced.append(name)
        idle = self._syncing is None or self._syncing.done()
        if idle and time.monotonic() - self._last_sync >= self._record_every_s:
            self._wait()
            self._syncing = self._syncer.submit(self._sync, self._unsynced)
            self._unsynced, self._last_sync = [], time.monotonic()

    def publish(self) -> int:
        """Give the files, which are whole, their names; what they take in bytes."""
        self._sync_all()
        # Hours after the first look: nothing that came to lie there meanwhile is written over.
        _check_names([partial.planned for partial in self._partials])
        if self._journal is not None:
            with write_errors(self._journal.path):
                self._journal.whole()
        # The first part last: it is the one that people open.
        for partial in reversed(self._partials):
            partial.publish()
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
                self._partials.append(PartialFile(file))
        # From here on no other process writes; one that did so until now may have changed the journal.
        if read_journal(path) != record:
            raise ConvertError(f"{path}: another process was writing it. Run the same command again.")
        if only_names_are_missing:
            self.finished = self._names
            return
        _check_names(self._files)
        if record is not None and self._goes_on(record):
            self.finished = record.finished & self._names
            with write_errors(path):
                self._journal = Journal(path, self._fingerprint, goes_on=True)
            return
        self.started_over = was_there and (record is None or record.conversion != self._fingerprint)
        # The new journal first: the old one vouches for bytes that are about to go.
        with write_errors(path):
            self._journal = Journal(path, self._fingerprint, goes_on=False)
        for partial in self._partials:
            partial.begin()
        for other in _otherwise_split(self._files):
            PartialFile(PlannedFile(other.with_suffix(""), b"", FileLayout((), 0))).remove()
            other.with_suffix(".partial.journal").unlink(missing_ok=True)
            self.started_over = True

    @property
    def _names(self) -> frozenset[str]:
        return frozenset(tensor.name for file in self._files for tensor in file.layout.tensors)

    def _goes_on(self, record: JournalRecord) -> bool:
        """Whether the partial files hold finished tensors of this very conversion, and so its headers."""
        same = record.conversion == self._fingerprint and bool(record.finished)
        return same and all(each.n_bytes == each.planned.n_bytes for each in self._partials)

    def _sync(self, names: Sequence[str]) -> None:
        if not names or self._journal is None or not self._may_record:
            return
        # A disk that failed once may say next time that all is well, and have lost what it was given.
        self._may_record = False
        for partial in self._partials:
            partial.sync()
        with write_errors(self._journal.path):
            self._journal.finished(names)
        self._may_record = True

    def _wait(self) -> None:
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            syncing.result()

    def _sync_all(self) -> None:
        self._wait()
        names, self._unsynced = self._unsynced, []
        self._sync(names)

    def _close(self) -> None:
        """Keep what a next run can go on from, and nothing else."""
        self._syncer.shutdown()
        if self._journal is not None:
            self._journal.close()
        path = journal_path(self._files)
        record = read_journal(path)
        is_worth_keeping = record is not None and (record.finished or record.whole)
        if self._partials and not is_worth_keeping:
            path.unlink(missing_ok=True)
        for partial in self._partials:
            partial.close() if is_worth_keeping else partial.remove()


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


def _otherwise_split(files: Sequence[PlannedFile]) -> list[Path]:
    """What an interrupted conversion to the same name, in another number of parts, left behind."""
    folder, name = files[0].path.parent, files[0].path.name
    if len(files) > 1:
        name = _PART.sub("", name)
    mine = {partial_path(file.path) for file in files}
    named_so = [path for path in folder.glob("*.partial") if _PART.sub("", path.stem) == name]
    return [path for path in named_so if path not in mine]


def _length_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _size_text(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.1f} MiB"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


VERSION = 1
MAX_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """What an earlier run left: which conversion it was, its finished tensors, whether all was verified."""

    conversion: str
    finished: frozenset[str]
    whole: bool


def read_journal(path: Path) -> JournalRecord | None:
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
    return JournalRecord(
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


def partial_path(path: Path) -> Path:
    """Where the file that will be `path` grows."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Makes a ConvertError of an OSError that the disk answers with."""
    try:
        yield
    except OSError as error:
        raise ConvertError(
            f"{path}: cannot be written ({error.strerror}). Free space or go elsewhere."
        ) from None


class PartialFile:
    """An open NAME.partial; every failure is a ConvertError."""

    def __init__(self, planned: PlannedFile) -> None:
        """Open the file, which may hold what an earlier run left, and keep other processes off it."""
        self.planned = planned
        self.path = partial_path(planned.path)
        with write_errors(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        try:
            lock(self._fd, self.path, self.path)
        except BaseException:
            self.close()
            raise

    @property
    def n_bytes(self) -> int:
        """How long the file is now."""
        return os.fstat(self._fd).st_size

    def begin(self) -> None:
        """Make the file its header and zeros: whatever it held is gone, padding is never written again."""
        with write_errors(self.path):
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self.planned.n_bytes)
        self._write_at(0, memoryview(self.planned.header))

    def write(self, offset: int, content: ggml.Bytes) -> None:
        """Put `content` at `offset` of the tensor data; safe from several threads at once."""
        self._write_at(len(self.planned.header) + offset, content.data)

    def sync(self) -> None:
        """Bring what was written to the disk for good."""
        with write_errors(self.path):
            os.fsync(self._fd)

    def publish(self) -> None:
        """Take the final name."""
        if sys.platform == "win32":
            self.close()  # an open file cannot be renamed there
        with write_errors(self.path):
            self.path.rename(self.planned.path)

    def close(self) -> None:
        """Close the file and keep it; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Take the file away, while it is still this process's where the system allows that, and close it."""
        if sys.platform == "win32":
            self.close()
        self.path.unlink(missing_ok=True)
        self.close()

    def _write_at(self, position: int, view: memoryview) -> None:
        with write_errors(self.path):
            while view:
                n_written = write_at(self._fd, view, position)
                view, position = view[n_written:], position + n_written
