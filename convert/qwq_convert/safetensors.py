"""One safetensors file and the tensors that it holds.

The format (Hugging Face's safetensors, README "Format"): a little-endian 64-bit length N, N bytes of JSON
that map each tensor's name to dtype, shape and data_offsets, then the data without gap or overlap. Everything
is checked against the file's real length before memory is allocated for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qwq_convert.disk import InputFile
from qwq_convert.strict_json import Fields, parse_object, shown
from qwq_local.errors import ConvertError

# The limit that the safetensors library itself sets.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a source, not read yet: `shape` has the rows first, `offset` is from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """How many values the tensor holds."""
        return math.prod(self.shape)

    def place(self, start: int, n_bytes: int) -> int:
        """The place of its byte `start` in the file. Raises ValueError unless `n_bytes` of it follow."""
        if start < 0 or start + n_bytes > self.n_bytes:
            raise ValueError(f"{n_bytes} bytes at {start} of {self.name}, which has {self.n_bytes}")
        return self.offset + start


class Shard(InputFile):
    """An open safetensors file. Its header has been read and agrees with the file's length."""

    def __init__(self, path: Path) -> None:
        """Open `path` and read its header. Raises ConvertError when the file is missing, cut or damaged."""
        super().__init__(path)
        self.name = path.name
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[SourceTensor, ...]:
        n_bytes = self.n_bytes
        if n_bytes < 8:
            raise ConvertError(f"{self.name}: has {n_bytes} bytes, too few. Download the file again.")
        header_bytes = int.from_bytes(self.read(8, 0), "little")
        if header_bytes > min(n_bytes - 8, MAX_HEADER_BYTES):
            raise ConvertError(
                f"{self.name}: asks for a header of {header_bytes} bytes and has {n_bytes} in all. "
                "It is cut or no safetensors file: download it again."
            )
        start = 8 + header_bytes
        header = parse_object(self.read(header_bytes, 8), self.name).values
        tensors = [self._read_entry(name, header[name], start) for name in header if name != "__metadata__"]
        position = start
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
            if tensor.offset != position:
                kind = "overlaps another" if tensor.offset < position else "leaves a gap before it"
                place = f"{self.name}: tensor {shown(tensor.name)}"
                raise ConvertError(f"{place} {kind}. Download the file again.")
            position += tensor.n_bytes
        if position != n_bytes:
            raise ConvertError(
                f"{self.name}: has {n_bytes} bytes, its header describes {position}. Download the file again."
            )
        return tuple(tensors)

    def _read_entry(self, name: str, value: object, start: int) -> SourceTensor:
        place = f"{self.name}: tensor {shown(name)}"
        if not isinstance(value, dict):
            raise ConvertError(f"{place} is {shown(value)}, expected an object. Download the file again.")
        entry = Fields(place, value)
        dtype = entry.optional_text("dtype") or ""
        if dtype not in DTYPE_BYTES:
            entry.fail(f"has the unknown dtype {shown(dtype)}. Use the original F32, F16 or BF16 weights.")
        shape = tuple(_sizes(entry, "shape"))
        offsets = _sizes(entry, "data_offsets")
        if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
            entry.fail("has a damaged shape or data_offsets. Download the file again.")
        begin, end = offsets
        if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
            entry.fail(f"has {end - begin} bytes, which do not fit its shape. Download the file again.")
        return SourceTensor(name, dtype, shape, self.name, start + begin, end - begin)


def _sizes(entry: Fields, key: str) -> list[int]:
    sizes: list[int] = []
    for value in entry.items(key):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            entry.fail(f"{key} holds {shown(value)}. Download the file again.")
        sizes.append(value)
    return sizes
