"""`qwq convert`: in the test's process, in its own, and on pseudo-terminals."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from qwq_convert.file_types import FILE_TYPES
from qwq_convert.gguf_file import read_header
from qwq_convert.pipeline import ConversionDone, ConversionPlanned, RowsWritten, run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.cli.convert import ConvertScreen, convert
from qwq_local.cli.environment import Environment
from qwq_local.cli.flags import ConvertFlags
from qwq_local.errors import ExitStatus, QwqError
from tests.checkpoints import CheckpointSpec, store, weights, write_checkpoint, write_safetensors
from tests.command import (
    QWQ,
    TIMEOUT_S,
    ClosingStream,
    InterruptingStream,
    Ran,
    Terminal,
    environment,
    qwq_here,
)
from tests.terminal.fake_terminal import Clock
from tests.terminal.fake_terminal import Terminal as FakeTerminal

# About two seconds of work for one thread, enough to interrupt.
SLOW = CheckpointSpec(hidden_size=512, intermediate_size=6144)
USAGE, FAILED = ExitStatus.USAGE, ExitStatus.FAILED
MADE = re.compile(r"(?P<path>\S+): (?P<size>[\d.,]+ \S+), whole and checked\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("slow") / "model", SLOW)


def run(directory: Path, *arguments: str, stdout: io.StringIO | None = None) -> Ran:
    """The command in the test's process, in a directory of its own."""
    with contextlib.chdir(directory):
        return qwq_here(directory / "cache", "convert", *arguments, stdout=stdout)


def run_process(directory: Path, *arguments: str) -> Ran:
    """The command in its own process, in a directory of its own."""
    command, variables = [*QWQ, "convert", *arguments], environment(directory / "cache")
    result = subprocess.run(command, cwd=directory, capture_output=True, env=variables, timeout=TIMEOUT_S)
    return Ran(result.returncode, result.stdout.decode(), result.stderr.decode())


def on_terminal(arguments: list[str], directory: Path, columns: int = 80, rows: int = 24) -> Terminal:
    command = ["convert", *arguments]
    return Terminal(command, environment(directory / "cache"), columns, rows, cwd=directory)


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "cache")


def test_in_a_pipe_one_line_on_stderr_names_the_result(folder: Path, tmp_path: Path) -> None:
    """The file is named after the source and the type, in the current folder."""
    ran = run_process(tmp_path, str(folder), "q8_0")
    assert (ran.status, ran.stdout) == (0, "")
    assert ran.stderr == "model-Q8_0.gguf: 0.11 MiB, whole and checked.\n"
    assert left_behind(tmp_path) == ["model-Q8_0.gguf"]
    expected = run_conversion(ConvertRequest(folder, "Q8_0", tmp_path / "expected.gguf"))
    assert (tmp_path / "model-Q8_0.gguf").read_bytes() == expected.read_bytes()


def test_a_second_run_refuses_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    run(tmp_path, str(folder), "Q8_0", "-o", "out.gguf")
    before = (tmp_path / "out.gguf").stat()
    ran = run(tmp_path, str(folder), "Q8_0", "-o", "out.gguf")
    assert (ran.status, ran.stdout) == (1, "")
    assert ran.stderr == "qwq: out.gguf: exists already. Remove it or write to another name.\n"
    assert (tmp_path / "out.gguf").stat() == before


def test_every_option_reaches_the_file(folder: Path, tmp_path: Path) -> None:
    options = [
        "--tensor-type",
        r"blk\.0\.FFN=q5_0",
        "--tensor-type",
        "attn_v=F16",
        "--output-tensor-type",
        "q4_1",
    ]
    options += ["--token-embedding-type", "Q5_1", "--override-key", "general.name=Mine", "--yarn", "4"]
    ran = run(tmp_path, str(folder), "Q8_0", "-o", "out.gguf", "--threads", "3", *options)
    assert ran.status == 0, ran.stderr
    header = read_header(tmp_path / "out.gguf")
    kinds = {tensor.name: tensor.kind.name for tensor in header.tensors}
    assert {kinds[f"blk.0.ffn_{name}.weight"] for name in ("up", "down", "gate")} == {"Q5_0"}
    assert (kinds["blk.1.ffn_up.weight"], kinds["blk.1.attn_v.weight"]) == ("Q8_0", "F16")
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("Q4_1", "Q5_1")
    assert header.value("general.name") == "Mine"
    assert header.value("qwen2.context_length") == 4 * 4096
    ran = run(tmp_path, str(folder), "Q4_0", "-o", "pure.gguf", "--pure", "--leave-output-tensor")
    kinds = {tensor.name: tensor.kind.name for tensor in read_header(tmp_path / "pure.gguf").tensors}
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("BF16", "Q4_0")
    ran = run(tmp_path, str(folder), "BF16", "-o", "parts.gguf", "--split-max-size", "100K")
    assert ran.stderr.startswith("parts-00001-of-00003.gguf and 2 more: ")
    assert (tmp_path / "parts-00003-of-00003.gguf").exists()


