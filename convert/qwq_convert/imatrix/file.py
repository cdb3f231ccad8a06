"""The file of an importance matrix: reading, merging and writing.

Two formats are read: llama.cpp's GGUF one, which is also written, and the older .dat files
(tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp). Every length is checked against the
file before it is followed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT as ALIGNMENT
from gguf import GGUFValueType as ValueType
from gguf import Keys
from numpy.typing import NDArray

from qwq_convert.disk import write_errors
from qwq_convert.file_types import QuantType
from qwq_convert.ggml import Rows
from qwq_convert.gguf_file import MAGIC, MAX_NAME_BYTES, VERSION, GgufHeader, read_header
from qwq_local.errors import ConvertError
from qwq_local.files import atomic_file

SUMS_SUFFIX = ".in_sum2"
COUNTS_SUFFIX = ".counts"
DEFAULT_CHUNK_SIZE = 512
I32 = struct.Struct("<i")
MAX_I32 = 2**31 - 1
# Counts are 64-bit whole numbers in llama.cpp; a larger float is no count.
MAX_COUNT = 2.0**62


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Sums of squared activations per column of each weight, and over how many tokens.

    `sums` and `counts` have the same keys, names of weights such as `blk.0.attn_q.weight`. `counts` has one
    number per matrix, so one except for mixtures of experts. A `chunk_size` of 0 marks a .dat file: its sums
    are means times its count of chunks, not sums over tokens.
    """

    sums: Mapping[str, Rows]
    counts: Mapping[str, Rows]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def importance(self, name: str) -> Rows | None:
        """The weight of each column of `name`, exactly as llama-quantize computes it; None if absent.

        load_imatrix in tools/quantize/quantize.cpp: sums over counts; ones where nothing was counted, but in
        a .dat file the sums themselves.
        """
        if name not in self.sums:
            return None
        sums, counts = self.sums[name], self.counts[name]
        per_matrix = sums.reshape(len(counts), -1)
        counted = counts[:, None] > 0
        means = per_matrix / np.where(counted, counts[:, None], np.float32(1))
        uncounted = np.float32(1) if self.chunk_size else per_matrix
        weights: Rows = np.where(counted, means, uncounted).astype(np.float32, copy=False).reshape(-1)
        return weights


