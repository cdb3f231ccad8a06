"""Files as the system has them: positioned reads and writes by several threads, lasting renames, sizes."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from qwq_local.errors import ConvertError

# Windows would otherwise translate line ends.
BINARY = getattr(os, "O_BINARY", 0)
# Windows has no pread and pwrite: there a seek and what follows it must not be torn apart.
_SEEK = threading.Lock()


def read_at(descriptor: int, n_bytes: int, offset: int) -> bytes:
    """At most `n_bytes` from `offset`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, n_bytes, offset)
    with _SEEK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


def read_exactly(descriptor: int, n_bytes: int, offset: int, name: str) -> bytes:
    """Exactly `n_bytes` from `offset` of the file called `name`; ConvertError when it cannot give them.

    A positioned read and not a memory map: a disk that fails or a file that is cut meanwhile is then an
    error to report, where a map would kill the process.
    """
    try:
        content = read_at(descriptor, n_bytes, offset)
        while len(content) < n_bytes:
            more = read_at(descriptor, n_bytes - len(content), offset + len(content))
            if not more:
                raise ConvertError(f"{name}: ends too early. Download the file again.")
            content += more
    except OSError as error:
        raise ConvertError(f"{name}: cannot be read ({error.strerror}).") from None
    return content


def write_at(descriptor: int, content: memoryview, offset: int) -> int:
    """Write at `offset`; how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, offset)
    with _SEEK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, content)


def allocated_bytes(path: Path) -> int:
    """What a file takes on the disk, holes not counted; 0 when there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return getattr(status, "st_blocks", status.st_size // 512) * 512


def sync_folder(folder: Path) -> None:
    """Bring to the disk which names the folder holds: a rename is lost without it when the power goes."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
