"""The whole conversion: a source and a file type in, events out, a GGUF at the end.

Read `convert` from top to bottom: everything that can be known from headers is checked before the first
tensor is read, then rows are quantized and written in one pass, without an intermediate file.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from pathlib import Path

from qwq_convert.checkpoint import Checkpoint
from qwq_convert.plan import Plan, open_source, plan_conversion
from qwq_convert.quantize import Job, available_threads, quantized
from qwq_convert.request import ConvertEvent as ConvertEvent
from qwq_convert.request import ConvertRequest as ConvertRequest
from qwq_convert.request import Finished as Finished
from qwq_convert.request import Planned as Planned
from qwq_convert.request import Resumed as Resumed
from qwq_convert.request import StartedOver as StartedOver
from qwq_convert.request import TensorDone as TensorDone
from qwq_convert.request import Written as Written
from qwq_convert.verification.verify import verify_structure
from qwq_convert.writing.output import Output, check_output


def convert(
    request: ConvertRequest, checkpoint: Checkpoint | None = None
) -> Generator[ConvertEvent, None, None]:
    """Convert as asked, telling of each step. Work happens while the events are drawn.

    `checkpoint` supplies headers and tensors instead of the request's source. Raises ConvertError, before the
    first event when headers show the fault. Whatever ends it early, the same request goes on from the last
    whole tensor.
    """
    with open_source(request.source) if checkpoint is None else nullcontext(checkpoint) as source:
        plan = plan_conversion(source, request)
        check_output(plan.files, plan.fingerprint)
        count, bytes_total = len(plan.tensors), plan.tensor_bytes
        yield Planned(count, bytes_total, plan.unweighted)

        with Output(plan.files, plan.fingerprint, request.record_every_s) as output:
            if output.started_over:
                yield StartedOver(output.paths[0])
            index, bytes_done = len(output.finished), plan.bytes_of(output.finished)
            if index:
                yield Resumed(index, bytes_done)
            jobs = _jobs(plan, output, allow_nonfinite=request.allow_nonfinite)
            n_nonfinite = 0
            with closing(quantized(source, jobs, request.threads or available_threads())) as chunks:
                for rows in chunks:
                    name, bytes_done = rows.tensor.name, bytes_done + rows.n_bytes
                    n_nonfinite += rows.n_nonfinite
                    yield Written(name, bytes_done, bytes_total)
                    if rows.completes_tensor:
                        output.mark_finished(name)
                        index += 1
                        yield TensorDone(name, index, count, bytes_done, bytes_total, n_nonfinite)
                        n_nonfinite = 0
            for path, file in zip(output.paths, plan.files, strict=True):
                verify_structure(path, file.layout)
            n_bytes = output.publish()
    yield Finished(tuple(file.path for file in plan.files), n_bytes)


def run_conversion(request: ConvertRequest) -> Path:
    """Convert as asked without telling of it; the path of the finished file, or of its first part."""
    paths: tuple[Path, ...] = ()
    for event in convert(request):
        if isinstance(event, Finished):
            paths = event.paths
    return paths[0]


def _jobs(plan: Plan, output: Output, *, allow_nonfinite: bool) -> list[Job]:
    """The tensors that are not finished yet, in the order in which they lie in the source."""
    placed = [
        (number, tensor)
        for number, file in enumerate(plan.files)
        for tensor in file.layout.tensors
        if tensor.name not in output.finished
    ]
    placed.sort(key=lambda each: (each[1].source.shard, each[1].source.offset))
    return [
        Job(tensor, output.writer_of(number, tensor), plan.importance.get(tensor.name), allow_nonfinite)
        for number, tensor in placed
    ]
