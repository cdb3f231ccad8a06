"""Tensors and their types in; where each lies in which file out, and the header of each file.

Places follow llama-quantize (alignment 32, the last tensor padded too), names and keys of split models
llama.cpp's gguf-split. The header's bytes come from the gguf package. Knows no tensor data and no disk.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT as ALIGNMENT
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from qwq_convert.file_types import QuantType, tensor_bytes
from qwq_convert.key_values import KeyValues, split_keys
from qwq_convert.safetensors import SourceTensor
from qwq_convert.tensor_names import NamedTensor
from qwq_local.errors import ConvertError

# What the package takes a type from when it is not told one.
_UNUSED = np.dtype(np.float32)
MAX_FILES = 2**16 - 1  # as many as the 16 bits of split.count


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the GGUF before it is made: `offset` counts from the start of its file's tensor data."""

    name: str
    kind: QuantType
    source: SourceTensor
    offset: int
    n_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.source.shape


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The tensors of one file in its order; `n_bytes` is what they take with the padding after each one."""

    tensors: tuple[PlannedTensor, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file before it is written: its final name, its header with padding, its tensors."""

    path: Path
    header: bytes
    layout: FileLayout

    @property
    def n_bytes(self) -> int:
        """How long the file will be."""
        return len(self.header) + self.layout.n_bytes


def lay_out(
    tensors: Sequence[NamedTensor], kinds: Sequence[QuantType], max_bytes: int | None = None
) -> list[FileLayout]:
    """Where each tensor goes; a new file begins where `max_bytes` of tensors would be passed."""
    layouts: list[FileLayout] = []
    planned: list[PlannedTensor] = []
    offset = 0
    for tensor, kind in zip(tensors, kinds, strict=True):
        n_bytes = tensor_bytes(kind, tensor.source.n_elements)
        if planned and max_bytes is not None and offset + padded(n_bytes) > max_bytes:
            layouts.append(FileLayout(tuple(planned), offset))
            planned, offset = [], 0
        planned.append(PlannedTensor(tensor.name, kind, tensor.source, offset, n_bytes))
        offset += padded(n_bytes)
    layouts.append(FileLayout(tuple(planned), offset))
    if len(layouts) > MAX_FILES:
        raise ConvertError(f"--split-max-size: makes {len(layouts)} files, at most {MAX_FILES} are possible.")
    return layouts


def plan_files(out: Path, layouts: Sequence[FileLayout], key_values: KeyValues) -> tuple[PlannedFile, ...]:
    """The file at `out`, or the parts that llama.cpp finds when it is given the first one."""
    if len(layouts) == 1:
        return (PlannedFile(out, encode_header(key_values, layouts[0]), layouts[0]),)
    n_files, n_tensors = len(layouts), sum(len(layout.tensors) for layout in layouts)
    files = []
    for number, layout in enumerate(layouts):
        keys = (key_values if number == 0 else {}) | split_keys(number, n_files, n_tensors)
        files.append(PlannedFile(part_name(out, number, n_files), encode_header(keys, layout), layout))
    return tuple(files)


def part_name(out: Path, number: int, n_files: int) -> Path:
    """NAME-00001-of-0000N.gguf for part `number` (from 0) of NAME.gguf."""
    stem = out.name.removesuffix(".gguf")
    return out.with_name(f"{stem}-{number + 1:05}-of-{n_files:05}.gguf")


def encode_header(key_values: KeyValues, layout: FileLayout) -> bytes:
    """Key-values and tensor list as the file begins with them, padded to where tensor data starts."""
    writer = GGUFWriter(None, arch="")
    writer.kv_data = [key_values]
    for tensor in layout.tensors:
        # The package does not know every type of ours, but writes its number all the same.
        kind = cast(GGMLQuantizationType, tensor.kind)
        writer.add_tensor_info(tensor.name, tensor.shape, _UNUSED, tensor.n_bytes, raw_dtype=kind)
    content = io.BytesIO()
    writer.fout, writer.state = [cast(io.BufferedWriter, content)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return content.getvalue().ljust(padded(content.tell()), b"\0")


def padded(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment; llama-quantize pads the last tensor too."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