def read_imatrix(path: Path) -> ImportanceMatrix:
    """The importance matrix in a GGUF or a .dat file; the content shows which of the two it is.

    Raises ConvertError when the file is neither, is cut, or holds what no importance matrix can hold.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return _read_gguf(path)
            if not file.seek(0, os.SEEK_END):
                raise ConvertError(f"{path}: is empty. Collect it again with `qwq imatrix`.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _LegacyReader(path, content).read()
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror}).") from None


def write_imatrix(path: Path, matrix: ImportanceMatrix, note: tuple[str, str] | None = None) -> None:
    """Write the GGUF file that llama-imatrix writes, byte for byte; `note` is a key and text after its own.

    The file grows beside `path`, where a killed run leaves it for the next, and takes its place when it is on
    the disk. The caller locks out other processes. Raises ConvertError when it cannot be written.
    """
    with write_errors(path), atomic_file(path, beside=path.with_name(f"{path.name}.new")) as file:
        file.writelines(_encoded(matrix, note))


def merge(matrices: Iterable[ImportanceMatrix], chunk_size: int | None = None) -> ImportanceMatrix:
    """All matrices as one, summed in their order as `llama-imatrix --in-file` does.

    `chunk_size` is that of the outcome, by default the first one's. Raises ConvertError when two of them
    hold a weight in different sizes, as those of different models do.
    """
    matrices = list(matrices)
    if chunk_size is None:
        chunk_size = next((m.chunk_size for m in matrices if m.chunk_size), DEFAULT_CHUNK_SIZE)
    sums: dict[str, Rows] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for matrix in matrices:
        # A .dat file counts chunks and holds means; scaled, they are tokens and sums.
        scale = 1 if matrix.chunk_size else chunk_size
        for name, more in matrix.sums.items():
            into = sums.setdefault(name, np.zeros(len(more), np.float32))
            more_counts = matrix.counts[name].astype(np.int64) * scale
            counted = counts.setdefault(name, np.zeros(len(more_counts), np.int64))
            if len(counted) == 1 < len(more_counts):
                counted = counts[name] = np.repeat(counted, len(more_counts))
            if len(into) != len(more) or len(counted) != len(more_counts):
                raise ConvertError(
                    f"{name!r} has {len(into)} columns in one importance matrix and {len(more)} in another: "
                    "they belong to different models. Merge those of one model."
                )
            into += more * np.float32(scale)
            counted += more_counts
    most = max((int(counted.max()) for counted in counts.values()), default=0)
    return ImportanceMatrix(
        sums,
        {name: counted.astype(np.float32) for name, counted in counts.items()},
        tuple(dataset for matrix in matrices for dataset in matrix.datasets),
        most // chunk_size,
        chunk_size,
    )


def _encoded(matrix: ImportanceMatrix, note: tuple[str, str] | None) -> Iterable[bytes]:
    """The parts of the file, in order. gguf's writer adds keys and refuses an empty list."""
    fields = [
        _text(Keys.General.TYPE) + _u32(ValueType.STRING) + _text("imatrix"),
        _text(Keys.IMatrix.DATASETS)
        + _u32(ValueType.ARRAY, ValueType.STRING)
        + struct.pack("<Q", len(matrix.datasets))
        + b"".join(map(_text, matrix.datasets)),
        _text(Keys.IMatrix.CHUNK_COUNT) + _u32(ValueType.UINT32, matrix.chunk_count),
        _text(Keys.IMatrix.CHUNK_SIZE) + _u32(ValueType.UINT32, matrix.chunk_size),
    ]
    if note is not None:
        fields.append(_text(note[0]) + _u32(ValueType.STRING) + _text(note[1]))
    infos, tensors, offset = [], [], 0
    # Sorted as std::sort does, by bytes.
    for name in sorted(matrix.sums, key=str.encode):
        n_matrices = len(matrix.counts[name])
        for suffix, values in ((SUMS_SUFFIX, matrix.sums[name]), (COUNTS_SUFFIX, matrix.counts[name])):
            encoded = values.astype("<f4", copy=False).tobytes()
            n_columns = len(values) // n_matrices
            shape = (n_columns,) if n_matrices == 1 else (n_columns, n_matrices)
            full = name + suffix
            if len(full.encode("utf-8", "replace")) > MAX_NAME_BYTES:
                raise ConvertError(
                    f"{full!r} has more than the {MAX_NAME_BYTES} bytes of a tensor's name in a GGUF."
                )
            placed = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, QuantType.F32, offset)
            infos.append(_text(full) + placed)
            tensors.append(encoded + bytes(-len(encoded) % ALIGNMENT))
            offset += len(tensors[-1])
    header = MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(fields)) + b"".join(fields + infos)
    return [header, bytes(-len(header) % ALIGNMENT), *tensors]


def _u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(encoded)) + encoded


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    if (kind := header.get(Keys.General.TYPE)) not in (None, "imatrix"):
        raise ConvertError(
            f"{path}: holds a {str(kind)[:40]!r}, not an importance matrix. Name another file."
        )
    sums, counts = _read_tensors(header, SUMS_SUFFIX), _read_tensors(header, COUNTS_SUFFIX)
    for name in sums.keys() ^ counts.keys():
        _damaged(path, f"{name!r} has sums or counts, not both")
    if not sums:
        _damaged(path, "it holds no sums")
    for name, counted in counts.items():
        if len(sums[name]) % len(counted):
            _damaged(path, f"{name!r} has {len(sums[name])} sums and {len(counted)} counts")
        if not np.all((counted >= 0) & (counted < MAX_COUNT)):
            _damaged(path, f"{name!r} has a count of {counted.max()}")
        # std::lround of llama.cpp's loader: halves go up.
        counts[name] = np.floor(counted.astype(np.float64) + 0.5).astype(np.float32)
    key = Keys.IMatrix.DATASETS
    datasets = header.get(key)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        _damaged(path, f"{key} is missing or no list of texts")
    numbers = []
    for key, least in ((Keys.IMatrix.CHUNK_COUNT, 0), (Keys.IMatrix.CHUNK_SIZE, 1)):
        is_u32 = key in header.keys and header.kinds(key)[0] == ValueType.UINT32
        value = header.value(key) if is_u32 else None
        if not isinstance(value, int) or value < least:
            _damaged(path, f"{key} is {value}, expected a number from {least}")
        numbers.append(value)
    return ImportanceMatrix(sums, counts, tuple(map(str, datasets)), *numbers)