def test_jsonl_writes_every_step_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, str(folder), "Q8_0", "--jsonl")
    assert (ran.status, ran.stderr) == (0, "")
    planned, *done, finished = events_of(ran.stdout)
    assert planned == {"v": 2, "event": "planned", "count": 27, "bytes_total": 111104, "unweighted": []}
    assert {event["event"] for event in done} == {"tensor_done"}
    assert [event["index"] for event in done] == list(range(1, 28))
    assert set(done[0]) == {
        "v",
        "event",
        "name",
        "index",
        "count",
        "bytes_done",
        "bytes_total",
        "n_nonfinite",
    }
    assert finished == {"v": 2, "event": "finished", "paths": ["model-Q8_0.gguf"], "n_bytes": 118880}


def test_dry_run_shows_types_size_and_time_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    planned = run(tmp_path, str(folder), "Q4_K_M", "-o", "out.gguf", "--dry-run", "--split-max-size", "50K")
    assert (planned.status, planned.stderr) == (0, "")
    assert left_behind(tmp_path) == []
    *tensors, summary, size, needed_time = planned.stdout.splitlines()
    assert len({line.index(" -> ") for line in tensors}) == 1  # a table
    assert re.fullmatch(r"About \d+ s of quantizing on \d+ cores here; a slow disk adds to it\.", needed_time)
    assert run(tmp_path, str(folder), "Q4_K_M", "-o", "out.gguf", "--split-max-size", "50K").status == 0
    headers = [read_header(path) for path in sorted(tmp_path.glob("out-*.gguf"))]
    n_bytes = sum(header.file_bytes for header in headers)
    assert size.startswith(f"out-00001-of-00002.gguf and 1 more: {n_bytes:,} bytes (")
    made = [tensor for header in headers for tensor in header.tensors]
    assert [line.split()[0] for line in tensors] == [tensor.name for tensor in made]
    kinds = [tensor.kind.name for tensor in made]
    assert [line.split(" -> ")[1].split()[0] for line in tensors] == kinds
    assert summary.startswith("27 tensors: ")
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (\w+)[,.]", summary)}
    assert counts == Counter(kinds)


def test_types_lists_every_type_with_its_size(folder: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, "--types", str(folder))
    assert (ran.status, ran.stderr) == (0, "")
    rows = {line.split()[0]: line for line in ran.stdout.splitlines()[1:]}
    assert list(rows)[: len(FILE_TYPES)] == list(FILE_TYPES)
    assert re.search(r"^Q8_0 +8\.\d\d +0.11 MiB", rows["Q8_0"])
    run_conversion(ConvertRequest(folder, "Q8_0", tmp_path / "out.gguf"))
    assert (tmp_path / "out.gguf").stat().st_size == 118_880


def test_help_names_every_option(tmp_path: Path) -> None:
    ran = run(tmp_path, "--help")
    assert (ran.status, ran.stderr) == (0, "")
    for option in (
        "--out",
        "--types",
        "--dry-run",
        "--imatrix",
        "--tensor-type",
        "--output-tensor-type",
        "--token-embedding-type",
        "--pure",
        "--leave-output-tensor",
        "--override-key",
        "--yarn",
        "--split-max-size",
        "--threads",
        "--allow-nonfinite",
        "--jsonl",
    ):
        assert option in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50)])
def test_a_line_shows_tensor_bar_rate_and_time_left(columns: int, rows: int) -> None:
    """The line fits the window, is redrawn in place, and is replaced by the result."""
    clock, terminal = Clock(), FakeTerminal(columns, rows)
    screen = ConvertScreen(terminal.output(), clock)
    screen.show(ConversionPlanned(27, 10**9, ()))
    for second in range(11):
        screen.show(RowsWritten("blk.0.ffn_up.weight", second * 10**7, 10**9))
        clock.now += 1
    [line] = terminal.lines()
    assert re.fullmatch(r"blk\.0\.ffn_up\.weight █+░+ · 10 % · 10\.0 MB/s · 1m30s left", line)
    assert len(line) < columns
    screen.show(ConversionDone((Path("out.gguf"),), 10**9))
    assert terminal.lines() == ["out.gguf: 0.93 GiB, whole and checked."]


def test_on_a_terminal_only_the_result_remains(folder: Path, tmp_path: Path) -> None:
    with on_terminal([str(folder), "Q8_0", "-o", "out.gguf"], tmp_path) as terminal:
        assert terminal.read_to_end() == 0
        assert MADE.fullmatch(terminal.text)


