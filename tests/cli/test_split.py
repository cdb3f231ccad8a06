"""`qwq ask --split`: its screen, its lines of JSON and its statuses. The miniature samples greedily."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.command import QWQ, TIMEOUT_S, Ran, Terminal, environment, qwq_here

QUESTION = "How many e's are in the word tree?"
GREEDY = ("-m", "miniature", "--set", "temperature=0")
# Parts of some 900 tokens: quick, and there can be many.
SMALL = (*GREEDY, "--set", "n_ctx=2048")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("split")


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return written(tmp_path / "story.txt", 60)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return written(tmp_path / "book.txt", 150)


def written(path: Path, n_paragraphs: int) -> Path:
    path.write_text("".join(f"On day {i} somebody went to the sea.\n\n" for i in range(n_paragraphs)))
    return path


def split(cache: Path, file: Path, *arguments: str) -> Ran:
    return qwq_here(cache, "ask", "--split", *SMALL, "-f", str(file), *arguments, QUESTION)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_stdout_carries_the_last_answer_alone_and_stderr_the_parts(tmp_path: Path, story: Path) -> None:
    ran = split(tmp_path, story)

    assert ran.status == 0, ran.stderr
    assert ran.stdout == 'There are 2 e\'s in "tree": \\boxed{2}\n'
    first, *rest = ran.stderr.splitlines()
    n_parts = int(re.findall(r"(\d+) parts of up to", first)[0])
    assert n_parts > 2
    rest = [line for line in rest if not line.startswith("note: ")]
    assert [line.partition(" · ")[0] for line in rest] == [
        *(f"▸ part {i} of {n_parts}" for i in range(1, n_parts + 1)),
        f"▸ the last pass: over {n_parts} answers",
    ]
    assert [bool(re.search(" · about .* left$", line)) for line in rest] == [
        False,
        *[True] * (n_parts - 1),
        False,
    ]


def test_without_split_a_long_prompt_is_refused_with_a_hint(cache: Path, tmp_path: Path) -> None:
    book = written(tmp_path / "long.txt", 500)
    ran = qwq_here(cache, "ask", *GREEDY, "-f", str(book), QUESTION)

    assert (ran.status, ran.stdout) == (5, "")
    assert "qwq ask --split" in ran.stderr
    dry = qwq_here(cache, "ask", "--split", "--dry-run", *GREEDY, "-f", str(book), QUESTION)
    assert dry.status == 0, dry.stderr
    assert re.search(r"asked in \d+ passes: \d+ parts of up to 3,\d\d\d tokens", dry.stdout)
    assert "thinking 600, answer 150" in dry.stdout
    assert "YaRN      factor 4 over 1,024" in dry.stdout


def test_a_text_that_fits_is_asked_in_one_pass_with_a_notice(cache: Path, tmp_path: Path) -> None:
    short = written(tmp_path / "short.txt", 2)
    ran = split(cache, short)
    alone = qwq_here(cache, "ask", *SMALL, "-f", str(short), QUESTION)

    assert (ran.status, ran.stdout) == (0, alone.stdout)
    assert re.match(r"note: the text fits: \d+ tokens, asked in one pass\.\n", ran.stderr)


def test_the_lines_of_json_have_every_parts_answer(cache: Path, story: Path) -> None:
    ran = split(cache, story, "--jsonl", "--seed", "7")
    lines = events(ran.stdout)
    done = [line for line in lines if line["event"] == "part_done"]
    documented = (Path(__file__).parent.parent.parent / "docs" / "jsonl.md").read_text()

    assert ran.status == 0, ran.stderr
    assert lines[0]["event"] == "split_planned"
    assert len(done) == lines[0]["parts"]
    assert all(line["answer"] and line["thinking"] and line["reason"] == "stop" for line in done)
    assert [line["event"] for line in lines if line["event"] in ("finished", "joining")] == [
        "joining",
        "finished",
    ]
    assert "".join(str(line["text"]) for line in lines if line["event"] == "answer") == lines[-1]["answer"]
    assert {line["seed"] for line in lines if line["event"] == "planned"} == {7}
    for line in lines:
        assert line["v"] == 2
        assert all(f"`{field}`" in documented for field in line), line


def test_schema_trace_and_figures(cache: Path, story: Path, tmp_path: Path) -> None:
    """The schema is for the last answer; the trace has all passes' thinking; the figures count them all."""
    schema, trace = tmp_path / "schema.json", tmp_path / "trace.txt"
    schema.write_text('{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}')
    ran = split(
        cache, story, "--json-schema", str(schema), "--think-to", str(trace), "--stats", "--think", "show"
    )

    assert ran.status == 0, ran.stderr
    jsonschema.validate(json.loads(ran.stdout), json.loads(schema.read_text()))
    heads = re.findall(r"--- (.*) ---\nI count e", trace.read_text())
    assert heads[0].startswith("part 1 of ")
    assert heads[-1] == "the last pass"
    assert ran.stderr.count("There are 2 e's") == len(heads) - 1  # shown, because thinking is
    figures, ledger = ran.stderr.splitlines()[-2:]
    assert figures.startswith(f"{len(heads)} passes: prompt ")
    assert ledger.startswith("last pass: context ")


