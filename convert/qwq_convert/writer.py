"""Planned tensors and a header in, a GGUF file at precomputed offsets out.

The file grows beside its final name as NAME.partial and takes the name only when it is whole and on the
disk; on any error it is removed. The header's bytes come from the gguf package. Knows no quantization.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT as ALIGNMENT
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFWriter

from qwq_convert import ggml
from qwq_convert.positioned import write_at
from qwq_convert.quant_types import FileType, tensor_type
from qwq_convert.shard import SourceTensor
from qwq_convert.tensor_names import NamedTensor
from qwq_local.errors import ConvertError

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the GGUF before it is made: `offset` counts from the start of the tensor data."""

    name: str
    kind: QuantType
    source: SourceTensor
    offset: int
    n_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Layout:
    """All tensors in file order; `n_bytes` is what they take with the padding after each one."""

    tensors: tuple[PlannedTensor, ...]
    n_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """What the tensors take without padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def lay_out(tensors: Iterable[NamedTensor], file_type: FileType) -> Layout:
    """Where each tensor goes and what it becomes in a file of `file_type`."""
    planned, offset = [], 0
    for tensor in tensors:
        source = tensor.source
        kind = tensor_type(tensor.name, source.shape, file_type)
        n_bytes = ggml.tensor_bytes(kind, source.n_elements)
        planned.append(PlannedTensor(tensor.name, kind, source, offset, n_bytes))
        offset += padded(n_bytes)
    return Layout(tuple(planned), offset)


def padded(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment; llama-quantize pads the last tensor too."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def check_output(path: Path, needed_bytes: int, free_bytes: Callable[[Path], int] | None = None) -> None:
    """ConvertError unless `path` is free to take and its folder has room for `needed_bytes`."""
    if path.is_dir():
        raise ConvertError(f"{path}: is a folder. Give the name of the file to write.")
    if path.exists() or path.is_symlink():
        raise ConvertError(f"{path}: exists already. Remove it or write to another name.")
    if not path.parent.is_dir():
        raise ConvertError(f"{path.parent}: no such folder. Create it or write elsewhere.")
    # What a killed run left behind is written over.
    free = (free_bytes or _free_bytes)(path.parent) + _allocated_bytes(_partial_path(path))
    if free < needed_bytes:
        raise ConvertError(
            f"{path.parent}: needs {needed_bytes / GIB:.1f} GiB, {free / GIB:.1f} GiB free. "
            "Free some space or write to another disk."
        )


class PartialFile:
    """NAME.partial while it is being written, held by this process alone; a context manager."""

    def __init__(self, target: Path, layout: Layout) -> None:
        """Nothing is touched before the context is entered."""
        self.path = _partial_path(target)
        self._target = target
        self._layout = layout
        self._fd = -1
        self._data_start = 0
        self._published = False

    def __enter__(self) -> PartialFile:
        with _write_errors(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._lock()
            except BaseException:
                os.close(self._fd)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def write_header(self, header: GGUFWriter) -> None:
        """Write key-values and tensor list, and give the file its final length."""
        for tensor in self._layout.tensors:
            header.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.kind
            )
        with _write_errors(self.path):
            try:
                header.write_header_to_file(self.path)
                header.write_kv_data_to_file()
                header.write_ti_data_to_file()
            finally:
                header.close()
            self._data_start = padded(os.fstat(self._fd).st_size)
            # Padding stays unwritten: a file reads as zeros where nothing was put.
            os.ftruncate(self._fd, self._data_start + self._layout.n_bytes)

    def write(self, offset: int, content: ggml.Bytes) -> None:
        """Put `content` at `offset` of the tensor data."""
        view, position = content.data, self._data_start + offset
        with _write_errors(self.path):
            while view:
                n_written = write_at(self._fd, view, position)
                view, position = view[n_written:], position + n_written

    def publish(self) -> int:
        """Bring everything to the disk, give the file its final name; returns its length in bytes."""
        with _write_errors(self.path):
            os.fsync(self._fd)
            n_bytes = os.fstat(self._fd).st_size
            self.path.rename(self._target)
            self._published = True
            _sync_folder(self._target.parent)
        return n_bytes

    def _lock(self) -> None:
        """Keep other processes off the file; Windows does that by itself when it is renamed or removed."""
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have renamed this very file, finished, since it was opened.
            mine = self.path.exists() and os.path.samestat(os.fstat(self._fd), self.path.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise ConvertError(f"{self.path}: another process is writing it. Wait for it or stop it.")


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConvertError(
            f"{path}: cannot be written ({error.strerror}). Free space or go elsewhere."
        ) from None


def _partial_path(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _allocated_bytes(path: Path) -> int:
    return getattr(path.stat(), "st_blocks", 0) * 512 if path.is_file() else 0


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
