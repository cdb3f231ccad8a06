"""The tensor data of a GGUF and of its parts, read chunk by chunk and worked on by several threads.

A bounded number of chunks is under way at any time, so memory does not grow with the model. Knows no
blocks: what is done with the bytes is passed in.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from qwq_convert import ggml
from qwq_convert.reading.gguf_header import GgufHeader, TensorEntry
from qwq_convert.writing.positioned import read_exactly
from qwq_local.errors import ConvertError

# Whole blocks of every type, and large enough that handing a chunk over costs nothing beside the work.
CHUNK_ELEMENTS = 2**20
CHUNKS_PER_THREAD = 3

Result = TypeVar("Result")


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
                self._fds.append(os.open(part.path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
        except OSError as error:
            self._close()
            raise ConvertError(f"{part.path}: cannot be read ({error.strerror}).") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


def in_order(
    chunks: Iterable[Chunk], work: Callable[[Chunk], Result], threads: int
) -> Generator[tuple[Chunk, Result], None, None]:
    """Each chunk with what `work` makes of it, in order, made by `threads` threads; its error ends it all."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    pending: deque[tuple[Chunk, Future[Result]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(work, chunk)))
            if len(pending) >= threads * CHUNKS_PER_THREAD:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
