"""The start of a file in, a checksum out: CRC-32 of every piece, read once, on several threads.

Made for gigabytes that a process reads before it trusts them: it finds damage, not malice. Pieces are read
one after the other, as disks like it, and summed up at the same time.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

from qwq_local.engine.api import Aborted, AbortFlag

PIECE_BYTES = 1 << 24
_MAX_THREADS = 4


def checksum(path: Path, n_bytes: int, abort: AbortFlag | None = None) -> str:
    """64 hex digits over the first `n_bytes` of the file: SHA-256 of the pieces' CRC-32s and the length.

    A shorter file gives another checksum. Raises OSError, and Aborted when the flag is set meanwhile.
    """
    offsets = range(0, n_bytes, PIECE_BYTES)
    with path.open("rb") as file:
        pieces = _Pieces(file, n_bytes, abort or AbortFlag())
        n_threads = max(1, min(_MAX_THREADS, os.cpu_count() or 1, len(offsets)))
        with ThreadPoolExecutor(n_threads, "checksum") as threads:
            sums = list(threads.map(pieces.crc32, offsets))
    digest = hashlib.sha256(n_bytes.to_bytes(8, "little"))
    for crc in sums:
        digest.update(crc.to_bytes(4, "little"))
    return digest.hexdigest()


class _Pieces:
    """A file of which several threads take pieces; each keeps one buffer of its own."""

    def __init__(self, file: BufferedReader, n_bytes: int, abort: AbortFlag) -> None:
        self._file = file
        self._n_bytes = n_bytes
        self._abort = abort
        self._turn = threading.Lock()
        self._own = threading.local()

    def crc32(self, offset: int) -> int:
        """The CRC-32 of the piece at `offset`."""
        if self._abort:
            raise Aborted
        buffer = self._buffer()[: min(PIECE_BYTES, self._n_bytes - offset)]
        with self._turn:
            self._file.seek(offset)
            n_read = 0
            while n_read < len(buffer) and (count := self._file.readinto(buffer[n_read:])):
                n_read += count
        return zlib.crc32(buffer[:n_read])

    def _buffer(self) -> memoryview:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(PIECE_BYTES))
        buffer: memoryview = self._own.buffer
        return buffer
