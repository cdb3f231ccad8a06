"""Files that are read and written, whose errors say what a user can do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from qwq_local.errors import ConvertError
from qwq_local.files import BINARY, LockHeld, read_exactly


def partial_path(path: Path) -> Path:
    """Where the file that will be `path` grows."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError about `path`, and a lock that another process holds, into a ConvertError."""
    try:
        yield
    except OSError as error:
        raise ConvertError(
            f"{path}: cannot be written ({error.strerror}). Free space or go elsewhere."
        ) from None
    except LockHeld:
        raise ConvertError(f"{path}: another process is writing it. Wait for it or stop it.") from None


class InputFile:
    """An open shard or GGUF. Several threads may read from it at once. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises ConvertError when it is missing, no regular file, or cannot be opened."""
        self.path = path
        try:
            # Checked first: opening a named pipe would wait for a writer.
            if not path.is_file():
                raise ConvertError(f"{path}: no such file. Download the checkpoint again.")
            self._fd = os.open(path, os.O_RDONLY | BINARY)
        except OSError as error:
            raise ConvertError(f"{path}: cannot be opened ({error.strerror}).") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_bytes(self) -> int:
        """The length of the file."""
        return os.fstat(self._fd).st_size

    @property
    def state(self) -> str:
        """Name, size and time of change; a changed file has another state."""
        return f"{self.path.name} {self.n_bytes} {os.fstat(self._fd).st_mtime_ns}"

    def read(self, n_bytes: int, offset: int) -> bytes:
        """Exactly `n_bytes` from `offset`. Raises ConvertError when the disk fails or the file was cut."""
        try:
            return read_exactly(self._fd, n_bytes, offset)
        except EOFError:
            raise ConvertError(f"{self.path.name}: ends too early. Download the file again.") from None
        except OSError as error:
            raise ConvertError(f"{self.path.name}: cannot be read ({error.strerror}).") from None

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def identity_of(files: Iterable[InputFile]) -> str:
    """A digest of the files' names, sizes and times. Reading all 65 GB would take too long."""
    return hashlib.sha256(os.fsencode("\n".join(file.state for file in files))).hexdigest()
