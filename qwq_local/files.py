"""Files: positioned reads and writes, partial files, atomic replacement, locks, sync to the disk.

Everything here raises OSError as the system does; the caller says what a user can do. A lock that another
process holds is a LockHeld, which reads well as it is.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qwq_local.errors import QwqError

BINARY = getattr(os, "O_BINARY", 0)
"""The flag that stops Windows from translating line ends."""

# Windows has no pread and pwrite. Between a seek and the read or write after it no other thread may seek.
_SEEK = threading.Lock()


class LockHeld(QwqError):
    """Another process holds the lock."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: another process is using it. Wait for it or stop it.")


def read_at(descriptor: int, n_bytes: int, offset: int) -> bytes:
    """Up to `n_bytes` from `offset`: fewer at the end of the file, or when the system gives fewer."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, n_bytes, offset)
    with _SEEK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


def read_exactly(descriptor: int, n_bytes: int, offset: int) -> bytes:
    """`n_bytes` from `offset`. Raises EOFError when the file ends before that.

    A read and not a memory map: when the disk fails or another program cuts the file, a read raises an error,
    and a map kills the process.
    """
    content = read_at(descriptor, n_bytes, offset)
    while len(content) < n_bytes:
        more = read_at(descriptor, n_bytes - len(content), offset + len(content))
        if not more:
            raise EOFError
        content += more
    return content


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of `content` at `offset`. Several threads may write to one descriptor at once."""
    view = memoryview(content)
    while view:
        if hasattr(os, "pwrite"):
            n_written = os.pwrite(descriptor, view, offset)
        else:
            with _SEEK:
                os.lseek(descriptor, offset, os.SEEK_SET)
                n_written = os.write(descriptor, view)
        view, offset = view[n_written:], offset + n_written


def append(descriptor: int, content: bytes, *, sync: bool = False) -> None:
    """Add `content` at the end of the file, all of it or nothing; with `sync`, wait until the disk has it.

    A full disk takes half a line. The next line must not be joined to that half, so the file is cut back.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        while content:
            content = content[os.write(descriptor, content) :]
        if sync:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


class PartialFile:
    """A file that grows under a temporary name. Several threads may read and write it at once.

    It is kept when it is closed, so that the next run continues it.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        """Open the file with what an earlier run left in it, or create it empty."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, mode)

    @property
    def n_bytes(self) -> int:
        """The length of the file."""
        return os.fstat(self._fd).st_size

    def lock(self) -> None:
        """Keep other processes off until the file is closed. Raises LockHeld."""
        if not lock_open_file(self._fd, self.path):
            raise LockHeld(self.path)

    def read(self, n_bytes: int, offset: int) -> bytes:
        """Up to `n_bytes` from `offset`."""
        return read_at(self._fd, n_bytes, offset)

    def write(self, content: bytes | memoryview, offset: int) -> None:
        """Write all of `content` at `offset`."""
        write_at(self._fd, content, offset)

    def truncate(self, n_bytes: int) -> None:
        """Make the file `n_bytes` long; what is new is zeros that take no room."""
        os.ftruncate(self._fd, n_bytes)

    def sync(self) -> None:
        """Wait until the disk has everything that was written."""
        os.fsync(self._fd)

    def publish(self, target: Path) -> None:
        """Give the file its final name, in place of a file that has it. Call `sync` before.

        The new name is on the disk after `sync_folder`.
        """
        if sys.platform == "win32":
            self.close()  # Windows does not rename an open file
        self.path.replace(target)

    def remove(self) -> None:
        """Delete and close the file; where the system allows it, while the lock is still held."""
        if sys.platform == "win32":
            self.close()
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file and keep it. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextmanager
def atomic_file(
    path: Path,
    *,
    beside: Path | None = None,
    mode: int = 0o666,
    sync: bool = True,
    overwrite: bool = True,
) -> Iterator[BinaryIO]:
    """A new file to write. When the block ends it takes the name `path`; when the block fails it is deleted.

    The file grows as `beside`, by default under a random name in the same folder. Give a fixed name under a
    lock: then a run overwrites what a killed one left. Raises FileExistsError for a `path` that exists, when
    `overwrite` is false.
    """
    is_fixed = beside is not None
    beside = beside or path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.new")
    flags = os.O_WRONLY | os.O_CREAT | BINARY | (os.O_TRUNC if is_fixed else os.O_EXCL)
    descriptor = os.open(beside, flags, mode)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123
            yield file
            file.flush()
            if sync:
                os.fsync(descriptor)
        if overwrite:
            beside.replace(path)
        else:
            _rename_to_free_name(beside, path)
        if sync:
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_atomically(
    path: Path, content: bytes, *, beside: Path | None = None, mode: int = 0o666, sync: bool = True
) -> None:
    """Replace the file at `path`: other programs see the old content or the new, never a part of it."""
    with atomic_file(path, beside=beside, mode=mode, sync=sync) as file:
        file.write(content)


def _rename_to_free_name(beside: Path, path: Path) -> None:
    try:
        path.hardlink_to(beside)  # when two processes write the same name, one fails
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        beside.rename(path)


def lock_open_file(descriptor: int, path: Path, *, wait: bool = False) -> bool:
    """Keep other processes off the file at `path`, open as `descriptor`, until it is closed.

    False when another process has the lock, or has renamed or removed the file since it was opened; with
    `wait`, only in the second case. Raises OSError on a file system without locks. On Windows the result is
    always true: the system itself does not rename or remove an open file.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def lock_beside(path: Path) -> Iterator[None]:
    """Hold the lock on `path` through an empty file NAME.lock beside it, which is deleted after the block.

    Raises LockHeld when another process has it.
    """
    beside = path.with_name(f"{path.name}.lock")
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock_open_file(descriptor, beside):
            raise LockHeld(path)
        try:
            yield
        finally:
            # Before the lock is dropped: from now on other processes create a new file.
            if sys.platform != "win32":
                beside.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, *, timeout_s: float = 0.0, mode: int = 0o644) -> Iterator[None]:
    """Hold the lock file at `path`, which stays. It is the lock that filelock and huggingface_hub take.

    Raises LockHeld after `timeout_s`, and OSError where files cannot be locked. The system drops the lock
    when the process ends.
    """
    if sys.platform == "win32":
        from filelock import FileLock, Timeout

        try:
            with FileLock(path, timeout=timeout_s, mode=mode, thread_local=False):
                yield
        except Timeout:
            raise LockHeld(path) from None
        return
    # filelock's import takes longer than all that `qwq ask` writes.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        with suppress(PermissionError):
            os.fchmod(descriptor, mode)
        deadline = time.monotonic() + timeout_s
        while not lock_open_file(descriptor, path):
            if time.monotonic() >= deadline:
                raise LockHeld(path)
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder: without it a power failure loses a rename."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allocated_bytes(path: Path) -> int:
    """The bytes that a file takes on the disk, without its holes; 0 when there is no file."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return getattr(status, "st_blocks", status.st_size // 512) * 512


def free_bytes(path: Path) -> int:
    """The free bytes on the disk where `path` is or would be."""
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


def remove_quietly(path: Path) -> None:
    """Delete a file if it is there and the system allows it."""
    with suppress(OSError):
        path.unlink()
