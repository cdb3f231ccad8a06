"""GGUF files: the header, decoded where asked for, the parts of a split model, and the tensor data.

The module reads the format itself (ggml's docs/gguf.md, version 3), because gguf-py's reader takes many
seconds for a vocabulary of 152,000 tokens. Every length is checked against the file before it is followed, so
a damaged header costs no more memory than the file has bytes.

Split models are named NAME-00001-of-0000N.gguf; their `split.*` keys number the parts (llama.cpp's
src/llama-model-loader.cpp, tools/gguf-split).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from qwq_convert.disk import InputFile
from qwq_convert.file_types import BLOCKS, QuantType, tensor_bytes
from qwq_convert.strict_json import named, shown
from qwq_local.errors import ConvertError

MAGIC = b"GGUF"
VERSION = 3
MAX_DIMENSIONS = 4
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63
I64_MAX = 2**63 - 1
SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
LENGTH = struct.Struct("<Q")
WORD = struct.Struct("<I")
# Whole blocks of every type, and so large that handing a chunk to a thread costs little.
CHUNK_ELEMENTS = 2**20
NUMBERS = frozenset(int(kind) for kind in QuantType)

Value = str | int | float | bool | list[str] | list[int] | list[float]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the header lists it: rows first in `shape`, `offset` from the start of the data."""

    name: str
    kind: QuantType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _Field:
    """The place of a value in the header; `item` is the type of an array's items."""

    kind: GGUFValueType
    item: GGUFValueType | None
    count: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file, kept as bytes; values are decoded when asked for."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_start: int
    file_bytes: int
    _fields: Mapping[str, _Field]
    _content: bytes

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all key-values, in file order."""
        return tuple(self._fields)

    def encoded(self, key: str) -> tuple[GGUFValueType, bytes]:
        """The type of a key-value and its bytes in the file."""
        field = self._fields[key]
        return field.kind, self._content[field.start : field.end]

    def kinds(self, key: str) -> tuple[GGUFValueType, GGUFValueType | None]:
        """The type of a key-value, and the type of its items when it is an array."""
        return self._fields[key].kind, self._fields[key].item

    def array_length(self, key: str) -> int | None:
        """The number of values in the array under `key`; None when there is no array."""
        field = self._fields.get(key)
        return None if field is None or field.item is None else field.count

    def n_distinct(self, key: str) -> int:
        """How many different texts the array under `key` holds; each empty one counts."""
        field, content = self._fields[key], self._content
        if field.item is not GGUFValueType.STRING:
            raise ConvertError(f"{self.path}: {key} does not hold texts. Convert or download it again.")
        at, unpack, distinct = field.start, LENGTH.unpack_from, set()
        for index in range(field.count):
            start = at + LENGTH.size
            at = start + unpack(content, at)[0]
            distinct.add(content[start:at] or index)
        return len(distinct)

    def value(self, key: str) -> Value:
        """The value under `key`. Raises KeyError when there is none, ConvertError for invalid UTF-8."""
        field = self._fields[key]
        kind = field.kind if field.item is None else field.item
        if kind == GGUFValueType.STRING:
            texts = _texts(self._content, field, f"{self.path}: {named(key)}")
            return texts if field.item is not None else texts[0]
        code = SCALARS[kind].format.lstrip("<")
        numbers = list(struct.unpack_from(f"<{field.count}{code}", self._content, field.start))
        return numbers if field.item is not None else numbers[0]

    def get(self, key: str) -> Value | None:
        """The value under `key`, or None. Raises ConvertError for invalid UTF-8."""
        return self.value(key) if key in self._fields else None


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF at `path`. Raises ConvertError when it is cut, damaged or of another version."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise ConvertError(f"{path}: is empty. Convert or download it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).read()
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror}).") from None


class _Reader:
    """A cursor over the header's bytes that never leaves the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._end = len(content)
        self._at = 0

    def read(self) -> GgufHeader:
        if self._content[: len(MAGIC)] != MAGIC:
            raise ConvertError(f"{self._path}: is not a GGUF file.")
        self._at = len(MAGIC)
        if (version := self._word()) != VERSION:
            raise ConvertError(f"{self._path}: has GGUF version {version}, expected {VERSION}.")
        # The smallest key-value is an empty key, a type and one byte; the smallest tensor a name, a size, a
        # type and an offset.
        n_tensors, n_fields = self._count(least_bytes=32), self._count(least_bytes=13)
        fields = self._read_fields(n_fields)
        alignment = self._alignment(fields)
        tensors = tuple(self._read_tensors(n_tensors, alignment).values())
        data_start = -(-self._at // alignment) * alignment
        header = bytes(self._content[: self._at])
        self._check_placement(tensors, data_start)
        return GgufHeader(self._path, tensors, alignment, data_start, self._end, fields, header)

    def _read_fields(self, n_fields: int) -> dict[str, _Field]:
        fields: dict[str, _Field] = {}
        for _ in range(n_fields):
            key = self._text(MAX_KEY_BYTES)
            if key in fields:
                self._fail(f"key {shown(key)} appears twice")
            kind, item, count = self._value_type(), None, 1
            if kind == GGUFValueType.ARRAY:
                item, count = self._value_type(), self._count(least_bytes=0)
            start = self._at
            self._skip_values(kind if item is None else item, count)
            fields[key] = _Field(kind, item, count, start, self._at)
        return fields

    def _skip_values(self, kind: GGUFValueType, count: int) -> None:
        if kind == GGUFValueType.ARRAY:
            self._fail("an array holds arrays")
        if kind != GGUFValueType.STRING:
            self._advance(count * SCALARS[kind].size)
            return
        if count > (self._end - self._at) // LENGTH.size:
            self._fail("an array is longer than the file")
        # The loop over a vocabulary. It calls no method per token, to be fast.
        content, at, last, unpack = self._content, self._at, self._end - LENGTH.size, LENGTH.unpack_from
        for _ in range(count):
            if at > last:
                self._fail("the file ends in the middle of its header")
            at += LENGTH.size + unpack(content, at)[0]
        self._at = at
        self._advance(0)

    def _alignment(self, fields: Mapping[str, _Field]) -> int:
        field = fields.get("general.alignment")
        if field is None:
            return int(GGUF_DEFAULT_ALIGNMENT)
        if field.kind != GGUFValueType.UINT32:
            self._fail("general.alignment is no 32-bit number")
        alignment: int = WORD.unpack_from(self._content, field.start)[0]
        if alignment == 0 or alignment & (alignment - 1):
            self._fail(f"general.alignment {alignment} is no power of two")
        return alignment

    def _read_tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorEntry]:
        tensors: dict[str, TensorEntry] = {}
        for _ in range(n_tensors):
            name = self._text(MAX_NAME_BYTES)
            n_dimensions = self._word()
            if name in tensors or not 1 <= n_dimensions <= MAX_DIMENSIONS:
                self._fail(f"tensor {name!r} appears twice or has {n_dimensions} dimensions")
            shape = tuple(reversed([self._long() for _ in range(n_dimensions)]))
            number, offset = self._word(), self._long()
            if number not in NUMBERS:
                self._fail(f"tensor {name!r} has the unknown type {number}")
            kind = QuantType(number)
            n_elements = math.prod(shape)
            block, block_bytes = BLOCKS[kind]
            if not 0 < n_elements <= I64_MAX or shape[-1] % block or offset % alignment:
                self._fail(f"tensor {name!r} has an impossible shape or offset")
            tensors[name] = TensorEntry(name, kind, shape, offset, n_elements // block * block_bytes)
        return tensors

    def _check_placement(self, tensors: tuple[TensorEntry, ...], data_start: int) -> None:
        position = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < position:
                self._fail(f"tensor {tensor.name!r} overlaps another")
            position = tensor.offset + tensor.n_bytes
            if (end := data_start + position) > self._end:
                raise ConvertError(
                    f"{self._path}: is cut short, {tensor.name!r} ends at byte {end:,}, the file at "
                    f"{self._end:,}. Convert or download it again."
                )

    def _value_type(self) -> GGUFValueType:
        number = self._word()
        if number > max(GGUFValueType):
            self._fail(f"a value has the unknown type {number}")
        return GGUFValueType(number)

    def _text(self, most_bytes: int) -> str:
        n_bytes = self._long()
        if n_bytes > most_bytes:
            self._fail(f"a name has {n_bytes} bytes, at most {most_bytes} are allowed")
        self._advance(n_bytes)
        try:
            return self._content[self._at - n_bytes : self._at].decode("utf-8")
        except UnicodeDecodeError:
            self._fail("a name is not UTF-8 text")

    def _count(self, least_bytes: int) -> int:
        count = self._long()
        if count * least_bytes > self._end:
            self._fail(f"{count} entries do not fit in {self._end} bytes")
        return count

    def _word(self, form: struct.Struct = WORD) -> int:
        self._advance(form.size)
        value: int = form.unpack_from(self._content, self._at - form.size)[0]
        return value

    def _long(self) -> int:
        return self._word(LENGTH)

    def _advance(self, n_bytes: int) -> None:
        self._at += n_bytes
        if self._at > self._end:
            self._fail("the file ends in the middle of its header")

    def _fail(self, reason: str) -> NoReturn:
        raise ConvertError(f"{self._path}: damaged GGUF header, {reason}. Convert or download it again.")


def _texts(content: bytes, field: _Field, place: str) -> list[str]:
    texts, at = [], field.start
    try:
        for _ in range(field.count):
            (n_bytes,) = LENGTH.unpack_from(content, at)
            at += LENGTH.size + n_bytes
            texts.append(content[at - n_bytes : at].decode("utf-8"))
    except UnicodeDecodeError:
        raise ConvertError(f"{place} is not UTF-8 text. Convert or download it again.") from None
    return texts


def read_parts(path: Path) -> tuple[GgufHeader, ...]:
    """The header of the GGUF at `path`, or the headers of all parts when it is the first of several.

    Raises ConvertError when a part is missing, damaged, out of place or not the first, or repeats a tensor.
    """
    first = read_header(path)
    parts = [first]
    owners = {tensor.name: path for tensor in first.tensors}
    count = _number(first, "split.count") or 1
    ending = f"-00001-of-{count:05}.gguf"
    if count > 1 and (not path.name.endswith(ending) or _number(first, "split.no") != 0):
        raise ConvertError(f"{path} is one of {count} parts: name the first, ending in {ending}.")
    for number in range(1, count):
        sibling = path.with_name(f"{path.name.removesuffix(ending)}-{number + 1:05}-of-{count:05}.gguf")
        part = read_header(sibling)
        if (stated := _number(part, "split.no")) != number:
            raise ConvertError(f"{sibling}: says it is part {stated}, should be {number}. Fetch it again.")
        for tensor in part.tensors:
            if (owner := owners.setdefault(tensor.name, sibling)) != sibling:
                raise ConvertError(f"{sibling}: {tensor.name!r} is in {owner.name} too. Fetch both again.")
        parts.append(part)
    stated = _number(first, "split.tensors.count")
    if stated is not None and stated != len(owners):
        raise ConvertError(f"{path}: its parts hold {len(owners)} tensors, it says {stated}. Fetch them.")
    return tuple(parts)


def _number(header: GgufHeader, key: str) -> int | None:
    value = header.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True, slots=True)
