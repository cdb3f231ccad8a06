"""Conversions that end early in every way, and how the same command resumes them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.disk import partial_path
from qwq_convert.file_types import QuantType
from qwq_convert.key_values import parse_override
from qwq_convert.output import ConversionOutput, Journal, read_journal
from qwq_convert.pipeline import (
    ConversionDone,
    ConversionPlanned,
    ConversionRestarted,
    ConversionResumed,
    ConvertEvent,
    RowsWritten,
    TensorDone,
    convert,
    run_conversion,
)
from qwq_convert.plan import ConversionPlan, ConvertRequest, plan_conversion
from qwq_convert.quant_types import TypeOptions

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, store, weights, write_checkpoint, write_safetensors
from tests.command import QWQ, environment
from tests.convert.watched import wait_until

# A converter that takes one step for each line of input, so that it can be killed at any step.
STEPS = """
import sys; from pathlib import Path
from qwq_convert.pipeline import convert
from qwq_convert.plan import ConvertRequest
from qwq_local.wire import event_line
request = ConvertRequest(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), record_every_s=0, threads=2)
events = convert(request)
for _ in sys.stdin:
    print(event_line(next(events)), end="", flush=True)
"""
# Some seconds of work for one thread.
SLOW = CheckpointSpec(hidden_size=256, intermediate_size=512)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def request_(folder: Path) -> ConvertRequest:
    return ConvertRequest(folder, "Q4_0", folder.parent / "out.gguf", record_every_s=0)


@pytest.fixture
def expected(request_: ConvertRequest) -> bytes:
    """The bytes of an undisturbed conversion."""
    return run_conversion(replace(request_, out=request_.source / "undisturbed.gguf")).read_bytes()


def test_a_process_killed_again_and_again_ends_in_the_same_bytes(
    request_: ConvertRequest, expected: bytes
) -> None:
    """kill -9 after two events, then after three, and so on; each run resumes the one before."""
    kept = [0]
    for n_events in (2, 3, 5, 8, 11, 9):
        with stepping(request_) as process:
            events = [step(process) for _ in range(n_events)]
            if any(event["event"] == "tensor_done" for event in events):
                wait_until(lambda: n_recorded(request_) > kept[-1])
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not any(event["event"] == "started_over" for event in events)
        kept.append(n_recorded(request_))
    assert kept[:2] == [0, 0]
    assert all(earlier < later for earlier, later in pairwise(kept[1:]))
    _, resumed, *_ = convert(request_)
    assert isinstance(resumed, ConversionResumed)
    assert resumed.count == kept[-1]
    assert_finished(request_, expected)


def test_the_same_command_completes_a_killed_command(tmp_path: Path) -> None:
    """The real `qwq convert`, killed after a line of its --jsonl was read."""
    folder = write_checkpoint(tmp_path / "model", SLOW)
    request = ConvertRequest(folder, "IQ4_XS", tmp_path / "out.gguf")
    command = [*QWQ, "convert", str(folder), "IQ4_XS", "-o", str(request.out), "--jsonl", "--threads", "1"]
    variables = environment(tmp_path / "cache")
    for last in ('"planned"', '"tensor_done"'):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if last in line)
            process.kill()
        assert not request.out.exists()
    result = subprocess.run(command, capture_output=True, env=variables, text=True, check=True)
    assert "started_over" not in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["paths"] == [str(request.out)]
    assert_finished(request, run_conversion(replace(request, out=tmp_path / "undisturbed")).read_bytes())


def test_the_files_between_any_two_events_resume_to_the_same_bytes(
    request_: ConvertRequest, expected: bytes, tmp_path: Path
) -> None:
    """A kill -9 leaves the files as they are at that moment; copies are taken at each event."""
    kept = []
    for copy in copies_on_the_way(request_, tmp_path):
        events = list(convert(copy))
        kept += [event.count for event in events if isinstance(event, ConversionResumed)]
        assert_finished(copy, expected)
    assert kept
    assert kept == sorted(kept)


def test_only_what_the_journal_names_is_trusted_after_a_power_cut(
    request_: ConvertRequest, expected: bytes, tmp_path: Path
) -> None:
    """Unrecorded bytes may be anything: here they are noise, the header too until something is recorded."""
    plan = planned(request_)
    for copy in copies_on_the_way(request_, tmp_path):
        record = read_journal(journal_of(copy))
        assert record is not None
        spoil(copy, plan, record.finished)
        assert_finished_by(convert(copy), copy, expected)


def test_the_journal_names_a_tensor_only_after_its_bytes_were_synced(request_: ConvertRequest) -> None:
    """The interpreter's profiler records the order of the system calls in every thread."""
    plan = planned(request_)
    calls = SystemCalls(request_)
    with calls.watched():
        run_conversion(request_)
    recorded = 0
    for place, name in calls.recorded():
        tensor = next(each for each in plan.tensors if each.name == name)
        start = len(plan.files[0].header) + tensor.offset
        writes = [n for n, a, b in calls.writes() if a < start + tensor.n_bytes and b > start]
        syncs = [(n, m) for n, m in calls.syncs() if n > max(writes) and m < place]
        assert writes, name
        assert syncs, f"{name} is recorded before it was synced"
        recorded += 1
    assert recorded == len(plan.tensors)


