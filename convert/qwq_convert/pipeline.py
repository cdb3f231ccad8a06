"""The whole conversion of a source to a file type, as a sequence of events.

Read `convert` from top to bottom: everything that headers show is checked before the first tensor is read.
Then rows are quantized and written in one pass, without an intermediate file.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qwq_convert.checkpoint import Checkpoint
from qwq_convert.output import ConversionOutput, check_output
from qwq_convert.plan import ConversionPlan, ConvertRequest, open_source, plan_conversion
from qwq_convert.quantizer import TensorJob, available_threads, quantized
from qwq_convert.verification import verify_structure


def convert(
    request: ConvertRequest, checkpoint: Checkpoint | None = None
) -> Generator[ConvertEvent, None, None]:
    """Convert, and yield an event for each step. The work is done while the caller takes the events.

    `checkpoint` supplies headers and tensors in place of the request's source. Raises ConvertError; for a
    fault that headers show, before the first event. After an interruption, the same request continues after
    the last whole tensor.
    """
    with open_source(request.source) if checkpoint is None else nullcontext(checkpoint) as source:
        plan = plan_conversion(source, request)
        check_output(plan.files, plan.fingerprint)
        count, bytes_total = len(plan.tensors), plan.bytes_of()
        yield ConversionPlanned(count, bytes_total, plan.unweighted)

        with ConversionOutput(plan.files, plan.fingerprint, request.record_every_s) as output:
            if output.started_over:
                yield ConversionRestarted(output.paths[0])
            index, bytes_done = len(output.finished), plan.bytes_of(output.finished)
            if index:
                yield ConversionResumed(index, bytes_done)
            jobs = _jobs(plan, output, allow_nonfinite=request.allow_nonfinite)
            n_nonfinite = 0
            with closing(quantized(source, jobs, request.threads or available_threads())) as chunks:
                for rows in chunks:
                    name, bytes_done = rows.tensor.name, bytes_done + rows.n_bytes
                    n_nonfinite += rows.n_nonfinite
                    yield RowsWritten(name, bytes_done, bytes_total)
                    if rows.completes_tensor:
                        output.mark_finished(name)
                        index += 1
                        yield TensorDone(name, index, count, bytes_done, bytes_total, n_nonfinite)
                        n_nonfinite = 0
            for path, file in zip(output.paths, plan.files, strict=True):
                verify_structure(path, file.layout)
            n_bytes = output.publish()
    yield ConversionDone(tuple(file.path for file in plan.files), n_bytes)


def run_conversion(request: ConvertRequest) -> Path:
    """Convert, and return the path of the finished file or of its first part."""
    paths: tuple[Path, ...] = ()
    for event in convert(request):
        if isinstance(event, ConversionDone):
            paths = event.paths
    return paths[0]


def _jobs(plan: ConversionPlan, output: ConversionOutput, *, allow_nonfinite: bool) -> list[TensorJob]:
    """The tensors that are not finished yet, in the order of their places in the source."""
    placed = [
        (number, tensor)
        for number, file in enumerate(plan.files)
        for tensor in file.layout.tensors
        if tensor.name not in output.finished
    ]
    placed.sort(key=lambda each: (each[1].source.shard, each[1].source.offset))
    return [
        TensorJob(tensor, output.writer_of(number, tensor), plan.importance.get(tensor.name), allow_nonfinite)
        for number, tensor in placed
    ]


@dataclass(frozen=True, slots=True)
class ConversionPlanned:
    """Everything is checked and nothing is written yet: `count` tensors of `bytes_total` bytes together.

    `unweighted` are the tensors that the importance matrix lacks, when there is one.
    """

    event_name: ClassVar[str] = "planned"
    count: int
    bytes_total: int
    unweighted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConversionResumed:
    """`count` tensors of an earlier run of the same conversion are kept, `bytes_done` bytes."""

    event_name: ClassVar[str] = "resumed"
    count: int
    bytes_done: int


@dataclass(frozen=True, slots=True)
class ConversionRestarted:
    """The partial file at `path` was that of another conversion, or of an older source."""

    event_name: ClassVar[str] = "started_over"
    path: Path


@dataclass(frozen=True, slots=True)
class RowsWritten:
    """More rows of the tensor `name` are written: `bytes_done` of `bytes_total` in all."""

    event_name: ClassVar[str] = "written"
    name: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class TensorDone:
    """The tensor `name`, `index` (from 1) of `count`, is whole; `n_nonfinite` weights were no numbers."""

    name: str
    index: int
    count: int
    bytes_done: int
    bytes_total: int
    n_nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class ConversionDone:
    """The model is whole, checked, on the disk and under its final name: one file or all parts."""

    event_name: ClassVar[str] = "finished"
    paths: tuple[Path, ...]
    n_bytes: int


ConvertEvent = (
    ConversionPlanned | ConversionResumed | ConversionRestarted | RowsWritten | TensorDone | ConversionDone
)