class TensorChunk:
    """`n_elements` values of a tensor from element `start`; `part` is its file in a split model, from 0."""

    part: int
    tensor: TensorEntry
    start: int
    n_elements: int

    @property
    def n_bytes(self) -> int:
        """The bytes of the values in the file."""
        return tensor_bytes(self.tensor.kind, self.n_elements)


@contextmanager
def tensor_data(parts: Sequence[GgufHeader]) -> Iterator[Callable[[TensorChunk], bytes]]:
    """A function that reads a chunk from a GGUF or its parts; several threads may call it at once.

    It raises ConvertError when the disk fails or the file was cut meanwhile.
    """
    with ExitStack() as opened:
        files = [opened.enter_context(InputFile(part.path)) for part in parts]

        def read(chunk: TensorChunk) -> bytes:
            start = tensor_bytes(chunk.tensor.kind, chunk.start)
            at = parts[chunk.part].data_start + chunk.tensor.offset + start
            return files[chunk.part].read(chunk.n_bytes, at)

        yield read


def chunks_of(parts: Sequence[GgufHeader]) -> Iterator[TensorChunk]:
    """All tensors in chunks of whole blocks, first to last."""
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            n_elements = math.prod(tensor.shape)
            for start in range(0, n_elements, CHUNK_ELEMENTS):
                yield TensorChunk(number, tensor, start, min(CHUNK_ELEMENTS, n_elements - start))
