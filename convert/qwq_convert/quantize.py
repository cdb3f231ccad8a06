"""Planned tensors in, their finished bytes out, block by block and in file order, made by several threads.

Reads a chunk of rows, widens it to 32-bit floats, quantizes and validates it. A bounded number of chunks is
under way at any time, so memory does not grow with the model. Knows no file format.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as QuantType

from qwq_convert import ggml
from qwq_convert.checkpoint import Checkpoint
from qwq_convert.writer import PlannedTensor
from qwq_local.errors import ConvertError

# Chunks below 64k values cost more in hand-over than in work; 256k keep the floats in the cache.
CHUNK_ELEMENTS = 2**18
CHUNKS_PER_THREAD = 4


@dataclass(frozen=True, slots=True)
class FinishedRows:
    """Some rows of the tensor numbered `index`: their bytes and place in the tensor data."""

    index: int
    offset: int
    content: ggml.Bytes
    completes_tensor: bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    index: int
    tensor: PlannedTensor
    first_row: int
    n_rows: int
    n_per_row: int
    is_last: bool


def available_threads() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def finished_rows(
    checkpoint: Checkpoint, tensors: Sequence[PlannedTensor], threads: int
) -> Generator[FinishedRows, None, None]:
    """The rows of every tensor in order; ConvertError names the tensor whose values cannot be used."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
    pending: deque[Future[FinishedRows]] = deque()
    try:
        for chunk in _chunks(tensors):
            pending.append(pool.submit(_finish, checkpoint, chunk))
            if len(pending) >= threads * CHUNKS_PER_THREAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(tensors: Sequence[PlannedTensor]) -> Iterator[_Chunk]:
    for index, tensor in enumerate(tensors):
        n_per_row = tensor.shape[-1]
        n_rows = tensor.source.n_elements // n_per_row
        step = max(1, CHUNK_ELEMENTS // n_per_row)
        for first_row in range(0, n_rows, step):
            count = min(step, n_rows - first_row)
            yield _Chunk(index, tensor, first_row, count, n_per_row, first_row + count == n_rows)


def _finish(checkpoint: Checkpoint, chunk: _Chunk) -> FinishedRows:
    tensor, n_elements = chunk.tensor, chunk.n_rows * chunk.n_per_row
    source_kind = QuantType[tensor.source.dtype]
    start = ggml.tensor_bytes(source_kind, chunk.first_row * chunk.n_per_row)
    content = checkpoint.read(tensor.source, start, ggml.tensor_bytes(source_kind, n_elements))
    if source_kind == tensor.kind:
        finished = np.frombuffer(content, dtype=np.uint8)
    else:
        rows = ggml.to_float(content, source_kind)
        _check_finite(chunk, rows)
        finished = ggml.quantize(rows, chunk.n_per_row, tensor.kind)
    if not ggml.is_valid(finished, tensor.kind):
        _check_finite(chunk, ggml.to_float(content, source_kind))
        raise ConvertError(
            f"{tensor.source.shard}: {tensor.source.name} has values too large for {tensor.kind.name}. "
            "Choose BF16 or F32."
        )
    offset = tensor.offset + chunk.first_row * ggml.tensor_bytes(tensor.kind, chunk.n_per_row)
    return FinishedRows(chunk.index, offset, finished, chunk.is_last)


def _check_finite(chunk: _Chunk, rows: ggml.Rows) -> None:
    finite = np.isfinite(rows)
    if finite.all():
        return
    place = int(np.argmin(finite))
    row, column = divmod(place, chunk.n_per_row)
    index = [chunk.first_row + row, column] if len(chunk.tensor.shape) > 1 else [column]
    source = chunk.tensor.source
    raise ConvertError(
        f"{source.shard}: {source.name} holds {rows[place]} at {index}. Download the file again."
    )
