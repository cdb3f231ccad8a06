"""Checks a GGUF: its structure, every block, and every value beside the checkpoint it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from qwq_convert import ggml
from qwq_convert.file_types import QuantType, block_bytes, block_size, tensor_bytes
from qwq_convert.ggml import dequantize, is_known
from qwq_convert.gguf_file import GgufHeader, TensorChunk, TensorEntry, chunks_of, read_header, tensor_data
from qwq_convert.layout import FileLayout
from qwq_convert.model_config import NamedTensor
from qwq_convert.parallel import map_in_order
from qwq_convert.safetensors import SourceTensor
from qwq_local.errors import ConvertError

# Half a unit in the last place; F32 loses nothing.
FLOAT_LIMITS = {QuantType.F32: 0.0, QuantType.F16: 2.0**-11, QuantType.BF16: 2.0**-8}
FACTOR = 4.0
# All zeros have an error of 1. No type may come near that, whatever its bits.
LARGEST_LIMIT = 0.95
# Scales are F16, whose steps end at 2**-24, times integers up to 128: errors below that say nothing.
NEGLIGIBLE = 128 * 2.0**-25
# Values at a time, so that both sides stay in the processor's cache.
SLICE_ELEMENTS = 2**16

Found = TypeVar("Found")
Read = Callable[[SourceTensor, int, int], bytes]
"""A checkpoint's `read`: bytes of a source tensor; several threads call it."""


@dataclass(frozen=True, slots=True)
class BytesVerified:
    """`bytes_done` of `bytes_total` are read, the last of them of `tensor`."""

    tensor: str
    bytes_done: int
    bytes_total: int


def verify_structure(path: Path, layout: FileLayout) -> None:
    """Raises ConvertError unless the GGUF holds the planned tensors at the planned places."""
    header = read_header(path)
    planned = [TensorEntry(t.name, t.kind, t.shape, t.offset, t.n_bytes) for t in layout.tensors]
    for expected, found in zip(planned, header.tensors, strict=False):
        if found != expected:
            raise ConvertError(f"{path}: holds {found}, planned was {expected}. Convert again.")
    n_found, n_bytes = len(header.tensors), header.data_start + layout.n_bytes
    if n_found != len(planned):
        raise ConvertError(f"{path}: holds {n_found} tensors, planned were {len(planned)}. Convert again.")
    if header.file_bytes != n_bytes:
        raise ConvertError(f"{path}: has {header.file_bytes} bytes, planned were {n_bytes}. Convert again.")