def _read_tensors(header: GgufHeader, suffix: str) -> dict[str, Rows]:
    """The tensors whose names end in `suffix`, flat, by the name without it."""
    found: dict[str, Rows] = {}
    with header.path.open("rb") as file:
        for tensor in header.tensors:
            if not tensor.name.endswith(suffix):
                continue
            if tensor.kind != QuantType.F32:
                _damaged(header.path, f"{tensor.name!r} is {tensor.kind.name}, expected F32")
            file.seek(header.data_start + tensor.offset)
            content = file.read(tensor.n_bytes)
            if len(content) != tensor.n_bytes:
                _damaged(header.path, f"it ends inside {tensor.name!r}")
            found[tensor.name.removesuffix(suffix)] = _checked(header.path, tensor.name, content)
    return found


def _checked(path: Path, name: str, content: bytes | memoryview) -> Rows:
    values = np.frombuffer(content, "<f4").astype(np.float32)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        index = int(wrong.argmax())
        _damaged(path, f"{name!r} has {values[index]} at column {index}, expected a sum of squares")
    return values


def _damaged(path: Path, reason: str) -> NoReturn:
    raise ConvertError(
        f"{path}: is no whole importance matrix, {reason}. Collect it again with `qwq imatrix`."
    )


class _LegacyReader:
    """A cursor over a .dat file that never leaves it.

    The file: a number of entries; for each the name, a number of chunks, a number of values and the values,
    each mean times that number of chunks; then the chunks of all and the name of the text, which the oldest
    files lack. Numbers have 32 bits, texts their length before them.
    """

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 0

    def read(self) -> ImportanceMatrix:
        sums: dict[str, Rows] = {}
        counts: dict[str, Rows] = {}
        # An entry takes 16 bytes at least: the length of its name, two numbers and a value.
        n_entries = self._number(1, (len(self._content) - I32.size) // 16, "entries")
        for _ in range(n_entries):
            name = self._text(MAX_NAME_BYTES)
            if name in sums or not name:
                _damaged(self._path, f"it holds {name!r} twice" if name else "an entry has no name")
            n_calls = self._number(0, MAX_I32, "chunks")
            n_bytes = 4 * self._number(1, MAX_I32, "values")
            counts[name] = np.array([n_calls], np.float32)
            sums[name] = _checked(self._path, name, self._take(n_bytes))
        chunk_count = self._number(0, MAX_I32, "chunks") if self._left else 0
        dataset = self._text(self._left) if self._left else ""
        if self._left:
            _damaged(self._path, f"{self._left} bytes follow its end")
        return ImportanceMatrix(sums, counts, (dataset,) if dataset else (), chunk_count, 0)

    @property
    def _left(self) -> int:
        return len(self._content) - self._at

    def _number(self, least: int, most: int, what: str) -> int:
        (number,) = I32.unpack(self._take(I32.size))
        if not least <= number <= most:
            _damaged(self._path, f"{number} {what} are no number of {what} in {len(self._content)} bytes")
        return int(number)

    def _text(self, most: int) -> str:
        raw = self._take(self._number(0, most, "letters"))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            _damaged(self._path, "a name is not UTF-8 text")
        return text

    def _take(self, n_bytes: int) -> bytes:
        if n_bytes > self._left:
            _damaged(self._path, f"it ends at byte {len(self._content)}, in the middle of an entry")
        self._at += n_bytes
        return self._content[self._at - n_bytes : self._at]