def test_wrong_usage_is_refused_before_the_first_pass(cache: Path, story: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "number", "not": {"multipleOf": 0.5}}')
    for arguments, says in (
        (("--each",), "leave out --each"),
        (("-f", str(story)), "not the question"),
        (("-f", str(story), "--json-schema", str(schema), QUESTION), "#/not"),
    ):
        ran = qwq_here(cache, "ask", "--split", *SMALL, *arguments, stdin=b"")
        assert (ran.status, ran.stdout) == (2, "")
        assert says in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def started(cache: Path, book: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [*QWQ, "ask", "--split", *SMALL, "-f", str(book), *arguments, QUESTION]
    return subprocess.Popen(
        command,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


def test_after_ctrl_c_the_lines_of_json_have_the_answers_so_far(cache: Path, book: Path) -> None:
    with started(cache, book, "--jsonl") as process:
        assert process.stdout is not None
        read = b""
        while read.count(b'"event":"part_done"') < 2:
            line = process.stdout.readline()
            assert line, read
            read += line
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=TIMEOUT_S)
    lines = events((read + rest).decode())

    assert process.returncode == 130
    assert stderr == b""
    assert (lines[-1]["event"], lines[-1]["reason"]) == ("finished", "interrupted")
    done = [line for line in lines if line["event"] == "part_done"]
    assert [line["reason"] for line in done[:2]] == ["stop", "stop"]
    assert done[-1]["reason"] == "interrupted"


def test_ctrl_c_shows_the_answers_so_far_where_they_were_not_shown(cache: Path, book: Path) -> None:
    with started(cache, book) as process:
        assert process.stderr is not None
        read = b""
        while b"part 3 of" not in read:
            line = process.stderr.readline()
            assert line, read
            read += line
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=TIMEOUT_S)

    assert (process.returncode, stdout) == (130, b"")
    for part in (1, 2):
        shown = re.search(rf"answer from part {part} of \d+ \(stop\):\n(.*)", rest.decode())
        assert shown is not None
        assert "There are 2 e's" in shown[1]


def test_on_a_terminal_each_part_thinks_and_answers_under_its_line(cache: Path, story: Path) -> None:
    arguments = ("ask", "--split", *SMALL, "-f", str(story), QUESTION)
    with Terminal(arguments, environment(cache), columns=100, rows=50) as terminal:
        assert terminal.read_to_end() == 0
        text = terminal.text
    n_parts = int(re.findall(r"(\d+) parts of up to", text)[0])
    blocks = text.split("▸ part ")[1:]

    assert len(blocks) == n_parts
    assert all("I count e in tree." in block and "There are 2 e's" in block for block in blocks)
    assert text.count("There are 2 e's") == n_parts + 1
