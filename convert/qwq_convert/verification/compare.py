"""A GGUF and the checkpoint it is said to come from; out how far its values are from theirs, by type.

Every tensor is dequantized as llama.cpp does it and held against the source, value by value.
Knows no file formats: both sides come in as headers and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from qwq_convert import ggml
from qwq_convert.in_order import in_order
from qwq_convert.reading.gguf_header import GgufHeader, TensorEntry
from qwq_convert.reading.shard import SourceTensor
from qwq_convert.reading.tensor_data import Chunk, TensorData, chunks_of
from qwq_convert.tensor_names import NamedTensor
from qwq_convert.tensor_types import QuantType
from qwq_convert.verification.dequantize import dequantize
from qwq_convert.verification.verify import Progress
from qwq_local.errors import ConvertError

# Half a unit in the last place; from a checkpoint's floats to F32 nothing is lost.
FLOAT_LIMITS = {QuantType.F32: 0.0, QuantType.F16: 2.0**-11, QuantType.BF16: 2.0**-8}
FACTOR = 4.0
# All zeros are off by 1: no type may come near, whatever its bits.
LARGEST_LIMIT = 0.95
# Scales are F16, whose steps end at 2**-24, times integers up to 128: errors below that say nothing.
NEGLIGIBLE = 128 * 2.0**-25
# Values at a time, so that both sides stay in the processor's cache.
SLICE_ELEMENTS = 2**16

Read = Callable[[SourceTensor, int, int], bytes]
"""Bytes of a source tensor from a byte of it on, called from several threads: a checkpoint's `read`."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far values are from their source: sums over all of them, and the largest difference."""

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
    """What became of the tensors of one type; `worst` is the one farthest from its source, relatively."""

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
        """Whether even the worst tensor is as near as its type brings it."""
        worst = self.worst_deviation
        if self.kind != QuantType.F32 and worst.max_abs <= NEGLIGIBLE:
            return True
        return worst.relative_rms <= self.limit


def error_limit(kind: QuantType) -> float:
    """The largest relative RMS error that a tensor of `kind` can have when it was made from its source.

    FACTOR * 2**-b at b bits per weight. Every type, with an importance matrix and without, stayed below
    3.6 * 2**-b on normal, Laplace and Student-t (4 degrees of freedom) weights.
    """
    if kind in FLOAT_LIMITS:
        return FLOAT_LIMITS[kind]
    bits_per_weight = 8 * ggml.block_bytes(kind) / ggml.block_size(kind)
    return min(LARGEST_LIMIT, FACTOR * math.exp2(-bits_per_weight))


def compare(
    parts: Sequence[GgufHeader], read: Read, named: Sequence[NamedTensor], threads: int
) -> Generator[Progress, None, tuple[TypeReport, ...]]:
    """Read both sides, telling how far; the generator's value is one report a type, largest types first.

    `named` are the source's tensors under their GGUF names. ConvertError when the two do not hold the
    same tensors in the same shapes, or when a value is not a number.
    """
    sources = {tensor.name: tensor for tensor in named}
    _check_same_tensors(parts, sources)
    with TensorData(parts) as data:

        def deviation(chunk: Chunk) -> Deviation:
            return _deviation(chunk, data.read(chunk), read, sources[chunk.tensor.name])

        chunks = (c for number, tensor in _tensors(parts) for c in chunks_of(number, tensor))
        bytes_total = sum(tensor.n_bytes for _, tensor in _tensors(parts))
        tally, done = _Tally(), 0
        with closing(in_order(chunks, deviation, threads)) as results:
            for chunk, found in results:
                tally.add(chunk, found)
                done += chunk.n_bytes
                yield Progress(chunk.tensor.name, done, bytes_total)
    return tally.reports()


@dataclass(slots=True)
class _Tally:
    """Deviations as they come in, chunk after chunk of one tensor after the other."""

    _tensor: Deviation = field(default_factory=Deviation)
    _reports: dict[QuantType, TypeReport] = field(default_factory=dict)

    def add(self, chunk: Chunk, found: Deviation) -> None:
        self._tensor += found
        if not chunk.completes_tensor:
            return
        kind, name, tensor = chunk.tensor.kind, chunk.tensor.name, self._tensor
        self._tensor = Deviation()
        report = self._reports.get(kind)
        if report is None:
            self._reports[kind] = TypeReport(kind, 1, tensor, name, tensor)
            return
        worst = (report.worst, report.worst_deviation)
        if tensor.relative_rms > report.worst_deviation.relative_rms:
            worst = (name, tensor)
        self._reports[kind] = TypeReport(kind, report.n_tensors + 1, report.total + tensor, *worst)

    def reports(self) -> tuple[TypeReport, ...]:
        return tuple(sorted(self._reports.values(), key=lambda report: -report.n_tensors))


def _deviation(chunk: Chunk, content: bytes, read: Read, named: NamedTensor) -> Deviation:
    kind, source_kind = chunk.tensor.kind, QuantType[named.source.dtype]
    size, total = ggml.tensor_bytes(source_kind, 1), Deviation()
    original = read(named.source, chunk.start * size, chunk.n_elements * size)
    for start in range(0, chunk.n_elements, SLICE_ELEMENTS):
        end = min(start + SLICE_ELEMENTS, chunk.n_elements)
        own = slice(ggml.tensor_bytes(kind, start), ggml.tensor_bytes(kind, end))
        expected = dequantize(original[start * size : end * size], source_kind)
        errors = dequantize(content[own], kind) - expected
        largest = float(max(errors.max(), -errors.min()))
        if not math.isfinite(largest):
            place = f"{named.source.shard}: {named.source.name}"
            raise ConvertError(f"{place} or {chunk.tensor.name} holds a value that is not a number.")
        total += Deviation(_squared(errors), _squared(expected), largest)
    return total


def _squared(values: ggml.Rows) -> float:
    """The sum of the squares, in float64. Not by BLAS, whose threads would wait for each other's."""
    return float(np.einsum("i,i->", values, values, dtype=np.float64))


def _tensors(parts: Sequence[GgufHeader]) -> Iterator[tuple[int, TensorEntry]]:
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            yield number, tensor


def _check_same_tensors(parts: Sequence[GgufHeader], sources: Mapping[str, NamedTensor]) -> None:
    path = parts[0].path
    found = {tensor.name: tensor for _, tensor in _tensors(parts)}
    for name, named in sources.items():
        if name not in found:
            raise ConvertError(f"{path}: lacks {name} of the source: it was made from another one.")
        if found[name].shape != named.source.shape:
            shapes = f"{list(found[name].shape)}, its source {list(named.source.shape)}"
            raise ConvertError(f"{path}: {name} has shape {shapes}. It was made from another one.")
    for name in found:
        if name not in sources:
            raise ConvertError(f"{path}: holds {name!r}, unknown to the source: it was made from another.")
