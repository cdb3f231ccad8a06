"""A GGUF file in; nothing out when the file is sound, else one error that says where it is not.

`verify_structure` looks at the header and the file's length alone, against a plan; `verify_blocks` reads
every block of every tensor, of all parts of a split model. Knows nothing of how the file was made, nor of
what its architecture needs.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwq_convert import ggml
from qwq_convert.in_order import in_order
from qwq_convert.layout import Layout
from qwq_convert.reading.gguf_header import GgufHeader, TensorEntry, read_header
from qwq_convert.reading.tensor_data import Chunk, TensorData, chunks_of
from qwq_convert.verification.dequantize import is_known
from qwq_local.errors import ConvertError


@dataclass(frozen=True, slots=True)
class Progress:
    """`bytes_done` of `bytes_total` are read; `tensor` is the one that is being read."""

    tensor: str
    bytes_done: int
    bytes_total: int


def verify_structure(path: Path, layout: Layout) -> None:
    """ConvertError unless the GGUF holds exactly the tensors planned, where they were planned."""
    header = read_header(path)
    for planned, found in zip(layout.tensors, header.tensors, strict=False):
        expected = TensorEntry(planned.name, planned.kind, planned.shape, planned.offset, planned.n_bytes)
        if found != expected:
            raise ConvertError(f"{path}: holds {found}, planned was {expected}. Convert again.")
    if len(header.tensors) != len(layout.tensors):
        counts = f"{len(header.tensors)} tensors, planned were {len(layout.tensors)}"
        raise ConvertError(f"{path}: holds {counts}. Convert again.")
    if header.file_bytes != header.data_start + layout.n_bytes:
        sizes = f"{header.file_bytes} bytes, planned were {header.data_start + layout.n_bytes}"
        raise ConvertError(f"{path}: has {sizes}. Convert again.")


def verify_placement(part: GgufHeader) -> None:
    """ConvertError unless the tensors follow each other as llama.cpp insists: in the header's order, with
    no more between them than the padding to the alignment (ggml/src/gguf.cpp).
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
    """How many bytes lie behind the last tensor and its padding; 0 in a file as it was written."""
    end = max((tensor.offset + tensor.n_bytes for tensor in part.tensors), default=0)
    padded_end = part.data_start + -(-end // part.alignment) * part.alignment
    return max(0, part.file_bytes - padded_end)


def verify_blocks(parts: Sequence[GgufHeader], threads: int) -> Generator[Progress, None, None]:
    """Read everything, telling how far; ConvertError names the first block without numbers."""
    chunks = (
        chunk
        for number, part in enumerate(parts)
        for tensor in part.tensors
        for chunk in chunks_of(number, tensor)
    )
    bytes_total = sum(tensor.n_bytes for part in parts for tensor in part.tensors)
    bytes_done = 0
    with TensorData(parts) as data:

        def damaged_block(chunk: Chunk) -> int | None:
            return _damaged_block(np.frombuffer(data.read(chunk), dtype=np.uint8), chunk)

        with closing(in_order(chunks, damaged_block, threads)) as results:
            for chunk, damaged in results:
                if damaged is not None:
                    raise ConvertError(
                        f"{parts[chunk.part].path}: {chunk.tensor.name} has a damaged block, number "
                        f"{damaged:,}, not made of numbers. Convert or download it again."
                    )
                bytes_done += chunk.n_bytes
                yield Progress(chunk.tensor.name, bytes_done, bytes_total)


def _damaged_block(content: ggml.Bytes, chunk: Chunk) -> int | None:
    """The number within its tensor of the first block that is not valid; None when all are."""
    kind = chunk.tensor.kind
    if ggml.is_valid(content, kind):
        return None
    size, first, last = ggml.block_bytes(kind), 0, content.size // ggml.block_bytes(kind)
    while last - first > 1:
        middle = (first + last) // 2
        if ggml.is_valid(content[first * size : middle * size], kind):
            first = middle
        else:
            last = middle
    return chunk.start // ggml.block_size(kind) + first
