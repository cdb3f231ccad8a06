"""Collecting an importance matrix: against float64 NumPy, interrupted and resumed, with other builds."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_cpp._ggml import libggml
from qwq_convert.imatrix.collector import ActivationSums, CollectorSettings, GgmlTensor, check_layout, planes
from qwq_convert.imatrix.file import read_imatrix
from qwq_convert.imatrix.run import (
    CalibrationText,
    CollectionDone,
    CollectionInterrupted,
    CollectionPlanned,
    CollectionProgress,
    CollectionSaved,
    ImatrixEvent,
    ImatrixRequest,
    collect,
    prepare,
)
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest
from tokenizers import Tokenizer

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, first_added_token, weights, write_checkpoint
from tests.command import QWQ, Ran, Terminal, environment, qwq
from tests.conftest import load
from tests.convert.imatrix_reference import Reference

GROUPED = CheckpointSpec(dtype="F32")
TIED = CheckpointSpec(dtype="F32", n_layers=3, n_kv_heads=4, tied=True)
WORDS = ("the", "quick", "fox", "and", "a", "thinking,", "counting", "1", "to", "99;", "ingot:", "<think>?\n")
SMALL = CollectorSettings(chunk_size=64)
Stop = Callable[[], bool]


def prose(n_words: int, seed: int = 1) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imatrix")


@pytest.fixture(scope="module")
def grouped(folder: Path) -> Path:
    return converted(folder, GROUPED, "grouped")


@pytest.fixture(scope="module")
def tied(folder: Path) -> Path:
    return converted(folder, TIED, "tied")


def converted(folder: Path, spec: CheckpointSpec, name: str) -> Path:
    checkpoint = write_checkpoint(folder / name, spec)
    return run_conversion(ConvertRequest(checkpoint, "F32", folder / f"{name}.gguf"))


def never() -> bool:
    return False


def request_for(model: Path, out: Path, *texts: str, settings: CollectorSettings = SMALL) -> ImatrixRequest:
    named = tuple(CalibrationText(f"{n}.txt", text.encode()) for n, text in enumerate(texts))
    return ImatrixRequest(model, named, out, settings=settings)


def run(request: ImatrixRequest, stop: Stop = never) -> list[ImatrixEvent]:
    prepared = prepare(request)
    with closing(load(request.model)) as model:
        return list(collect(prepared, model.handle, stop))


def chunks_of(model: Path, text: str, chunk_size: int) -> list[list[int]]:
    """Tokens by the tokenizers library, cut into chunks; the rest is dropped."""
    tokenizer = Tokenizer.from_file(str(model.with_suffix("") / "tokenizer.json"))
    tokens = tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False).ids
    return [tokens[i : i + chunk_size] for i in range(0, len(tokens) - chunk_size + 1, chunk_size)]


def assert_sums(path: Path, spec: CheckpointSpec, chunks: Sequence[list[int]]) -> None:
    """Each tensor's sums within 1e-3 of the reference's, no column farther off than 3e-3."""
    matrix = read_imatrix(path)
    expected = Reference(spec, weights(spec)).run(chunks)
    if spec.tied or "output.weight" not in matrix.sums:
        del expected["output.weight"]
    assert set(matrix.sums) == set(expected)
    for name, sums in matrix.sums.items():
        difference = np.abs(sums - expected[name])
        assert np.linalg.norm(difference) <= 1e-3 * np.linalg.norm(expected[name]), name
        assert (difference <= 3e-3 * expected[name]).all(), name
        assert matrix.counts[name].tolist() == [sum(map(len, chunks))]


@pytest.mark.parametrize("chunk_size", [64, 300, 1100])
def test_sums_are_those_of_a_float64_forward_pass(grouped: Path, tmp_path: Path, chunk_size: int) -> None:
    """Many chunks at once, a few, and one that llama.cpp computes in several steps; grouped queries."""
    text, out = prose(1200), tmp_path / "out.gguf"
    events = run(request_for(grouped, out, text, settings=CollectorSettings(chunk_size, process_output=True)))
    chunks = chunks_of(grouped, text, chunk_size)
    assert_sums(out, GROUPED, chunks)
    matrix = read_imatrix(out)
    assert "output.weight" in matrix.sums
    assert (matrix.chunk_count, matrix.chunk_size) == (len(chunks), chunk_size)
    assert isinstance(events[-1], CollectionDone)


def test_a_tied_model_and_one_head_per_query_are_collected_for_without_an_output(
    tied: Path, tmp_path: Path
) -> None:
    text, out = prose(900), tmp_path / "out.gguf"
    run(request_for(tied, out, text, settings=replace(SMALL, process_output=True)))
    assert_sums(out, TIED, chunks_of(tied, text, 64))


def test_leaving_out_the_output_layer_changes_no_other_sum(grouped: Path, tmp_path: Path) -> None:
    text, whole, less = prose(900), tmp_path / "whole.gguf", tmp_path / "less.gguf"
    run(request_for(grouped, whole, text, settings=replace(SMALL, process_output=True)))
    run(request_for(grouped, less, text))
    full, part = read_imatrix(whole), read_imatrix(less)
    assert set(full.sums) - set(part.sums) == {"output.weight"}
    assert all((full.sums[name] == sums).all() for name, sums in part.sums.items())


def test_every_chunk_begins_with_the_beginning_token_where_the_model_wants_one(
    grouped: Path, tmp_path: Path
) -> None:
    key = b"tokenizer.ggml.add_bos_token\7\0\0\0"
    content = grouped.read_bytes()
    assert key + b"\0" in content
    model, text, out = tmp_path / "model.gguf", prose(900), tmp_path / "out.gguf"
    model.write_bytes(content.replace(key + b"\0", key + b"\1"))
    run(request_for(model, out, text))

    tokenizer = Tokenizer.from_file(str(grouped.with_suffix("") / "tokenizer.json"))
    tokens = [first_added_token(), *tokenizer.encode(text, add_special_tokens=False).ids]
    chunks = [[first_added_token(), *tokens[i + 1 : i + 64]] for i in range(0, len(tokens) - 63, 64)]
    assert_sums(out, GROUPED, chunks)


def test_several_texts_are_read_as_one_and_all_named(grouped: Path, tmp_path: Path) -> None:
    text = prose(900)
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    run(request_for(grouped, one, text))
    run(request_for(grouped, two, text[:1001], text[1001:]))
    assert read_imatrix(two).datasets == ("0.txt", "1.txt")
    assert sums_of(two) == sums_of(one)


def test_the_sums_of_an_earlier_file_are_added(grouped: Path, tmp_path: Path) -> None:
    first, second = prose(900, seed=1), prose(700, seed=2)
    earlier, out = tmp_path / "earlier.gguf", tmp_path / "out.gguf"
    run(request_for(grouped, earlier, first))
    run(replace(request_for(grouped, out, second), earlier=(earlier,)))
    chunks = chunks_of(grouped, first, 64) + chunks_of(grouped, second, 64)
    assert_sums(out, GROUPED, chunks)
    assert read_imatrix(out).chunk_count == len(chunks)
    assert read_imatrix(out).datasets == ("0.txt", "0.txt")


def test_no_more_chunks_are_taken_than_asked_for(grouped: Path, tmp_path: Path) -> None:
    text, out = prose(900), tmp_path / "out.gguf"
    run(replace(request_for(grouped, out, text), chunks=3))
    assert_sums(out, GROUPED, chunks_of(grouped, text, 64)[:3])


def test_any_number_of_rows_is_added_one_by_one_in_32_bits() -> None:
    rows = np.random.default_rng(3).lognormal(0, 4, (77, 40)).astype(np.float32)
    expected = np.zeros(40, np.float32)
    for _ in range(2):
        for row in rows:
            expected = expected + row * row
    tally = ActivationSums()
    tally.add("blk.0.ffn_up.weight", rows)
    tally.add("blk.0.ffn_up.weight", rows)
    assert tally.sums["blk.0.ffn_up.weight"].tobytes() == expected.tobytes()
    assert tally.counts == {"blk.0.ffn_up.weight": 154}


def test_activations_that_are_not_finite_stop_the_collection_by_name() -> None:
    rows = np.full((16, 2), 1e30, np.float32)
    with pytest.raises(ConvertError, match=r"blk\.0\.ffn_up\.weight: the activations are no longer finite"):
        ActivationSums().add("blk.0.ffn_up.weight", rows)


def test_a_text_shorter_than_a_chunk_is_refused_with_both_numbers(grouped: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"the text has \d+ tokens, less than one chunk of 2,048"):
        run(request_for(grouped, tmp_path / "out.gguf", prose(100), settings=CollectorSettings(2048)))
    # As in llama-imatrix, the line end at the end of a file is not part of its text.
    with pytest.raises(ConvertError, match="the text has 63 tokens, less than one chunk of 64"):
        run(request_for(grouped, tmp_path / "out.gguf", "x" * 63 + "\n"))
    with pytest.raises(ConvertError, match="the text has 0 tokens"):
        run(request_for(grouped, tmp_path / "out.gguf", ""))


def stopping_after(n_steps: int) -> Stop:
    """True from the nth question on; the collector asks at each node, so it stops in mid-chunk."""
    asked = iter(range(n_steps))
    return lambda: next(asked, None) is None


def sums_of(path: Path) -> dict[str, bytes]:
    return {name: sums.tobytes() for name, sums in read_imatrix(path).sums.items()}


@pytest.fixture(scope="module")
def uninterrupted(grouped: Path, folder: Path) -> Path:
    out = folder / "uninterrupted.gguf"
    run(request_for(grouped, out, prose(3000)))
    return out


@pytest.mark.parametrize("n_asked", [1, 250, 600, 900])
def test_a_stopped_run_resumes_to_the_same_bytes(
    grouped: Path, uninterrupted: Path, tmp_path: Path, n_asked: int
) -> None:
    out = tmp_path / "out.gguf"
    request = replace(request_for(grouped, out, prose(3000)), save_every=10**6)
    last = run(request, stopping_after(n_asked))[-1]
    assert isinstance(last, CollectionInterrupted)
    assert last.path.exists() == (last.chunks_done > 0)
    assert not out.exists()

    planned = run(request)[0]
    assert isinstance(planned, CollectionPlanned)
    assert (planned.chunks_done, planned.starts_over) == (last.chunks_done, "")
    assert out.read_bytes() == uninterrupted.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_an_intermediate_file_is_an_importance_matrix(grouped: Path, tmp_path: Path) -> None:
    text, out = prose(1500), tmp_path / "out.gguf"
    request = request_for(grouped, out, text)
    done = []
    with closing(load(grouped)) as model:
        for event in collect(prepare(request), model.handle, never):
            if isinstance(event, CollectionSaved):
                assert_sums(event.path, GROUPED, chunks_of(grouped, text, 64)[: event.chunks_done])
                done.append(event.chunks_done)
    assert done == list(range(32, len(chunks_of(grouped, text, 64)), 32))
    assert len(done) > 1


def test_progress_counts_every_token_once(grouped: Path, tmp_path: Path) -> None:
    events = run(request_for(grouped, tmp_path / "out.gguf", prose(1500)))
    planned = events[0]
    assert isinstance(planned, CollectionPlanned)
    done = [event.tokens_done for event in events if isinstance(event, CollectionProgress)]
    assert done == sorted(set(done))
    assert done[-1] == planned.n_tokens == planned.n_chunks * 64


@pytest.mark.parametrize("changed", ["text", "options", "model", "files to merge"])
def test_a_run_of_something_else_starts_over_and_says_so(grouped: Path, tmp_path: Path, changed: str) -> None:
    request = request_for(grouped, tmp_path / "out.gguf", prose(3000))
    assert isinstance(run(request, stopping_after(600))[-1], CollectionInterrupted)
    model, earlier = tmp_path / "model.gguf", tmp_path / "earlier.gguf"
    model.write_bytes(grouped.read_bytes()[:-1] + b"\1")
    run(request_for(grouped, earlier, prose(200)))
    other = {
        "text": replace(request, texts=(CalibrationText("0.txt", prose(3000, seed=2).encode()),)),
        "options": replace(request, chunks=80),
        "model": replace(request, model=model),
        "files to merge": replace(request, earlier=(earlier,)),
    }[changed]

    planned = run(other)[0]
    assert isinstance(planned, CollectionPlanned)
    assert planned.chunks_done == 0
    assert planned.starts_over.endswith(f"out.gguf.partial was collected with other {changed}")
    fresh = replace(other, out=tmp_path / "fresh.gguf")
    run(fresh)
    assert request.out.read_bytes() == fresh.out.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:1000],
        lambda content: content.replace(b'"chunks_done": 32', b'"chunks_done": -2'),
        lambda content: content.replace(b"qwq.imatrix.state", b"qwq.imatrix.eaten"),
        lambda content: content.replace(b": 2048,", b": 4096,"),
    ],
)
def test_a_damaged_state_is_not_resumed(
    grouped: Path, uninterrupted: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    request = request_for(grouped, tmp_path / "out.gguf", prose(3000))
    last = run(request, stopping_after(250))[-1]
    assert isinstance(last, CollectionInterrupted)
    sound = last.path.read_bytes()
    last.path.write_bytes(damage(sound))
    assert last.path.read_bytes() != sound

    planned = run(request)[0]
    assert isinstance(planned, CollectionPlanned)
    assert planned.starts_over.startswith("what an earlier run left cannot be used")
    assert request.out.read_bytes() == uninterrupted.read_bytes()


class OtherOverhead:
    """A library whose tensors are larger."""

    def ggml_tensor_overhead(self) -> int:
        return 376


class Shifted(ctypes.Structure):
    """The layout with one more field before the name."""

    _fields_ = (*GgmlTensor._fields_[:-3], ("more", ctypes.c_int64), *GgmlTensor._fields_[-3:])


def test_another_build_of_the_library_is_refused_in_one_line() -> None:
    with pytest.raises(ConvertError, match="a tensor takes 376 bytes, expected 368") as caught:
        check_layout(OtherOverhead())
    assert str(caught.value).endswith("Run: pip install llama-cpp-python==0.3.36")
    with pytest.raises(ConvertError, match="a tensor's name lie elsewhere"):
        check_layout(layout=Shifted)
    assert libggml.ggml_op_name(check_layout()) == b"MUL_MAT"


def test_numbers_are_read_by_their_strides_in_memory_and_through_a_device() -> None:
    """A tensor of ggml's CPU backend, read directly and as from a device, plain and transposed."""
    libggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    allocate = libggml.ggml_backend_alloc_ctx_tensors_from_buft
    allocate.argtypes, allocate.restype = [ctypes.c_void_p] * 2, ctypes.c_void_p
    libggml.ggml_backend_tensor_set.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
    libggml.ggml_backend_buffer_free.argtypes = [ctypes.c_void_p]
    init = type(libggml.ggml_init.argtypes[0](0, None, False))
    context = libggml.ggml_init(init(1 << 14, None, True))
    address = libggml.ggml_new_tensor_2d(context, 0, 3, 20)
    buffer = allocate(context, libggml.ggml_backend_cpu_buffer_type())
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    libggml.ggml_backend_tensor_set(address, values.ctypes.data, 0, values.nbytes)
    tensor = GgmlTensor.from_address(address)
    try:
        for in_memory in (True, False):
            assert [plane.tolist() for plane in planes(tensor, in_memory=in_memory)] == [values.tolist()]
        tensor.ne[:], tensor.nb[:] = (3, 4, 5, 1), (4, 60, 12, 240)
        expected = values.reshape(4, 5, 3).transpose(1, 0, 2)
        for in_memory in (True, False):
            read = [plane.tolist() for plane in planes(tensor, in_memory=in_memory)]
            assert read == expected.tolist()
    finally:
        libggml.ggml_backend_buffer_free(buffer)
        libggml.ggml_free(context)


