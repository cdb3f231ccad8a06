"""Reads tensors in chunks of rows, quantizes and validates them on several threads, and writes the bytes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from qwq_convert import ggml
from qwq_convert.file_types import FLOAT_TYPES, QuantType, block_size, tensor_bytes
from qwq_convert.layout import PlannedTensor
from qwq_convert.parallel import map_in_order
from qwq_convert.plan import ConversionPlan, Source
from qwq_local.errors import ConvertError

# Below 64k values a chunk costs more to hand to a thread than to quantize; 256k floats stay in the cache.
CHUNK_ELEMENTS = 2**18
# While one thread waits for the disk, another uses the core.
THREADS_THAT_WAIT = 1
# The trial that estimates the time: its weights, and its seconds for all types together.
TRIAL_ELEMENTS = 2**14
TRIAL_S = 1.0


@dataclass(frozen=True, slots=True)
class TensorJob:
    """A tensor to make, the importance of its columns if known, and the function that writes its bytes.

    `write` gets a place in the tensor and the bytes for it; several threads call it at once. With
    `allow_nonfinite`, weights that are no numbers stay as they are in float types and become 0 in quantized
    ones.
    """

    tensor: PlannedTensor
    write: Callable[[int, ggml.Bytes], None]
    importance: ggml.Rows | None = None
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True)
class FinishedRows:
    """Written rows of a tensor: how many bytes, and how many of the weights were no numbers."""

    tensor: PlannedTensor
    n_bytes: int
    n_nonfinite: int
    completes_tensor: bool


@dataclass(frozen=True, slots=True)
class _RowChunk:
    job: TensorJob
    n_per_row: int
    first_row: int
    n_rows: int
    is_last: bool


def available_threads() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quantized(source: Source, jobs: Sequence[TensorJob], threads: int) -> Generator[FinishedRows, None, None]:
    """Make every tensor, in order. ConvertError names a tensor whose values cannot be used."""
    finish = partial(_finish, source)
    with closing(map_in_order(_chunks(jobs), finish, threads + THREADS_THAT_WAIT)) as results:
        for _, rows in results:
            yield rows


def _chunks(jobs: Sequence[TensorJob]) -> Iterator[_RowChunk]:
    for job in jobs:
        n_per_row = job.tensor.shape[-1]
        n_rows = job.tensor.source.n_elements // n_per_row
        step = max(1, CHUNK_ELEMENTS // n_per_row)
        for first_row in range(0, n_rows, step):
            count = min(step, n_rows - first_row)
            yield _RowChunk(job, n_per_row, first_row, count, first_row + count == n_rows)


def _finish(source: Source, chunk: _RowChunk) -> FinishedRows:
    tensor = chunk.job.tensor
    source_kind = QuantType[tensor.source.dtype]
    row_bytes = tensor_bytes(source_kind, chunk.n_per_row)
    content = source.read(tensor.source, chunk.first_row * row_bytes, chunk.n_rows * row_bytes)
    finished, n_nonfinite = _converted(chunk, content, source_kind)
    chunk.job.write(chunk.first_row * tensor_bytes(tensor.kind, chunk.n_per_row), finished)
    return FinishedRows(tensor, finished.nbytes, n_nonfinite, chunk.is_last)


def _converted(chunk: _RowChunk, content: bytes, source_kind: QuantType) -> tuple[ggml.Bytes, int]:
    """The bytes to write, and how many weights were no numbers."""
    job, kind, n_nonfinite = chunk.job, chunk.job.tensor.kind, 0
    if source_kind == kind:
        finished = np.frombuffer(content, dtype=np.uint8)
        if not ggml.is_valid(finished, kind):
            n_nonfinite = _count_nonfinite(chunk, ggml.dequantize(content, kind))
        return finished, n_nonfinite
    rows = ggml.dequantize(content, source_kind)
    finite = np.isfinite(rows)
    if not finite.all():
        n_nonfinite = _count_nonfinite(chunk, rows)
        if kind not in FLOAT_TYPES:
            rows = np.where(finite, rows, np.float32(0))
    finished = ggml.quantize(rows, chunk.n_per_row, kind, job.importance)
    if ggml.is_valid(finished, kind):
        return finished, n_nonfinite
    if n_nonfinite and kind in FLOAT_TYPES:
        # Right when it has only those non-numbers that the source has too.
        finite = np.isfinite(ggml.dequantize(finished.tobytes(), kind))
        if finite.size - np.count_nonzero(finite) == n_nonfinite:
            return finished, n_nonfinite
    source = job.tensor.source
    raise ConvertError(
        f"{source.shard}: {source.name} has values too large for {kind.name}. Choose BF16 or F32."
    )


def _count_nonfinite(chunk: _RowChunk, rows: ggml.Rows) -> int:
    """How many values are no numbers. ConvertError names the first one unless they are allowed."""
    finite = np.isfinite(rows)
    count = int(rows.size - np.count_nonzero(finite))
    if not count or chunk.job.allow_nonfinite:
        return count
    place = int(np.argmin(finite))
    row, column = divmod(place, chunk.n_per_row)
    index = [chunk.first_row + row, column] if len(chunk.job.tensor.shape) > 1 else [column]
    source = chunk.job.tensor.source
    raise ConvertError(
        f"{source.shard}: {source.name} holds {rows[place]} at {index}. Download the file again, or "
        "convert with --allow-nonfinite."
    )


def estimate_seconds(plan: ConversionPlan, threads: int) -> float:
    """The time to quantize on `threads` cores, without reading and writing, from a trial of one second."""
    amounts: Counter[QuantType] = Counter()
    for tensor in plan.tensors:
        if tensor.source.dtype != tensor.kind.name:
            amounts[tensor.kind] += tensor.source.n_elements
    core_seconds = (n * _seconds_per_element(kind, TRIAL_S / len(amounts)) for kind, n in amounts.items())
    return sum(core_seconds) / threads


def _seconds_per_element(kind: QuantType, budget_s: float) -> float:
    """The time for one weight, measured on normally distributed ones, which trained ones resemble."""
    n_per_row = max(256, block_size(kind))
    rows = np.random.default_rng(0).normal(0, 0.02, TRIAL_ELEMENTS).astype(np.float32)
    importance = np.ones(n_per_row, dtype=np.float32)
    content = (rows.view(np.uint32) >> 16).astype("<u2").tobytes()
    ggml.quantize(rows, n_per_row, kind, importance)  # in the first call libggml makes its tables
    start, n_done = time.perf_counter(), 0
    while not n_done or time.perf_counter() - start < budget_s:
        widened = ggml.dequantize(content, QuantType.BF16)
        quantized = ggml.quantize(widened, n_per_row, kind, None if kind in FLOAT_TYPES else importance)
        ggml.is_valid(quantized, kind)
        n_done += rows.size
    return (time.perf_counter() - start) / n_done
