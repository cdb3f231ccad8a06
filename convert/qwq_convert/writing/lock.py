"""One process at a time: an open file in, a lock on it that ends with the process, or a ConvertError."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwq_local.errors import ConvertError


def lock(descriptor: int, path: Path, out: Path) -> None:
    """Keep other processes off the file at `path`, open as `descriptor`, until it is closed.

    Windows does that by itself when the file is renamed or removed. Raises ConvertError, which names `out`,
    when another process has it.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have renamed or removed this very file, finished, since it was opened.
        is_mine = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    except BlockingIOError:
        is_mine = False
    except OSError as error:  # a file system without locks
        raise ConvertError(f"{out}: cannot be locked ({error.strerror}). Write to another disk.") from None
    if not is_mine:
        raise ConvertError(f"{out}: another process is writing it. Wait for it or stop it.")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within the block no other process that asks has `out`. Raises ConvertError when one has.

    For files that are renamed into place again and again: the lock is on an empty file beside them.
    """
    path = out.with_name(f"{out.name}.lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error.strerror}).") from None
    try:
        lock(descriptor, path, out)
        try:
            yield
        finally:
            # While it is still locked: whoever opens it from now on makes a new one.
            if sys.platform != "win32":
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