def test_between_two_syncs_at_most_some_seconds_of_work_are_lost(request_: ConvertRequest) -> None:
    """Nothing is synced before the interval is over, and everything when the conversion ends in order."""
    events = convert(replace(request_, record_every_s=3600))
    drawn = [next(event for event in events if isinstance(event, TensorDone)) for _ in range(4)]
    record = read_journal(journal_of(request_))
    assert record is not None
    assert record.finished == frozenset()
    events.close()
    record = read_journal(journal_of(request_))
    assert record is not None
    assert record.finished == {event.name for event in drawn}


@pytest.mark.parametrize("n_bytes", [2_000, 40_000])
def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(
    n_bytes: int, request_: ConvertRequest
) -> None:
    """A real limit on the size of files stops the partial file from getting its length."""
    with file_size_limit(n_bytes), pytest.raises(ConvertError) as caught:
        run_conversion(request_)
    text = f"{request_.out}.partial: cannot be written (File too large). Free space or go elsewhere."
    assert str(caught.value) == text
    assert left_behind(request_) == []


def test_a_disk_that_fills_up_keeps_the_finished_tensors(request_: ConvertRequest, expected: bytes) -> None:
    """The limit falls during the run; when there is room again, the same request completes the file."""
    plan = planned(request_)
    last = max(plan.tensors, key=lambda tensor: tensor.offset)
    room = len(plan.files[0].header) + last.offset
    n_done = 0
    with ExitStack() as limit:

        def convert_until_full() -> None:
            nonlocal n_done
            for event in convert(request_):
                if isinstance(event, TensorDone):
                    n_done = event.index
                    limit.enter_context(file_size_limit(room))

        with pytest.raises(ConvertError, match=r"partial: cannot be written \(File too large\)"):
            convert_until_full()
    assert left_behind(request_) == ["out.gguf.partial", "out.gguf.partial.journal"]
    _, resumed, *_ = convert(request_)
    assert isinstance(resumed, ConversionResumed)
    assert resumed.count == n_done > 0
    assert_finished(request_, expected)


def test_a_full_disk_costs_only_what_the_journal_could_not_record(
    request_: ConvertRequest, expected: bytes
) -> None:
    """A full disk's half line is removed, so the next run does not read it joined to another."""
    events = convert(request_)
    next(event for event in events if isinstance(event, TensorDone))
    path = journal_of(request_)
    wait_until(lambda: b"tensor" in path.read_bytes())
    n_bytes = path.stat().st_size
    writer = Journal(path, planned(request_).fingerprint, is_new=False)
    with closing(writer), file_size_limit(n_bytes + 10), pytest.raises(OSError, match="File too large"):
        writer.append({"tensor": "blk.1.ffn_up.weight"})
    assert path.stat().st_size == n_bytes
    events.close()
    assert_finished_by(convert(request_), request_, expected)


def test_a_weight_that_is_not_a_number_stops_it_and_allowing_it_continues(tmp_path: Path) -> None:
    spec = CheckpointSpec()
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_safetensors(folder / "model.safetensors", {k: store(v, "BF16") for k, v in values.items()})
    request = ConvertRequest(folder, "Q8_0", tmp_path / "out.gguf", threads=1)
    with pytest.raises(ConvertError, match=r"up_proj\.weight holds nan at \[3, 4\].*--allow-nonfinite"):
        run_conversion(request)
    assert left_behind(request) == ["out.gguf.partial", "out.gguf.partial.journal"]
    allowed = replace(request, allow_nonfinite=True)
    events = list(convert(allowed))
    assert isinstance(events[1], ConversionResumed)
    assert events[1].count > 10
    assert {e.name: e.n_nonfinite for e in events if isinstance(e, TensorDone) and e.n_nonfinite} == {
        "blk.1.ffn_up.weight": 1
    }
    direct = replace(allowed, out=tmp_path / "direct.gguf")
    assert run_conversion(direct).read_bytes() == request.out.read_bytes()


