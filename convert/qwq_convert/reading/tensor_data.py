"""The tensor data of a GGUF and of its parts, cut into chunks and read, by several threads at once.

Knows no blocks but their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwq_convert import ggml
from qwq_convert.reading.gguf_header import GgufHeader, TensorEntry
from qwq_convert.writing.positioned import BINARY, read_exactly
from qwq_local.errors import ConvertError

# Whole blocks of every type, and large enough that handing a chunk over costs nothing beside the work.
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True, slots=True)
class Chunk:
    """`n_elements` values of a tensor from element `start` on; `part` counts a split model's files from 0."""

    part: int
    tensor: TensorEntry
    start: int
    n_elements: int

    @property
    def n_bytes(self) -> int:
        """What the values take in the file."""
        return ggml.tensor_bytes(self.tensor.kind, self.n_elements)

    @property
    def completes_tensor(self) -> bool:
        """Whether no chunk of the same tensor follows."""
        return ggml.tensor_bytes(self.tensor.kind, self.start) + self.n_bytes == self.tensor.n_bytes


class TensorData:
    """The open files behind `parts`; reads from several threads at once. A context manager."""

    def __init__(self, parts: Sequence[GgufHeader]) -> None:
        self._parts = parts
        self._fds: list[int] = []

    def __enter__(self) -> TensorData:
        try:
            for part in self._parts:
                self._fds.append(os.open(part.path, os.O_RDONLY | BINARY))
        except OSError as error:
            self._close()
            raise ConvertError(f"{part.path}: cannot be read ({error.strerror}).") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, chunk: Chunk) -> bytes:
        """The bytes of a chunk; ConvertError when the disk fails or the file was cut since it was opened."""
        part = self._parts[chunk.part]
        at = part.data_start + chunk.tensor.offset + ggml.tensor_bytes(chunk.tensor.kind, chunk.start)
        return read_exactly(self._fds[chunk.part], chunk.n_bytes, at, str(part.path))

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def chunks_of(part: int, tensor: TensorEntry) -> Iterator[Chunk]:
    """The tensor in chunks of whole blocks, first to last."""
    n_blocks = tensor.n_bytes // ggml.block_bytes(tensor.kind)
    n_elements = n_blocks * ggml.block_size(tensor.kind)
    for start in range(0, n_elements, CHUNK_ELEMENTS):
        yield Chunk(part, tensor, start, min(CHUNK_ELEMENTS, n_elements - start))