def imatrix(cache: Path, *arguments: str | Path, stdin: bytes | None = None) -> Ran:
    return qwq(cache, "imatrix", *map(str, arguments), "--threads", "1", stdin=stdin)


@pytest.fixture(scope="module")
def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(prose(9000))
    return path


@pytest.fixture(scope="module")
def whole(grouped: Path, folder: Path, text_file: Path) -> Path:
    request = request_for(grouped, folder / "whole.gguf")
    run(replace(request, texts=(CalibrationText(str(text_file), text_file.read_bytes()),)))
    return request.out


@pytest.mark.parametrize("n_lines", [2, 4])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(
    grouped: Path, text_file: Path, whole: Path, cache: Path, tmp_path: Path, n_lines: int
) -> None:
    out = tmp_path / "out.gguf"
    command = (
        str(grouped),
        str(text_file),
        "--ctx",
        "64",
        "--save-every",
        "1",
        "--threads",
        "1",
        "-o",
        str(out),
    )
    with subprocess.Popen(
        [*QWQ, "imatrix", *command], stderr=subprocess.PIPE, env=environment(cache)
    ) as process:
        assert process.stderr
        lines = [process.stderr.readline() for _ in range(n_lines)]
        os.kill(process.pid, signal.SIGKILL)
    assert b"collected and saved" in lines[-1]
    assert not out.exists()
    for name in ("out.gguf.new", "out.gguf.partial.new"):  # as a kill during a write leaves them
        (tmp_path / name).write_bytes(b"GGUF")

    resumed = imatrix(cache, *command)
    assert resumed.status == 0
    assert "are there already." in resumed.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_two_runs_do_not_write_one_output(grouped: Path, tmp_path: Path) -> None:
    request = request_for(grouped, tmp_path / "out.gguf", prose(400))
    prepared, also_prepared = prepare(request), prepare(request)
    with closing(load(grouped)) as model, closing(collect(prepared, model.handle, never)) as events:
        next(events)
        with pytest.raises(ConvertError, match=r"out\.gguf: another process is writing it"):
            prepare(request)
        with pytest.raises(ConvertError, match="another process"):
            next(collect(also_prepared, model.handle, never))
        assert isinstance(list(events)[-1], CollectionDone)
        with pytest.raises(ConvertError, match="exists already"):
            next(collect(also_prepared, model.handle, never))
    assert list(tmp_path.iterdir()) == [request.out]