def test_after_ctrl_c_the_same_command_continues(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), "Q8_0", "-o", "out.gguf"]
    ran = run(tmp_path, *arguments, "--jsonl", stdout=InterruptingStream("tensor_done", 3))
    assert ran.status == 130
    assert ran.stderr == "3 of 27 tensors are kept: the same command goes on from there.\n"
    assert left_behind(tmp_path) == ["out.gguf.partial", "out.gguf.partial.journal"]
    ran = run(tmp_path, *arguments)
    going_on, made = ran.stderr.splitlines()
    assert re.fullmatch(r"going on: 3 tensors \([\d.,]+ \w+\) are there already\.", going_on)
    assert MADE.fullmatch(made)
    expected = run_conversion(ConvertRequest(folder, "Q8_0", tmp_path / "expected.gguf"))
    assert (tmp_path / "out.gguf").read_bytes() == expected.read_bytes()


def test_ctrl_c_in_a_terminal_ends_with_130(slow: Path, tmp_path: Path) -> None:
    """At any moment; it says what is kept, if anything is."""
    arguments = [str(slow), "IQ4_XS", "-o", "out.gguf", "--threads", "1", "--jsonl"]
    with on_terminal(arguments, tmp_path, columns=400) as terminal:
        terminal.read_until(lambda text: '"planned"' in text)
        terminal.interrupt()
        assert terminal.read_to_end() == 130
        assert "Traceback" not in terminal.text


def test_an_early_ctrl_c_keeps_and_says_nothing(folder: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, str(folder), "Q8_0", "--jsonl", stdout=InterruptingStream("planned"))
    assert (ran.status, ran.stderr) == (130, "")
    assert left_behind(tmp_path) == []


def test_a_reader_that_goes_away_ends_it_quietly_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, str(folder), "Q8_0", "-o", "out.gguf", "--jsonl", stdout=ClosingStream(5))
    assert ran.status == 141
    assert ran.stderr == "5 of 27 tensors are kept: the same command goes on from there.\n"
    assert run(tmp_path, str(folder), "Q8_0", "-o", "out.gguf").status == 0


def test_another_option_starts_over_and_says_so(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), "Q8_0", "-o", "out.gguf"]
    run(tmp_path, *arguments, "--jsonl", stdout=InterruptingStream("tensor_done"))
    ran = run(tmp_path, *arguments, "--override-key", "general.name=Other")
    started_over, made = ran.stderr.splitlines()
    assert started_over == "out.gguf.partial was of another conversion or an older source: starting over."
    assert MADE.fullmatch(made)


def test_a_weight_that_is_not_a_number_is_one_line_with_its_position(tmp_path: Path) -> None:
    """Output of libggml itself never gets through, neither then nor when it is allowed."""
    spec = CheckpointSpec(n_layers=1)
    folder = write_checkpoint(tmp_path / "model", spec)
    values = weights(spec)
    values["lm_head.weight"][2, 3] = np.inf
    write_safetensors(folder / "model.safetensors", {k: store(v, "BF16") for k, v in values.items()})
    ran = run_process(tmp_path, str(folder), "BF16", "--jsonl")
    assert ran.status == 1
    kept, error = ran.stderr.splitlines()
    assert kept.endswith("of 15 tensors are kept: the same command goes on from there.")
    assert error == (
        "qwq: model.safetensors: lm_head.weight holds inf at [2, 3]. Download the file again, or "
        "convert with --allow-nonfinite."
    )
    ran = run_process(tmp_path, str(folder), "BF16", "--allow-nonfinite")
    assert ran.status == 0
    going_on, counted, made = ran.stderr.splitlines()
    assert going_on.startswith("going on: ")
    assert counted == "output.weight: weights that are no numbers: 1."
    assert MADE.fullmatch(made)


