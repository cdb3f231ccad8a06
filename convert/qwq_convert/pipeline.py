"""The whole conversion: a checkpoint folder and a file type in, events out, a GGUF file at the end.

Read `convert` from top to bottom: everything that can be known from headers is checked before the first
tensor is read, then rows are quantized and written in one pass, without an intermediate file.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from qwq_convert.checkpoint import CheckpointFolder, required_document
from qwq_convert.metadata import build_header
from qwq_convert.model_config import read_config
from qwq_convert.quant_types import find_file_type
from qwq_convert.quantize import available_threads, finished_rows
from qwq_convert.tensor_names import name_tensors
from qwq_convert.verify import verify_structure
from qwq_convert.writer import PartialFile, check_output, lay_out


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What to convert, to what and where; `name` replaces the model's own name in the GGUF."""

    source: Path
    file_type: str
    out: Path
    name: str | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything is checked and nothing written yet: how many tensors and bytes of them will be."""

    count: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class TensorDone:
    """Tensor number `index` (from 0) of `count` is written; `bytes_done` of `bytes_total` so far."""

    name: str
    index: int
    count: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The file is whole, checked, on the disk and under its final name."""

    path: Path
    n_bytes: int


ConvertEvent = Planned | TensorDone | Finished


def convert(request: ConvertRequest) -> Generator[ConvertEvent, None, None]:
    """Convert as asked, telling of each tensor. Work happens while the events are drawn.

    Raises ConvertError, before the first event when headers show the fault. On an error, and when the
    generator is closed early, no file is left.
    """
    file_type = find_file_type(request.file_type)
    with CheckpointFolder(request.source) as checkpoint:
        config = read_config(required_document(checkpoint, "config.json"))
        tensors = name_tensors(checkpoint.tensors, config)
        layout = lay_out(tensors, file_type)
        n_parameters = sum(tensor.source.n_elements for tensor in tensors)
        header = build_header(checkpoint, config, n_parameters, request.name, file_type)
        check_output(request.out, layout.n_bytes)
        count, bytes_total, bytes_done = len(layout.tensors), layout.tensor_bytes, 0
        yield Planned(count, bytes_total)

        threads = request.threads or available_threads()
        with (
            PartialFile(request.out, layout) as partial,
            closing(finished_rows(checkpoint, layout.tensors, threads)) as blocks,
        ):
            partial.write_header(header)
            for rows in blocks:
                partial.write(rows.offset, rows.content)
                bytes_done += rows.content.nbytes
                if rows.completes_tensor:
                    name = layout.tensors[rows.index].name
                    yield TensorDone(name, rows.index, count, bytes_done, bytes_total)
            verify_structure(partial.path, layout)
            n_bytes = partial.publish()
    yield Finished(request.out, n_bytes)


def run_conversion(request: ConvertRequest) -> Path:
    """Convert as asked without telling of it; the path of the finished file."""
    for _ in convert(request):
        pass
    return request.out