def test_an_abandoned_run_releases_its_output(grouped: Path, tmp_path: Path) -> None:
    request = request_for(grouped, tmp_path / "out.gguf", prose(400))
    with closing(load(grouped)) as model, closing(collect(prepare(request), model.handle, never)) as events:
        next(events)

    assert isinstance(run(request)[-1], CollectionDone)


def tokens_done(screen: str) -> int:
    """The first number of the bar; 0 when there is none."""
    bar = re.search(r"collecting [█░ ]*([\d,]+) /", screen)
    return int(bar[1].replace(",", "")) if bar else 0


def test_ctrl_c_saves_the_state_and_says_how_to_continue(grouped: Path, cache: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text(prose(60_000))
    arguments = (
        "imatrix",
        str(grouped),
        str(text),
        "--ctx",
        "64",
        "--save-every",
        "100000",
        "--threads",
        "1",
        "-o",
        str(out),
    )
    with Terminal(arguments, environment(cache), columns=250) as terminal:
        terminal.read_until(lambda screen: tokens_done(screen) > 4096)
        terminal.interrupt()
        assert terminal.read_to_end() == 130
        shown = terminal.text
    assert "chunks are in" in shown
    assert "The same command goes on from there." in shown
    assert "collecting" not in shown
    saved = read_imatrix(out.with_name("out.gguf.partial"))
    assert f"stopped: {saved.chunk_count:,} of" in shown


def test_standard_input_is_read_as_a_text(grouped: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ran = imatrix(cache, grouped, "-", "--ctx", "64", "-o", out, stdin=prose(900).encode())
    assert (ran.status, ran.stdout) == (0, "")
    n_chunks = len(chunks_of(grouped, prose(900), 64))
    assert ran.stderr.splitlines() == [
        f"{n_chunks} chunks of 64 tokens from standard input.",
        f"32 of {n_chunks} chunks are collected and saved.",
        f"{out}: 14 weights, {n_chunks} chunks of 64 tokens.",
    ]
    assert read_imatrix(out).datasets == ("standard input",)


def test_without_a_text_files_are_merged(grouped: Path, cache: Path, tmp_path: Path) -> None:
    one, two, out = tmp_path / "1.gguf", tmp_path / "2.gguf", tmp_path / "out.gguf"
    run(request_for(grouped, one, prose(900, seed=1)))
    run(request_for(grouped, two, prose(900, seed=2)))
    ran = imatrix(cache, grouped, "--in", one, "--in", two, "-o", out)
    assert ran.status == 0, ran.stderr
    added = {name: sums + read_imatrix(two).sums[name] for name, sums in read_imatrix(one).sums.items()}
    assert {name: sums.tobytes() for name, sums in added.items()} == sums_of(out)


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (("{model}",), 2, "give a text to collect from"),
        (("{model}", "{folder}/none.txt"), 2, "none.txt cannot be read: No such file"),
        (("{model}", "{model}"), 2, "is not text: byte 5 is zero"),
        (("{model}", "{folder}/latin.txt"), 2, "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        (("{model}", "{folder}/short.txt"), 1, "the text has 5 tokens, less than one chunk of 512"),
        (("{model}", "{folder}/short.txt", "-o", "{model}"), 1, "exists already"),
        (("{model}", "{folder}/short.txt", "-o", "{folder}/no/x"), 1, "no such folder"),
        (("{model}", "{folder}/short.txt", "--ctx", "5000"), 2, "--ctx 5,000 is more than the 4,096"),
        (("{folder}/short.txt", "{folder}/short.txt"), 1, "is not a GGUF file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    grouped: Path, cache: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, complaint: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "short.txt").write_text("short")
    filled = [argument.format(model=grouped, folder=tmp_path) for argument in arguments]
    if "-o" not in filled:
        filled += ["-o", str(tmp_path / "out.gguf")]
    ran = imatrix(cache, *filled)
    assert ran.status == status
    assert complaint in ran.stderr.splitlines()[-1]
    assert ran.stderr.splitlines()[-1].startswith("qwq: ")
