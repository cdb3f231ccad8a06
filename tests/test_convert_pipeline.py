"""A conversion as a whole: its events, what is left behind, and what stops it."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from qwq_convert import pipeline, writer
from qwq_convert.checkpoint import CheckpointFolder, required_document
from qwq_convert.gguf_header import read_header
from qwq_convert.model_config import read_config
from qwq_convert.pipeline import ConvertRequest, Finished, Planned, TensorDone, convert, run_conversion
from qwq_convert.quant_types import find_file_type
from qwq_convert.quantize import CHUNKS_PER_THREAD, finished_rows
from qwq_convert.shard import SourceTensor
from qwq_convert.tensor_names import name_tensors
from qwq_convert.writer import lay_out

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, edit_json, store, weights, write_checkpoint, write_safetensors

MINIATURE = Path(__file__).parent.parent / "miniature" / "checkpoint"


class CountedCheckpoint:
    """A checkpoint that counts how often tensors are read."""

    def __init__(self, inner: CheckpointFolder) -> None:
        self.n_reads = 0
        self.label = inner.label
        self.tensors = inner.tensors
        self.document = inner.document
        self._inner = inner

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        self.n_reads += 1
        return self._inner.read(tensor, start, n_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def request_(folder: Path) -> ConvertRequest:
    return ConvertRequest(folder, "Q8_0", folder.parent / "out.gguf")


def test_events_tell_of_the_plan_of_each_tensor_and_of_the_end(request_: ConvertRequest) -> None:
    planned, *done, finished = convert(request_)
    header = read_header(request_.out)
    total = sum(tensor.n_bytes for tensor in header.tensors)
    assert planned == Planned(len(header.tensors), total)
    tensors = [event for event in done if isinstance(event, TensorDone)]
    assert tensors == done
    assert [event.name for event in tensors] == [tensor.name for tensor in header.tensors]
    assert [event.index for event in tensors] == list(range(len(tensors)))
    assert all(earlier.bytes_done < later.bytes_done for earlier, later in pairwise(tensors))
    assert tensors[-1].bytes_done == tensors[-1].bytes_total == total
    assert finished == Finished(request_.out, request_.out.stat().st_size)


def test_nothing_is_written_before_the_plan_is_told(request_: ConvertRequest) -> None:
    events = convert(request_)
    assert isinstance(next(events), Planned)
    assert [path.name for path in request_.out.parent.iterdir()] == ["model"]
    events.close()


def test_the_file_has_its_final_name_only_when_it_is_whole(request_: ConvertRequest) -> None:
    for event in convert(request_):
        if isinstance(event, TensorDone):
            assert not request_.out.exists()
            assert request_.out.with_name("out.gguf.partial").exists()
    assert [path.name for path in sorted(request_.out.parent.iterdir())] == ["model", "out.gguf"]


def test_a_conversion_that_is_left_early_leaves_nothing(request_: ConvertRequest) -> None:
    """No file and no thread stays when the reader of the events goes away."""
    events = convert(request_)
    next(events)
    next(events)
    events.close()
    assert [path.name for path in request_.out.parent.iterdir()] == ["model"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("quantize")]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named_with_its_place(
    dtype: str, file_type: str, bad: float, tmp_path: Path
) -> None:
    spec = CheckpointSpec(dtype=dtype, n_layers=1)
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["model.layers.0.mlp.down_proj.weight"][5, 7] = bad
    stored = {name: store(array, dtype) for name, array in values.items()}
    write_safetensors(folder / "model.safetensors", stored)
    with pytest.raises(ConvertError, match=rf"mlp\.down_proj\.weight holds {bad} at \[5, 7\]"):
        run_conversion(ConvertRequest(folder, file_type, tmp_path / "out.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_too_large_for_the_type_is_refused(tmp_path: Path) -> None:
    spec = CheckpointSpec(dtype="F32", n_layers=1)
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["lm_head.weight"][0, 0] = 1e6
    stored = {name: store(array, "F32") for name, array in values.items()}
    write_safetensors(folder / "model.safetensors", stored)
    with pytest.raises(ConvertError, match=r"lm_head\.weight has values too large for F16"):
        run_conversion(ConvertRequest(folder, "F16", tmp_path / "out.gguf"))
    run_conversion(ConvertRequest(folder, "BF16", tmp_path / "out.gguf"))


def test_an_unknown_file_type_lists_the_known_ones(request_: ConvertRequest) -> None:
    with pytest.raises(ConvertError, match=r"'Q9' is unknown. Choose from F32, F16, BF16, Q8_0"):
        run_conversion(ConvertRequest(request_.source, "Q9", request_.out))


def test_an_output_that_is_taken_is_refused_and_kept(request_: ConvertRequest) -> None:
    request_.out.write_text("mine")
    with pytest.raises(ConvertError, match="exists already"):
        run_conversion(request_)
    assert request_.out.read_text() == "mine"
    for out, message in ((request_.source, "is a folder"), (request_.source / "no" / "x", "no such folder")):
        with pytest.raises(ConvertError, match=message):
            run_conversion(ConvertRequest(request_.source, "Q8_0", out))


def test_a_second_conversion_to_the_same_file_is_refused_and_the_first_goes_on(
    request_: ConvertRequest,
) -> None:
    first = convert(request_)
    next(first)
    next(first)
    with pytest.raises(ConvertError, match=r"out\.gguf\.partial: another process is writing it"):
        run_conversion(request_)
    assert isinstance(list(first)[-1], Finished)


def test_what_a_killed_conversion_left_behind_is_written_over(request_: ConvertRequest) -> None:
    """A partial file that no living process holds is no obstacle and leaves no trace."""
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


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """A sparse checkpoint of some terabytes really does not fit; its header says so at once."""
    spec = CheckpointSpec(n_layers=1, tied=True)
    folder = write_checkpoint(tmp_path / "model", spec)
    edit_json(folder / "config.json", hidden_size=2**20, num_attention_heads=2**14, num_key_value_heads=1)
    _write_sparse(folder / "model.safetensors", _resized(spec, {64: 2**20, 32: 64}))
    with pytest.raises(ConvertError, match=r"needs [0-9]{4,}\.[0-9] GiB, [0-9.]+ GiB free"):
        run_conversion(ConvertRequest(folder, "F32", tmp_path / "out.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_space_of_an_abandoned_partial_file_counts_as_free(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.with_name("out.gguf.partial").write_bytes(b"x" * 2**20)
    writer.check_output(out, 2**20, free_bytes=lambda _: 0)
    with pytest.raises(ConvertError, match=r"0\.0 GiB free"):
        writer.check_output(out, 2**21, free_bytes=lambda _: 0)


@pytest.mark.parametrize("limit_bytes", [2_000, 60_000])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(
    limit_bytes: int, folder: Path, tmp_path: Path
) -> None:
    """A real limit on file size, in a process of its own, is met in the header or by the tensors."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from qwq_convert.pipeline import ConvertRequest, run_conversion\n"
        "from qwq_local.errors import ConvertError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try: run_conversion(ConvertRequest(Path(sys.argv[1]), 'Q8_0', Path(sys.argv[2])))\n"
        "except ConvertError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, *map(str, (folder, tmp_path / "out.gguf", limit_bytes))]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PYTHONPATH": _paths()}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "out.gguf.partial: cannot be written (File too large)" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_more_than_a_few_chunks_are_read_ahead_of_a_slow_disk(folder: Path) -> None:
    """With a reader that draws one block and then waits, the threads stop after a bounded number of reads."""
    with CheckpointFolder(folder) as checkpoint:
        counted = CountedCheckpoint(checkpoint)
        tensors = name_tensors(checkpoint.tensors, read_config(required_document(checkpoint, "config.json")))
        layout = lay_out(tensors, find_file_type("Q8_0"))
        blocks = finished_rows(counted, layout.tensors, threads=2)
        next(blocks)
        time.sleep(0.2)
        assert 1 <= counted.n_reads <= 2 * CHUNKS_PER_THREAD < len(layout.tensors)
        assert len(list(blocks)) == len(layout.tensors) - 1
        assert counted.n_reads == len(layout.tensors)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A checkpoint of 400 MB is converted by a process that never holds 120 MB beside its libraries."""
    spec = CheckpointSpec(n_layers=1, tied=True)
    folder = write_checkpoint(tmp_path / "model", spec)
    edit_json(folder / "config.json", intermediate_size=2**20)
    _write_sparse(folder / "model.safetensors", _resized(spec, {96: 2**20}))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from qwq_convert.pipeline import ConvertRequest, run_conversion\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "run_conversion(ConvertRequest(Path(sys.argv[1]), 'Q8_0', Path(sys.argv[2]), threads=2))\n"
        "print((peak() - before) // (1024 if sys.platform == 'linux' else 1024**2))\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "out.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": _paths()})
    assert int(result.stdout) < 120


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0"])
def test_the_miniature_converts_in_well_under_three_seconds(file_type: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    out = run_conversion(ConvertRequest(MINIATURE, file_type, tmp_path / "mini.gguf", name="Miniature QwQ"))
    assert time.perf_counter() - start < 3
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


def _write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A BF16 safetensors file that is all zeros and takes no room."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def _paths() -> str:
    root = Path(__file__).parent.parent
    return f"{root}:{root / 'convert'}"