def verify_placement(part: GgufHeader) -> None:
    """Raises ConvertError unless the tensors lie as llama.cpp wants: in the header's order, with nothing but
    padding between them (ggml/src/gguf.cpp).
    """
    expected = 0
    for tensor in part.tensors:
        if not is_known(tensor.kind):
            raise ConvertError(
                f"{part.path}: {tensor.name!r} has type {tensor.kind.name}, unknown to llama.cpp."
            )
        if tensor.offset != expected:
            raise ConvertError(
                f"{part.path}: {tensor.name!r} starts at byte {tensor.offset:,} of the tensor data, expected "
                f"was {expected:,}: llama.cpp would refuse it. Convert or download it again."
            )
        expected += -(-tensor.n_bytes // part.alignment) * part.alignment


def surplus_bytes(part: GgufHeader) -> int:
    """How many bytes lie behind the last tensor and its padding; 0 in a file that is as it was written."""
    end = max((tensor.offset + tensor.n_bytes for tensor in part.tensors), default=0)
    padded_end = part.data_start + -(-end // part.alignment) * part.alignment
    return max(0, part.file_bytes - padded_end)


def verify_blocks(parts: Sequence[GgufHeader], threads: int) -> Generator[BytesVerified, None, None]:
    """Read every block, and yield the progress. ConvertError names the first block without numbers."""
    for chunk, damaged, progress in _each_chunk(parts, _damaged_block, threads):
        if damaged is not None:
            raise ConvertError(
                f"{parts[chunk.part].path}: {chunk.tensor.name} has a damaged block, number "
                f"{damaged:,}, not made of numbers. Convert or download it again."
            )
        yield progress


def _each_chunk(
    parts: Sequence[GgufHeader], check: Callable[[TensorChunk, bytes], Found], threads: int
) -> Generator[tuple[TensorChunk, Found, BytesVerified], None, None]:
    """Every chunk with what `check` finds in it and its bytes, and the progress."""
    bytes_total = sum(tensor.n_bytes for part in parts for tensor in part.tensors)
    bytes_done = 0
    with tensor_data(parts) as read:
        found = map_in_order(chunks_of(parts), lambda chunk: check(chunk, read(chunk)), threads)
        with closing(found):
            for chunk, result in found:
                bytes_done += chunk.n_bytes
                yield chunk, result, BytesVerified(chunk.tensor.name, bytes_done, bytes_total)


def _damaged_block(chunk: TensorChunk, raw: bytes) -> int | None:
    """The number within its tensor of the first block that is not valid; None when all are."""
    kind, content = chunk.tensor.kind, np.frombuffer(raw, dtype=np.uint8)
    if ggml.is_valid(content, kind):
        return None
    size, first, last = block_bytes(kind), 0, content.size // block_bytes(kind)
    while last - first > 1:
        middle = (first + last) // 2
        if ggml.is_valid(content[first * size : middle * size], kind):
            first = middle
        else:
            last = middle
    return chunk.start // block_size(kind) + first


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far values are from their source: sums over all values, and the largest difference."""

    squared_error: float = 0.0
    squared_source: float = 0.0
    max_abs: float = 0.0

    @property
    def relative_rms(self) -> float:
        """The root of the mean squared error over that of the source; infinite beside a source of zeros."""
        if self.squared_error == 0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_source) if self.squared_source else math.inf

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(
            self.squared_error + other.squared_error,
            self.squared_source + other.squared_source,
            max(self.max_abs, other.max_abs),
        )


@dataclass(frozen=True, slots=True)
class TypeReport:
    """The errors of the tensors of one type; `worst` is the tensor with the largest relative error."""

    kind: QuantType
    n_tensors: int
    total: Deviation
    worst: str
    worst_deviation: Deviation

    @property
    def limit(self) -> float:
        """The largest relative RMS error that the type can have."""
        return error_limit(self.kind)

    @property
    def is_plausible(self) -> bool:
        """Whether even the worst tensor is as near to its source as its type allows."""
        is_negligible = self.kind != QuantType.F32 and self.worst_deviation.max_abs <= NEGLIGIBLE
        return is_negligible or self.worst_deviation.relative_rms <= self.limit


def error_limit(kind: QuantType) -> float:
    """The largest relative RMS error that a tensor of `kind` can have when it was made from its source.

    FACTOR * 2**-b at b bits per weight. Every type, with an importance matrix and without, stayed below
    3.6 * 2**-b on normal, Laplace and Student-t (4 degrees of freedom) weights.
    """
    if kind in FLOAT_LIMITS:
        return FLOAT_LIMITS[kind]
    bits_per_weight = 8 * block_bytes(kind) / block_size(kind)
    return min(LARGEST_LIMIT, FACTOR * math.exp2(-bits_per_weight))


def compare(
    parts: Sequence[GgufHeader], read: Read, named: Sequence[NamedTensor], threads: int
) -> Generator[BytesVerified, None, tuple[TypeReport, ...]]:
    """Dequantize every tensor as llama.cpp does, compare it with its source, and yield the progress.

    The generator returns a report for each type, largest types first. `named` are the source's tensors under
    their GGUF names. Raises ConvertError when the two do not hold the same tensors in the same shapes, or
    when a value is not a number.
    """
    sources = {tensor.name: tensor for tensor in named}
    _check_same_tensors(parts, sources)
    deviations: dict[QuantType, dict[str, Deviation]] = {}

    def deviation(chunk: TensorChunk, content: bytes) -> Deviation:
        return _deviation(chunk, content, read, sources[chunk.tensor.name])

    for chunk, found, progress in _each_chunk(parts, deviation, threads):
        of_kind = deviations.setdefault(chunk.tensor.kind, {})
        of_kind[chunk.tensor.name] = of_kind.get(chunk.tensor.name, Deviation()) + found
        yield progress
    reports = [_report(kind, found) for kind, found in deviations.items()]
    return tuple(sorted(reports, key=lambda report: -report.n_tensors))


def _report(kind: QuantType, deviations: Mapping[str, Deviation]) -> TypeReport:
    worst = max(deviations, key=lambda name: deviations[name].relative_rms)
    total = sum(deviations.values(), Deviation())
    return TypeReport(kind, len(deviations), total, worst, deviations[worst])


def _deviation(chunk: TensorChunk, content: bytes, read: Read, named: NamedTensor) -> Deviation:
    kind, source_kind = chunk.tensor.kind, QuantType[named.source.dtype]
    size, total = tensor_bytes(source_kind, 1), Deviation()
    original = read(named.source, chunk.start * size, chunk.n_elements * size)
    for start in range(0, chunk.n_elements, SLICE_ELEMENTS):
        end = min(start + SLICE_ELEMENTS, chunk.n_elements)
        own = slice(tensor_bytes(kind, start), tensor_bytes(kind, end))
        expected = dequantize(original[start * size : end * size], source_kind)
        errors = dequantize(content[own], kind) - expected
        largest = float(max(errors.max(), -errors.min()))
        if not math.isfinite(largest):
            place = f"{named.source.shard}: {named.source.name}"
            raise ConvertError(f"{place} or {chunk.tensor.name} holds a value that is not a number.")
        total += Deviation(_squared(errors), _squared(expected), largest)
    return total


def _squared(values: ggml.Rows) -> float:
    """The sum of the squares, in float64. Not with BLAS, whose threads would get in each other's way."""
    return float(np.einsum("i,i->", values, values, dtype=np.float64))


def _check_same_tensors(parts: Sequence[GgufHeader], sources: Mapping[str, NamedTensor]) -> None:
    path = parts[0].path
    found = {tensor.name: tensor for part in parts for tensor in part.tensors}
    for name, named in sources.items():
        if name not in found:
            raise ConvertError(f"{path}: lacks {name} of the source: it was made from another one.")
        if found[name].shape != named.source.shape:
            shapes = f"{list(found[name].shape)}, its source {list(named.source.shape)}"
            raise ConvertError(f"{path}: {name} has shape {shapes}. It was made from another one.")
    for name in found:
        if name not in sources:
            raise ConvertError(f"{path}: holds {name!r}, unknown to the source: it was made from another.")
