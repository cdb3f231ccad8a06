"""A conversion as a whole: its events, the files it leaves, and what stops it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from qwq_convert import ggml, output, pipeline
from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.gguf_file import read_header
from qwq_convert.layout import PlannedFile
from qwq_convert.parallel import ITEMS_PER_THREAD
from qwq_convert.pipeline import (
    ConversionDone,
    ConversionPlanned,
    ConversionResumed,
    RowsWritten,
    TensorDone,
    convert,
    run_conversion,
)
from qwq_convert.plan import ConvertRequest, plan_conversion
from qwq_convert.quantizer import THREADS_THAT_WAIT, TensorJob, quantized

from qwq_local.errors import ConvertError
from tests.checkpoints import (
    CheckpointSpec,
    edit_json,
    store,
    weights,
    write_checkpoint,
    write_safetensors,
    write_sparse,
)
from tests.command import ROOT
from tests.convert.watched import WatchedCheckpoint, wait_until

MINIATURE = ROOT / "miniature" / "checkpoint"
_MOST_AHEAD = (2 + THREADS_THAT_WAIT) * ITEMS_PER_THREAD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def request_(folder: Path) -> ConvertRequest:
    return ConvertRequest(folder, "Q8_0", folder.parent / "out.gguf")


def test_events_report_the_plan_each_tensor_and_the_end(request_: ConvertRequest) -> None:
    planned, *done, finished = convert(request_)
    header = read_header(request_.out)
    total = sum(tensor.n_bytes for tensor in header.tensors)
    assert planned == ConversionPlanned(len(header.tensors), total)
    tensors = [event for event in done if isinstance(event, TensorDone)]
    assert {event.name for event in tensors} == {tensor.name for tensor in header.tensors}
    assert [event.index for event in tensors] == list(range(1, len(tensors) + 1))
    assert {event.count for event in tensors} == {len(tensors)}
    assert all(earlier.bytes_done < later.bytes_done for earlier, later in pairwise(tensors))
    assert tensors[-1].bytes_done == tensors[-1].bytes_total == total
    assert finished == ConversionDone((request_.out,), request_.out.stat().st_size)


def test_progress_is_reported_within_a_tensor(tmp_path: Path) -> None:
    """A large tensor reports several times, so that a bar moves."""
    spec = CheckpointSpec(n_layers=1, hidden_size=256, vocab_size=3001)
    folder = write_checkpoint(tmp_path / "model", spec)
    events = list(convert(ConvertRequest(folder, "Q8_0", tmp_path / "out.gguf")))
    written = [event for event in events if isinstance(event, RowsWritten)]
    assert all(earlier.bytes_done < later.bytes_done for earlier, later in pairwise(written))
    assert sum(event.name == "output.weight" for event in written) == 3
    assert len([event for event in events if isinstance(event, TensorDone)]) == 15


def test_tensors_are_read_in_the_order_of_the_source(tmp_path: Path) -> None:
    """Shard after shard and forward, whatever the order in the GGUF, as suits disks and networks."""
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=3))
    with CheckpointFolder(folder) as inner:
        source = WatchedCheckpoint(inner)
        request = ConvertRequest(folder, "Q8_0", tmp_path / "out.gguf", threads=1)
        done = [event.name for event in convert(request, source) if isinstance(event, TensorDone)]
        places = [(tensor.shard, tensor.offset) for tensor in map(inner.tensors.__getitem__, source.reads)]
    assert places == sorted(places)
    assert len(source.reads) == len(done) == len(places)
    assert done != [tensor.name for tensor in read_header(request.out).tensors]


def test_weights_may_come_from_another_source_than_a_folder(request_: ConvertRequest) -> None:
    expected = run_conversion(request_).read_bytes()
    request_.out.unlink()
    with CheckpointFolder(request_.source) as inner:
        elsewhere = ConvertRequest(Path("nowhere"), request_.file_type, request_.out)
        *_, finished = convert(elsewhere, WatchedCheckpoint(inner))
    assert isinstance(finished, ConversionDone)
    assert request_.out.read_bytes() == expected


def test_nothing_is_written_before_the_plan_is_reported(request_: ConvertRequest) -> None:
    events = convert(request_)
    assert isinstance(next(events), ConversionPlanned)
    assert left_behind(request_) == []
    events.close()


def test_the_file_has_its_final_name_only_when_it_is_whole(request_: ConvertRequest) -> None:
    for event in convert(request_):
        if isinstance(event, TensorDone):
            assert not request_.out.exists()
            assert request_.out.with_name("out.gguf.partial").exists()
    assert left_behind(request_) == ["out.gguf"]


def test_a_conversion_abandoned_before_its_first_tensor_leaves_nothing(request_: ConvertRequest) -> None:
    """No file and no thread remains when the reader of the events stops."""
    events = convert(request_)
    assert [type(next(events)) for _ in range(2)] == [ConversionPlanned, RowsWritten]
    assert request_.out.with_name("out.gguf.partial").exists()
    events.close()
    assert left_behind(request_) == []
    assert not [each for each in threading.enumerate() if each.name.startswith(("quantize", "sync"))]


def test_a_conversion_abandoned_later_keeps_its_tensors(request_: ConvertRequest) -> None:
    events = convert(request_)
    done = next(event for event in events if isinstance(event, TensorDone) and event.index == 5)
    events.close()
    assert left_behind(request_) == ["out.gguf.partial", "out.gguf.partial.journal"]
    assert not [each for each in threading.enumerate() if each.name.startswith(("quantize", "sync"))]
    planned, resumed, *_ = convert(request_)
    assert planned == ConversionPlanned(done.count, done.bytes_total)
    assert resumed == ConversionResumed(5, done.bytes_done)
    assert left_behind(request_) == ["out.gguf"]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_a_number_is_named_with_its_position(
    dtype: str, file_type: str, bad: float, tmp_path: Path
) -> None:
    spec = CheckpointSpec(dtype=dtype, n_layers=1)
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["model.layers.0.mlp.down_proj.weight"][5, 7] = bad
    stored = {name: store(array, dtype) for name, array in values.items()}
    write_safetensors(folder / "model.safetensors", stored)
    request = ConvertRequest(folder, file_type, tmp_path / "out.gguf")
    with pytest.raises(ConvertError, match=rf"mlp\.down_proj\.weight holds {bad} at \[5, 7\]\. Download"):
        run_conversion(request)
    assert not request.out.exists()


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0", "Q4_K_M"])
def test_weights_that_are_not_numbers_are_counted_when_allowed(file_type: str, tmp_path: Path) -> None:
    """They stay in floats and are zero in quantized tensors; their neighbours do not change."""
    spec = CheckpointSpec(n_layers=1, hidden_size=256, intermediate_size=256, tied=True)
    outs = []
    for name, values in (("bad", (np.nan, np.inf)), ("zero", (0, 0))):
        folder = write_checkpoint(tmp_path / name / "model", spec)
        changed = weights(spec)
        changed["model.layers.0.mlp.up_proj.weight"][3, 4:6] = values
        write_safetensors(folder / "model.safetensors", {k: store(v, "BF16") for k, v in changed.items()})
        request = ConvertRequest(folder, file_type, tmp_path / f"{name}.gguf", allow_nonfinite=True)
        done = [event for event in convert(request) if isinstance(event, TensorDone)]
        counts = {event.name: event.n_nonfinite for event in done if event.n_nonfinite}
        assert counts == ({"blk.0.ffn_up.weight": 2} if name == "bad" else {})
        outs.append(request.out.read_bytes())
    differing = [i for i, (bad, zero) in enumerate(zip(*outs, strict=True)) if bad != zero]
    assert len(differing) <= 8 if file_type in ("F32", "BF16") else not differing


def test_a_weight_that_is_not_a_number_hides_no_weight_that_is_too_large(tmp_path: Path) -> None:
    spec = CheckpointSpec(dtype="F32", n_layers=1)
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["lm_head.weight"][0, :2] = np.nan, 1e38
    write_safetensors(folder / "model.safetensors", {k: store(v, "F32") for k, v in values.items()})
    for file_type in ("F16", "Q8_0"):
        request = ConvertRequest(folder, file_type, tmp_path / "out.gguf", allow_nonfinite=True)
        with pytest.raises(ConvertError, match=rf"lm_head\.weight has values too large for {file_type}"):
            run_conversion(request)


def test_a_weight_too_large_for_the_type_is_refused(tmp_path: Path) -> None:
    spec = CheckpointSpec(dtype="F32", n_layers=1)
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["lm_head.weight"][0, 0] = 1e6
    stored = {name: store(array, "F32") for name, array in values.items()}
    write_safetensors(folder / "model.safetensors", stored)
    with pytest.raises(ConvertError, match=r"lm_head\.weight has values too large for F16"):
        run_conversion(ConvertRequest(folder, "F16", tmp_path / "half.gguf"))
    run_conversion(ConvertRequest(folder, "BF16", tmp_path / "out.gguf"))


def test_an_unknown_file_type_lists_the_known_ones(request_: ConvertRequest) -> None:
    with pytest.raises(ConvertError, match=r"'Q9' is unknown. Choose from F32, F16, BF16, Q8_0, Q6_K"):
        run_conversion(ConvertRequest(request_.source, "Q9", request_.out))


def test_an_output_that_is_taken_is_refused_and_kept(request_: ConvertRequest) -> None:
    request_.out.write_text("mine")
    with pytest.raises(ConvertError, match="exists already"):
        run_conversion(request_)
    assert request_.out.read_text() == "mine"
    for out, message in ((request_.source, "is a folder"), (request_.source / "no" / "x", "no such folder")):
        with pytest.raises(ConvertError, match=message):
            run_conversion(ConvertRequest(request_.source, "Q8_0", out))


def test_a_second_conversion_to_the_same_file_is_refused_and_the_first_continues(
    request_: ConvertRequest,
) -> None:
    first = convert(request_)
    next(first)
    next(first)
    with pytest.raises(ConvertError, match=r"out\.gguf\.partial: another process is writing it"):
        run_conversion(request_)
    assert isinstance(list(first)[-1], ConversionDone)


def test_the_partial_file_of_a_killed_conversion_is_overwritten(request_: ConvertRequest) -> None:
    """A partial file that no living process locks does not stop a conversion."""
    expected = run_conversion(request_).read_bytes()
    request_.out.unlink()
    request_.out.with_name("out.gguf.partial").write_bytes(b"x" * 10_000_000)
    assert run_conversion(request_).read_bytes() == expected


def test_a_locked_partial_file_is_not_touched(request_: ConvertRequest) -> None:
    partial = request_.out.with_name("out.gguf.partial")
    partial.write_text("theirs")
    with partial.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another process is writing it"):
            run_conversion(request_)
    assert partial.read_text() == "theirs"


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    """A sparse checkpoint of some terabytes does not fit; its header shows that at once."""
    spec = CheckpointSpec(n_layers=1, tied=True)
    folder = write_checkpoint(tmp_path / "model", spec)
    edit_json(folder / "config.json", hidden_size=2**20, num_attention_heads=2**14, num_key_value_heads=1)
    write_sparse(folder / "model.safetensors", _resized(spec, {64: 2**20, 32: 64}))
    with pytest.raises(ConvertError, match=r"needs [0-9]{4,}\.[0-9] GiB, [0-9.]+ GiB free"):
        run_conversion(ConvertRequest(folder, "F32", tmp_path / "out.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_space_of_an_abandoned_partial_file_counts_as_free(request_: ConvertRequest) -> None:
    with CheckpointFolder(request_.source) as checkpoint:
        plan = plan_conversion(checkpoint, request_)
    request_.out.with_name("out.gguf.partial").write_bytes(b"x" * plan.n_bytes)
    output.check_output(plan.files, plan.fingerprint, free_bytes=lambda _: 0)
    longer = [PlannedFile(file.path, file.header + bytes(2**20), file.layout) for file in plan.files]
    with pytest.raises(ConvertError, match=r"needs 1\.1 MiB, 0\.1 MiB free\. Free some space or write"):
        output.check_output(longer, plan.fingerprint, free_bytes=lambda _: 0)


def test_no_more_than_a_few_chunks_are_read_ahead_of_a_slow_disk(request_: ConvertRequest) -> None:
    """While the disk takes nothing, the threads stop after a bounded number of reads."""
    may_write, wrote = threading.Event(), []

    def write(offset: int, content: ggml.Bytes) -> None:
        may_write.wait()
        wrote.append(content.nbytes)

    with CheckpointFolder(request_.source) as inner:
        source = WatchedCheckpoint(inner)
        tensors = plan_conversion(inner, request_).tensors
        chunks = quantized(source, [TensorJob(tensor, write) for tensor in tensors], threads=2)
        drawing = threading.Thread(target=lambda: list(chunks))
        drawing.start()
        try:
            wait_until(lambda: len(source.reads) == 2 + THREADS_THAT_WAIT)
            assert drawing.is_alive()
        finally:
            may_write.set()
            drawing.join()
        assert len(wrote) == len(source.reads) == len(tensors) > _MOST_AHEAD


def test_no_more_than_a_few_chunks_are_made_ahead_of_a_slow_reader(request_: ConvertRequest) -> None:
    with CheckpointFolder(request_.source) as inner:
        source = WatchedCheckpoint(inner)
        jobs = [TensorJob(tensor, lambda *_: None) for tensor in plan_conversion(inner, request_).tensors]
        chunks = quantized(source, jobs, threads=2)
        next(chunks)
        wait_until(lambda: len(source.reads) == _MOST_AHEAD)
        assert len(list(chunks)) == len(jobs) - 1
        assert len(source.reads) == len(jobs)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A process converts a checkpoint of 400 MB within 120 MB beside its libraries."""
    spec = CheckpointSpec(n_layers=1, tied=True)
    folder = write_checkpoint(tmp_path / "model", spec)
    edit_json(folder / "config.json", intermediate_size=2**20)
    write_sparse(folder / "model.safetensors", _resized(spec, {96: 2**20}))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from qwq_convert.pipeline import run_conversion\n"
        "from qwq_convert.plan import ConvertRequest\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "run_conversion(ConvertRequest(Path(sys.argv[1]), 'Q8_0', Path(sys.argv[2]), threads=2))\n"
        "print((peak() - before) // (1024 if sys.platform == 'linux' else 1024**2))\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "out.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": _paths()})
    assert int(result.stdout) < 120


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0"])
def test_the_miniature_has_the_name_that_is_given(file_type: str, tmp_path: Path) -> None:
    out = run_conversion(ConvertRequest(MINIATURE, file_type, tmp_path / "mini.gguf", name="Miniature QwQ"))
    assert read_header(out).value("general.name") == "Miniature QwQ"


def test_the_converter_imports_no_training_library() -> None:
    program = (
        f"import sys, {pipeline.__name__}; print([m for m in sys.modules if m in ('torch', 'transformers')])"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": _paths()})
    assert result.stdout.strip() == "[]"


def _resized(spec: CheckpointSpec, sizes: dict[int, int]) -> dict[str, list[int]]:
    """The shapes of a checkpoint with some sizes replaced."""
    return {
        name: [sizes.get(size, size) for size in map(int, array.shape)]
        for name, array in weights(spec).items()
    }


def left_behind(request: ConvertRequest) -> list[str]:
    """The files beside the checkpoint."""
    return sorted(path.name for path in request.out.parent.iterdir() if path != request.source)


def _paths() -> str:
    return f"{ROOT}:{ROOT / 'convert'}"