UNREADABLE = "unknown type of a tensor. Choose from F32, F16, "
WRONG: Mapping[str, tuple[dict[str, Any], ExitStatus, str]] = {
    "no type": ({"file_type": ""}, USAGE, "which type? Try Q4_K_M, or list them with --types."),
    "unknown type": ({"file_type": "Q4_M"}, USAGE, "file type 'Q4_M' is unknown, did you mean "),
    "tensor type without type": ({"tensor_types": ("ffn",)}, USAGE, "'ffn': expected REGEX=TYPE, such as"),
    "tensor type of no type": ({"tensor_types": ("ffn=Q9",)}, USAGE, f"--tensor-type 'Q9': {UNREADABLE}"),
    "tensor type with an end": ({"tensor_types": ("ffn=",)}, USAGE, f"--tensor-type '': {UNREADABLE}"),
    "no regular expression": ({"tensor_types": ("(=F16",)}, USAGE, "'(': no regular expression ("),
    "tensor type of floats": (
        {"file_type": "F16", "tensor_types": ("ffn=Q8_0",)},
        FAILED,
        "--tensor-type says nothing with F16.",
    ),
    "tensor type of no tensor": (
        {"tensor_types": ("ffn=Q4_0", "ffn_dawn=Q8_0")},
        FAILED,
        "--tensor-type 'ffn_dawn'=Q8_0: no tensor is called so; names are such as ",
    ),
    "out to a pipe": ({"out": Path("-")}, USAGE, "-o -: what is written here needs a file, not a pipe."),
    "override of another kind": (
        {"overrides": ("qwen2.context_length=abc",)},
        FAILED,
        "--override-key qwen2.context_length: 'abc' is no number.",
    ),
    "override of another type": (
        {"overrides": ("qwen2.context_length=str:4096",)},
        FAILED,
        "--override-key qwen2.context_length: the model's own value is of type int, not str.",
    ),
    "output type": ({"output_type": "I8"}, USAGE, f"--output-tensor-type 'I8': {UNREADABLE}"),
    "embedding type": ({"embedding_type": ""}, USAGE, f"--token-embedding-type '': {UNREADABLE}"),
    "output rows": ({"output_type": "Q6_K"}, FAILED, "rows of 64 values are not whole Q6_K blocks of 256."),
    "override": ({"overrides": ("a",)}, USAGE, "--override-key 'a': expected KEY=VALUE or KEY=TYPE:VALUE."),
    "override bytes": ({"overrides": ("\udcff=1",)}, USAGE, "expected KEY=VALUE or KEY=TYPE:VALUE."),
    "yarn": ({"yarn": float("nan")}, FAILED, "--yarn nan: expected a factor above 1, such as 4 for 131,072"),
    "size": (
        {"split": "4 apples"},
        USAGE,
        "--split-max-size '4 apples': expected a size such as 4G or 500M.",
    ),
    "size of nothing": ({"split": "0"}, USAGE, "--split-max-size '0': expected a size such as 4G or 500M."),
    "imatrix not there": ({"imatrix": Path("none.gguf")}, FAILED, "none.gguf: cannot be read (No such file"),
    "no folder": (
        {"out": Path("no/where.gguf")},
        FAILED,
        "no: no such folder. Create it or write elsewhere.",
    ),
    "this folder": ({"out": Path()}, FAILED, ".: is a folder. Give the name of the file to write."),
    "a folder": ({"out": Path("..")}, FAILED, "..: is a folder. Give the name of the file to write."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_conversion_that_cannot_be_done_is_one_line(case: str, folder: Path, tmp_path: Path) -> None:
    fields, status, reason = WRONG[case]
    flags = ConvertFlags(
        **{"source": str(folder), "file_type": "Q8_0", "out": tmp_path / "out.gguf", **fields}
    )
    with pytest.raises(QwqError) as caught:
        convert(Environment(None, io.StringIO(), io.StringIO(), {}), flags)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == status
    assert left_behind(tmp_path) == []


def test_wrong_usage_is_a_line_and_a_status_of_the_process(slow: Path, tmp_path: Path) -> None:
    ran = run(tmp_path, str(slow), "IQ2_XXS")
    assert (ran.status, ran.stdout) == (FAILED, "")
    assert ran.stderr == (
        "qwq: IQ2_XXS: blk.0.attn_k.weight as IQ2_XXS needs an importance matrix, and none is given. "
        "Make one with `qwq imatrix MODEL.gguf TEXT` and give it as --imatrix.\n"
    )
    ran = run(tmp_path, str(slow), "Q8_0", "--yarn", "four", "--threads", "0")
    assert (ran.status, ran.stdout) == (USAGE, "")
    assert "Invalid value for '--yarn'" in ran.stderr
    assert left_behind(tmp_path) == []


def test_a_file_name_that_is_not_text_works(folder: Path, tmp_path: Path) -> None:
    ran = run_process(tmp_path, str(folder), "Q8_0", "-o", "\udcff.gguf", "--jsonl")
    assert (ran.status, ran.stderr) == (0, "")
    assert events_of(ran.stdout)[-1]["event"] == "finished"
    assert (tmp_path / "\udcff.gguf").exists()


def test_names_in_a_file_from_elsewhere_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "evil.gguf", "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("\x1b[2J\x1b]0;title\x07\n.weight", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stdout = io.StringIO()
    flags = ConvertFlags(str(tmp_path / "evil.gguf"), "Q8_0", dry_run=True)
    assert convert(Environment(None, stdout, io.StringIO(), {}), flags) == ExitStatus.ANSWERED
    assert not set("\x1b\x07") & set(stdout.getvalue())
    assert len(stdout.getvalue().splitlines()) == 4
    ran = run(
        tmp_path, "evil.gguf", "Q8_0", "--output-tensor-type", "Q6_K", "--tensor-type", ".=Q6_K", "--pure"
    )
    assert not set("\x1b\x07") & set(ran.stderr)
