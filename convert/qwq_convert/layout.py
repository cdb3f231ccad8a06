"""Where each tensor lies in which file, and the header of each file.

Offsets are llama-quantize's: aligned to 32 bytes, with padding after the last tensor too. Split models have
the names and keys of llama.cpp's gguf-split. The gguf package encodes the headers.
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
from qwq_convert.model_config import NamedTensor
from qwq_convert.safetensors import SourceTensor
from qwq_local.errors import ConvertError

MAX_FILES = 2**16 - 1  # split.count has 16 bits


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the new GGUF; `offset` counts from the start of its file's tensor data."""

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
    """The tensors of one file in their order; `n_bytes` includes the padding after each one."""

    tensors: tuple[PlannedTensor, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to write: its final name, its header with padding, its tensors."""

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
    """The layout of each file. A new file begins where the tensors of one would exceed `max_bytes`."""
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
    """The file at `out`, or the parts of a split model."""
    if len(layouts) == 1:
        return (PlannedFile(out, encode_header(key_values, layouts[0]), layouts[0]),)
    n_files, n_tensors = len(layouts), sum(len(layout.tensors) for layout in layouts)
    files = []
    for number, layout in enumerate(layouts):
        keys = (key_values if number == 0 else {}) | split_keys(number, n_files, n_tensors)
        name = f"{out.name.removesuffix('.gguf')}-{number + 1:05}-of-{n_files:05}.gguf"
        files.append(PlannedFile(out.with_name(name), encode_header(keys, layout), layout))
    return tuple(files)


def encode_header(key_values: KeyValues, layout: FileLayout) -> bytes:
    """The start of the file: key-values and tensor list, padded to where tensor data starts."""
    writer = GGUFWriter(None, arch="")
    writer.kv_data = [key_values]
    for tensor in layout.tensors:
        # The package does not know every type, but it writes the number, and ignores the NumPy type.
        kind = cast(GGMLQuantizationType, tensor.kind)
        unused = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, unused, tensor.n_bytes, raw_dtype=kind)
    content = io.BytesIO()
    writer.fout, writer.state = [cast(io.BufferedWriter, content)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return content.getvalue().ljust(padded(content.tell()), b"\0")


def padded(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment; llama-quantize pads the last tensor too."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
