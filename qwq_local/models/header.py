"""A GGUF file in, its header out: key-values and tensor table, read lazily and checked against the file.

Nothing of the tensor data is read, and array values are walked over, not kept, so a 152k-token vocabulary
costs a fraction of a second. Every length is checked against the file before it is used: llama.cpp aborts
the whole process on several kinds of damage. Knows the format, not the architecture (see architecture.py).
Source: the GGUF specification, version 3 (github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from qwq_local.errors import ModelFileError

MAGIC = b"GGUF"
TOKENS_KEY = "tokenizer.ggml.tokens"
MAX_DIMENSIONS = 4
_SPECIAL_TYPES = (3, 4)
MAX_STRING_BYTES = 16 << 20
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array value that was walked over: its element type, length, and the byte it starts at."""

    element_type: GGUFValueType
    length: int
    offset: int


Value = int | float | bool | str | ArrayInfo


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; `shape` is in ggml's order, innermost dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF says of itself: key-values, tensors by name, and the bytes of all its parts."""

    path: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    size_bytes: int

    def text(self, key: str, default: str = "") -> str:
        """The string under `key`, or the default when it is absent or not a string."""
        value = self.values.get(key, default)
        return value if isinstance(value, str) else default

    def integer(self, key: str) -> int | None:
        """The integer under `key`, or None."""
        value = self.values.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def parameters(self) -> int:
        """The number of weights in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def special_token_ids(header: Header) -> tuple[int, ...]:
    """The tokens that the file marks as control (type 3) or user-defined (type 4), in order."""
    types = header.values.get("tokenizer.ggml.token_type")
    if not isinstance(types, ArrayInfo) or types.element_type is not GGUFValueType.INT32:
        return ()
    with header.path.open("rb") as file:
        file.seek(types.offset)
        raw = file.read(4 * types.length)
    return tuple(i for i, (kind,) in enumerate(struct.iter_unpack("<i", raw)) if kind in _SPECIAL_TYPES)


def read_header(path: Path) -> Header:
    """The header of a GGUF file and, when it is the first of several parts, of them all.

    Raises ModelFileError in one line when the file is not a GGUF, is cut short, or contradicts itself.
    """
    first = _read_part(path)
    count = first.integer("split.count") or 0
    if count <= 1:
        return first
    match = _SPLIT_NAME.match(path.name)
    if match is None or int(match["part"]) != 1 or int(match["count"]) != count:
        raise ModelFileError(
            f"{path} is one of {count} parts: name the first, ending in -00001-of-{count:05}.gguf."
        )
    tensors = dict(first.tensors)
    size_bytes = first.size_bytes
    for part in range(2, count + 1):
        sibling = path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf")
        header = _read_part(sibling)
        tensors.update(header.tensors)
        size_bytes += header.size_bytes
    return Header(path, first.values, tensors, size_bytes)


def _read_part(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
            if head != MAGIC:
                raise ModelFileError(f"{path} is not a GGUF file: it begins with {head!r}, not b'GGUF'.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).header()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error


class _Reader:
    """Walks one mapped file; every step checks that the bytes are there."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._at = len(MAGIC)

    def header(self) -> Header:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise self._damaged(f"says GGUF version {version}; 2 and 3 are known")
        n_tensors, n_values = self._scalar("<Q"), self._scalar("<Q")
        # The smallest entry takes 13 bytes (value) or 32 (tensor): larger counts cannot be true.
        if n_values * 13 + n_tensors * 32 > self._size:
            raise self._damaged(f"claims {n_values} key-values and {n_tensors} tensors in {self._size} bytes")
        values: dict[str, Value] = {}
        for _ in range(n_values):
            key = self._string()
            if key in values:
                raise self._damaged(f"has the key {key!r} twice")
            values[key] = self._value(key)
        tensors = self._tensor_table(n_tensors)
        self._check_data(values, tensors)
        return Header(self._path, values, tensors, self._size)

    def _tensor_table(self, count: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = self._string()
            if name in tensors:
                raise self._damaged(f"has the tensor {name!r} twice")
            tensors[name] = self._tensor(name)
        return tensors

    def _tensor(self, name: str) -> TensorInfo:
        n_dims = self._scalar("<I")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            raise self._damaged(f"gives the tensor {name!r} {n_dims} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(n_dims))
        type_id, offset = self._scalar("<I"), self._scalar("<Q")
        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError:
            raise self._damaged(f"stores the tensor {name!r} in the unknown type {type_id}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or prod(shape) > 1 << 48 or shape[0] % block:
            raise self._damaged(f"gives the tensor {name!r} the impossible shape {shape} for {kind.name}")
        return TensorInfo(name, shape, kind, offset, prod(shape) // block * block_bytes)

    def _check_data(self, values: Mapping[str, Value], tensors: Mapping[str, TensorInfo]) -> None:
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"has the alignment {alignment}, not a power of two")
        start = -(-self._at // alignment) * alignment
        for tensor in tensors.values():
            if tensor.offset % alignment:
                raise self._damaged(f"places the tensor {tensor.name!r} off its alignment")
            end = start + tensor.offset + tensor.size_bytes
            if end > self._size:
                raise ModelFileError(
                    f"{self._path} is cut short: {tensor.name!r} ends at byte {end:,}, "
                    f"the file at {self._size:,}. Fetch or convert it again."
                )

    def _value(self, key: str) -> Value:
        try:
            kind = GGUFValueType(self._scalar("<I"))
        except ValueError:
            raise self._damaged(f"has a value of unknown type under {key!r}") from None
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        value: int | float | bool = self._scalar(_SCALARS[kind])
        return value

    def _array(self, key: str) -> ArrayInfo:
        try:
            kind = GGUFValueType(self._scalar("<I"))
        except ValueError:
            raise self._damaged(f"has an array of unknown type under {key!r}") from None
        length = self._scalar("<Q")
        if kind is GGUFValueType.ARRAY:
            raise self._damaged(f"nests arrays under {key!r}")
        offset = self._at
        if kind is GGUFValueType.STRING:
            self._skip_strings(length, key)
        else:
            self._skip(length * struct.calcsize(_SCALARS[kind]), key)
        return ArrayInfo(kind, length, offset)

    def _skip_strings(self, length: int, key: str) -> None:
        if length * 8 > self._size - self._at:
            raise self._damaged(f"claims {length} strings under {key!r}")
        unpack, view, size, at = struct.Struct("<Q").unpack_from, self._view, self._size, self._at
        distinct: set[bytes] = set()
        for index in range(length):
            if at + 8 > size:
                raise self._damaged(f"ends inside {key!r}")
            start = at + 8
            at = start + unpack(view, at)[0]
            if key == TOKENS_KEY:
                # llama.cpp asserts that no token is there twice; it gives empty ones a name of their own.
                distinct.add(view[start:at] or b"[EMPTY_%d]" % index)
        if at > size:
            raise self._damaged(f"ends inside {key!r}")
        if key == TOKENS_KEY and len(distinct) < length:
            raise self._damaged(f"has {length - len(distinct)} tokens twice")
        self._at = at

    def _skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self._size - self._at:
            raise self._damaged(f"ends inside {what!r}")
        self._at += n_bytes

    def _string(self) -> str:
        length = self._scalar("<Q")
        if length > min(MAX_STRING_BYTES, self._size - self._at):
            raise self._damaged(f"has a string of {length} bytes at byte {self._at}")
        raw = self._view[self._at : self._at + length]
        self._at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"has a string that is not UTF-8 at byte {self._at - length}") from None

    def _scalar(self, code: str) -> int:
        n_bytes = struct.calcsize(code)
        if self._at + n_bytes > self._size:
            raise self._damaged("ends inside its header")
        value: int = struct.unpack_from(code, self._view, self._at)[0]
        self._at += n_bytes
        return value

    def _damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path} is damaged: it {what}. Fetch or convert it again.")
