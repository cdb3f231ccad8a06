"""One planned file while it grows beside its final name as NAME.partial, held by one process alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwq_convert import ggml
from qwq_convert.layout import PlannedFile
from qwq_convert.writing.lock import lock
from qwq_convert.writing.positioned import BINARY, write_at
from qwq_local.errors import ConvertError


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