def test_a_journal_cut_at_any_byte_counts_its_whole_lines(
    request_: ConvertRequest, expected: bytes, tmp_path: Path
) -> None:
    interrupt(request_, 6)
    content = journal_of(request_).read_bytes()
    for end in range(0, len(content), 17):
        copy = copied(request_, tmp_path / f"copy-{end}")
        journal_of(copy).write_bytes(content[:end])
        n_lines = content[:end].count(b"\n")
        events = list(convert(copy))
        assert [event.count for event in events if isinstance(event, ConversionResumed)] == [n_lines - 1] * (
            n_lines > 1
        )
        assert_finished(copy, expected)


def test_a_torn_line_does_not_spoil_the_next_one(request_: ConvertRequest) -> None:
    interrupt(request_, 6)
    path = journal_of(request_)
    path.write_bytes(path.read_bytes()[:-9])
    assert n_recorded(request_) == 5
    interrupt(request_, 8)
    assert n_recorded(request_) == 8


def _without_first_line(content: bytes) -> bytes:
    return content.partition(b"\n")[2]


def _renamed(content: bytes) -> bytes:
    """A journal of other tensors, which are not finished."""
    return content.replace(b"blk.0.", b"blk.1.")


def _bits_flipped(content: bytes) -> bytes:
    return bytes(byte ^ (4 if place % 40 == 0 else 0) for place, byte in enumerate(content))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "zeros behind": lambda content: content + bytes(4096),
    "first line lost": _without_first_line,
    "other names": _renamed,
    "bits flipped": _bits_flipped,
    "no text": lambda content: content[:-1] + b"\xff\xfe\n",
    "no object": lambda content: content + b"[]\n7\nnull\n",
    "nested": lambda content: content + b"[" * 100_000 + b"\n",
    "foreign tensor": lambda content: content + b'{"tensor":"blk.9.x.weight"}\n',
    "whole, it says": lambda content: content + b'{"whole":true}\n',
    "numbers": lambda content: content.replace(b'"blk.0', b'1234, "'),
    "other version": lambda content: content.replace(b'"version": 1', b'"version": 9'),
    "twice": lambda content: content + _without_first_line(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_never_damages_the_outcome(
    damage: str, request_: ConvertRequest, expected: bytes
) -> None:
    """No unfinished tensor counts as finished."""
    interrupt(request_, 9)
    path = journal_of(request_)
    plan, record = planned(request_), read_journal(path)
    assert record is not None
    spoil(request_, plan, record.finished)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    events = list(convert(request_))
    indexes = [event.index for event in events if isinstance(event, TensorDone)]
    assert indexes == list(range(indexes[0], len(plan.tensors) + 1))
    assert_finished(request_, expected)


def test_a_journal_of_another_conversion_is_not_believed(request_: ConvertRequest) -> None:
    """Also if only its first line was replaced: every line names its conversion."""
    interrupt(request_, 9)
    path, other = journal_of(request_), replace(request_, name="Another")
    first = Journal(path.with_name("first"), planned(other).fingerprint, is_new=True)
    first.close()
    path.write_bytes(first.path.read_bytes() + _without_first_line(path.read_bytes()))
    first.path.unlink()
    events = list(convert(other))
    assert not any(isinstance(event, ConversionResumed) for event in events)
    fresh = run_conversion(replace(other, out=other.out.with_name("fresh")))
    assert other.out.read_bytes() == fresh.read_bytes()


CHANGES: dict[str, Callable[[ConvertRequest], ConvertRequest]] = {
    "type": lambda request: replace(request, file_type="Q4_1"),
    "key": lambda request: replace(request, overrides=(parse_override("general.license=mit"),)),
    "output": lambda request: replace(request, types=TypeOptions(output=QuantType.Q5_1)),
    "name": lambda request: replace(request, name="Another"),
    "newer source": lambda request: _touched(request),
    "other source": lambda request: _moved(request),
}


def _touched(request: ConvertRequest) -> ConvertRequest:
    os.utime(request.source / "model.safetensors", ns=(1, 1))
    return request


def _moved(request: ConvertRequest) -> ConvertRequest:
    """Other weights of the same length."""
    folder = write_checkpoint(request.source.parent / "other" / "model")
    values = {name: store(-array, "BF16") for name, array in weights(CheckpointSpec()).items()}
    write_safetensors(folder / "model.safetensors", values)
    return replace(request, source=folder)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_or_option_starts_over_and_says_so(change: str, request_: ConvertRequest) -> None:
    interrupt(request_, 5)
    changed = CHANGES[change](request_)
    events = list(convert(changed))
    assert events[1] == ConversionRestarted(request_.out.with_name("out.gguf.partial"))
    assert not any(isinstance(event, ConversionResumed) for event in events)
    fresh = run_conversion(replace(changed, out=request_.out.with_name("fresh.gguf")))
    assert request_.out.read_bytes() == fresh.read_bytes()


def test_starting_over_removes_the_old_journal_before_the_old_bytes(request_: ConvertRequest) -> None:
    """A crash between the two leaves no record of bytes that are gone."""
    interrupt(request_, 9)
    calls = SystemCalls(request_)
    with calls.watched():
        run_conversion(replace(request_, overrides=(parse_override("general.type=motel"),)))
    names = [(file, name) for kind, file, name, _ in calls.all if kind == "c_return"]
    assert names.index(("journal", "fsync")) < names.index(("data", "ftruncate"))


def test_a_partial_file_of_another_length_is_not_resumed(request_: ConvertRequest, expected: bytes) -> None:
    interrupt(request_, 5)
    with request_.out.with_name("out.gguf.partial").open("ab") as file:
        file.write(b"more")
    events = list(convert(request_))
    assert not any(isinstance(event, ConversionResumed) for event in events)
    assert_finished(request_, expected)


def test_a_partial_file_without_a_journal_is_overwritten(request_: ConvertRequest, expected: bytes) -> None:
    request_.out.with_name("out.gguf.partial").write_bytes(b"x" * 10_000_000)
    events = list(convert(request_))
    assert isinstance(events[1], ConversionRestarted)
    assert_finished(request_, expected)


def test_starting_over_is_not_mentioned_when_nothing_was_finished(
    request_: ConvertRequest, expected: bytes
) -> None:
    with stepping(request_) as process:
        assert [step(process)["event"] for _ in range(2)] == ["planned", "written"]
        process.kill()
    assert left_behind(request_) == ["out.gguf.partial", "out.gguf.partial.journal"]
    events = list(convert(request_))
    assert isinstance(events[1], RowsWritten)
    assert_finished(request_, expected)


@pytest.mark.parametrize("n_named", range(5))
def test_after_a_crash_between_renames_only_the_names_are_missing(
    n_named: int, request_: ConvertRequest
) -> None:
    request = replace(request_, split_max_bytes=20_000)
    run_conversion(request)
    plan = planned(request)
    assert len(plan.files) == 4
    expected = [file.path.read_bytes() for file in plan.files]
    unnamed = as_before_the_names(plan, n_named)
    events = list(convert(request))
    count = len(plan.tensors)
    assert events == [
        ConversionPlanned(count, plan.bytes_of()),
        ConversionResumed(count, plan.bytes_of()),
        ConversionDone(tuple(file.path for file in plan.files), sum(map(len, expected))),
    ]
    assert [file.path.read_bytes() for file in plan.files] == expected
    assert left_behind(request) == sorted(file.path.name for file in plan.files)
    assert len(unnamed) == 4 - n_named


def test_a_file_that_was_removed_after_the_crash_is_made_again(
    request_: ConvertRequest, expected: bytes
) -> None:
    """The journal says that all is complete, but the file is gone."""
    run_conversion(request_)
    as_before_the_names(planned(request_), 1)
    request_.out.unlink()
    assert_finished_by(convert(request_), request_, expected)


def test_a_damaged_file_is_not_renamed(request_: ConvertRequest) -> None:
    run_conversion(request_)
    (unnamed,) = as_before_the_names(planned(request_), 0)
    content = bytearray(unnamed.read_bytes())
    content[:4] = b"FUGG"
    unnamed.write_bytes(content)
    with pytest.raises(ConvertError, match="is not a GGUF file"):
        run_conversion(request_)
    assert not request_.out.exists()


def test_a_file_that_appeared_meanwhile_is_not_overwritten(request_: ConvertRequest, expected: bytes) -> None:
    events = convert(request_)
    next(event for event in events if isinstance(event, TensorDone) and event.index == event.count)
    request_.out.write_text("mine")
    with pytest.raises(ConvertError, match=r"out\.gguf: exists already"):
        next(events)
    assert request_.out.read_text() == "mine"
    request_.out.unlink()
    _, resumed, *_ = convert(request_)
    assert isinstance(resumed, ConversionResumed)
    assert resumed.count == 27
    assert_finished(request_, expected)


def test_two_processes_at_once_do_not_disturb_each_other(request_: ConvertRequest, expected: bytes) -> None:
    """The second one fails with one line and changes nothing."""
    command = [*QWQ, "convert", str(request_.source), "Q4_0", "-o", str(request_.out)]
    variables = environment(request_.source / "cache")
    with stepping(request_) as first:
        events = [step(first) for _ in range(9)]
        result = subprocess.run(command, capture_output=True, env=variables, text=True)
        reason = f"{request_.out}.partial: another process is writing it. Wait for it or stop it."
        assert (result.returncode, result.stdout, result.stderr) == (1, "", f"qwq: {reason}\n")
        while events[-1]["event"] != "finished":
            events.append(step(first))
    assert_finished(request_, expected)


def test_a_second_run_on_the_finished_file_refuses(request_: ConvertRequest, expected: bytes) -> None:
    run_conversion(request_)
    with pytest.raises(ConvertError, match=r"out\.gguf: exists already\. Remove it or write to another name"):
        run_conversion(request_)
    assert_finished(request_, expected)


def test_after_a_failed_sync_nothing_more_is_recorded(request_: ConvertRequest) -> None:
    """After a failed sync a later one may succeed without the bytes, so nothing more is recorded."""
    plan = planned(request_)
    with ConversionOutput(plan.files, plan.fingerprint, record_every_s=0) as output:

        def mark_until_it_fails() -> None:
            while True:
                output.mark_finished("output.weight")

        n_bytes = journal_of(request_).stat().st_size
        with file_size_limit(n_bytes), pytest.raises(ConvertError, match=r"journal: cannot be written"):
            mark_until_it_fails()
        output.mark_finished("output_norm.weight")
    assert left_behind(request_) == []


def interrupt(request: ConvertRequest, n_tensors: int) -> None:
    """Convert until this number of tensors is finished and recorded."""
    with closing(convert(request)) as events:
        next(event for event in events if isinstance(event, TensorDone) and event.index == n_tensors)


def planned(request: ConvertRequest) -> ConversionPlan:
    with CheckpointFolder(request.source) as source:
        return plan_conversion(source, request)


def journal_of(request: ConvertRequest) -> Path:
    return request.out.with_name(f"{request.out.name}.partial.journal")


def copied(request: ConvertRequest, folder: Path) -> ConvertRequest:
    """The same request for a copy of the conversion's current files."""
    folder.mkdir()
    for path in request.out.parent.glob(f"{request.out.name}*"):
        shutil.copy(path, folder)
    return replace(request, out=folder / request.out.name)


def copies_on_the_way(request: ConvertRequest, folder: Path) -> list[ConvertRequest]:
    """Copies of the files at every third event; all but the first have something recorded."""
    copies = []
    for number, event in enumerate(convert(request)):
        if isinstance(event, TensorDone) and event.index == 1:
            wait_until(lambda: n_recorded(request) == 1)
        if number % 3 == 1 and not isinstance(event, ConversionDone):
            copies.append(copied(request, folder / f"copy-{number}"))
    return copies


def n_recorded(request: ConvertRequest) -> int:
    record = read_journal(journal_of(request))
    return 0 if record is None else len(record.finished)


def spoil(request: ConvertRequest, plan: ConversionPlan, finished: frozenset[str]) -> None:
    """Put noise in place of bytes that are not recorded, and of the header while nothing is recorded."""
    (file,) = plan.files
    noise = np.random.default_rng(5).integers(0, 256, file.n_bytes, np.uint8).tobytes()
    with request.out.with_name(f"{request.out.name}.partial").open("r+b") as content:
        if not finished:
            content.write(noise)
        for tensor in file.layout.tensors:
            if finished and tensor.name not in finished:
                content.seek(len(file.header) + tensor.offset)
                content.write(noise[: tensor.n_bytes])


def as_before_the_names(plan: ConversionPlan, n_named: int) -> list[Path]:
    """Undo the renames of finished files except the last `n_named`; returns the others."""
    unnamed = [partial_path(file.path) for file in plan.files[: len(plan.files) - n_named]]
    writer = Journal(
        partial_path(plan.files[0].path).with_suffix(".partial.journal"), plan.fingerprint, is_new=True
    )
    with closing(writer):
        writer.append(*({"tensor": tensor.name} for tensor in plan.tensors), {"whole": True})
    for file, path in zip(plan.files, unnamed, strict=False):
        file.path.rename(path)
    return unnamed


def assert_finished(request: ConvertRequest, expected: bytes) -> None:
    assert request.out.read_bytes() == expected
    assert [name for name in left_behind(request) if name.startswith("out.gguf")] == ["out.gguf"]


def assert_finished_by(events: Iterator[ConvertEvent], request: ConvertRequest, expected: bytes) -> None:
    *_, last = events
    assert isinstance(last, ConversionDone)
    assert_finished(request, expected)


def left_behind(request: ConvertRequest) -> list[str]:
    return sorted(path.name for path in request.out.parent.iterdir() if path != request.source)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Within the block this process cannot write a file longer than `n_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SystemCalls:
    """Calls that reach the disk, in order over all threads, from the interpreter's profiler."""

    def __init__(self, request: ConvertRequest) -> None:
        self._files = {"data": partial_path(request.out), "journal": journal_of(request)}
        self.all: list[tuple[str, str, str, Any]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, records calls of this thread and of those that it starts."""
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def writes(self) -> list[tuple[int, int, int]]:
        """When each write to the partial file ended, and its range."""
        return [(n, *seen) for n, seen in self._seen("c_return", "data", "pwrite")]

    def syncs(self) -> list[tuple[int, int]]:
        """When each sync of the partial file began and ended."""
        began = [n for n, _ in self._seen("c_call", "data", "fsync")]
        return list(zip(began, [n for n, _ in self._seen("c_return", "data", "fsync")], strict=True))

    def recorded(self) -> list[tuple[int, str]]:
        """When the write of each tensor's line to the journal began, and its name."""
        lines = [
            (n, line) for n, seen in self._seen("c_call", "journal", "write") for line in seen.split(b"\n")
        ]
        return [(n, json.loads(line)["tensor"]) for n, line in lines if b'"tensor"' in line]

    def _seen(self, kind: str, file: str, name: str) -> list[tuple[int, Any]]:
        wanted = (kind, file, name)
        return [(n, seen) for n, (*call, seen) in enumerate(self.all) if tuple(call) == wanted]

    def _see(self, frame: FrameType, kind: str, function: object) -> None:
        is_call = kind in ("c_call", "c_return")
        if not is_call or function not in (os.pwrite, os.write, os.fsync, os.ftruncate):
            return
        seen: object = None
        if function is os.pwrite:
            view = frame.f_locals.get("view", frame.f_locals["content"])
            seen = (frame.f_locals["offset"], frame.f_locals["offset"] + memoryview(view).nbytes)
        elif function is os.write:
            seen = frame.f_locals.get("content")
        self.all.append((kind, self._file(frame), getattr(function, "__name__", ""), seen))

    def _file(self, frame: FrameType) -> str:
        """Which of the two files the call uses: its descriptor is a local name or an attribute."""
        names = frame.f_locals
        descriptor = names.get("descriptor", getattr(names.get("self"), "_fd", -1))
        for name, path in self._files.items():
            if descriptor >= 0 and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return name
        return ""


@contextmanager
def stepping(request: ConvertRequest) -> Iterator[subprocess.Popen[str]]:
    """A process that converts, a step at a time; killed at the end of the block if it still runs."""
    command = [sys.executable, "-c", STEPS, str(request.source), request.file_type, str(request.out)]
    variables = environment(request.source / "cache")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=variables, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def step(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next event of the process, which then waits."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    event: dict[str, Any] = json.loads(process.stdout.readline())
    return event
