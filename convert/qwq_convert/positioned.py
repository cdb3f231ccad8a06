"""Reads and writes at a position of a file, from several threads at once, on every system."""

from __future__ import annotations

import os
import threading

# Windows has no pread and pwrite: there a seek and what follows it must not be torn apart.
_SEEK = threading.Lock()


def read_at(descriptor: int, n_bytes: int, offset: int) -> bytes:
    """At most `n_bytes` from `offset`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, n_bytes, offset)
    with _SEEK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


def write_at(descriptor: int, content: memoryview, offset: int) -> int:
    """Write at `offset`; how many bytes were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, content, offset)
    with _SEEK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, content)
