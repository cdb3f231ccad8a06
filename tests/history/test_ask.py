"""`qwq ask` is kept in the history, continued, and never disturbed by it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from qwq_local.errors import HistoryError
from qwq_local.events import Finished, FinishReason, Notice, Prefill, Prompted, Thinking, TurnStats
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.background import AskedTurn, BackgroundRecorder
from qwq_local.history.records import AnswerPart, ThinkingPart, TurnOrigin, TurnRecord, TurnState
from tests.command import qwq, qwq_here
from tests.history.programs import PLAN, turn_events

QUESTION = "How many r's are in the word strawberry?"
GREEDY = ("-m", "miniature", "-s", "temperature=0", "--seed", "7")
ASKED = AskedTurn("ask", "Why?", "Why? Please.", "Be brief.", ("notes.txt",))
ORIGIN = TurnOrigin("QwQ-32B", "sha256:1", "library", "math", {"temperature": "0.6"})


def turns_of(cache: Path) -> list[list[TurnRecord]]:
    """The turns of all conversations, the last conversation first."""
    with Archive.open(cache / "data" / FILE) as archive:
        return [archive.path(record.id) for record in archive.conversations()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one question, asked with a file and standard input."""
    cache = tmp_path_factory.mktemp("ask")
    notes = cache / "notes.txt"
    notes.write_text("a note\n")
    ran = qwq_here(cache, "ask", *GREEDY, "-f", str(notes), "--system", "Count.", QUESTION, stdin=b"piped\n")
    assert (ran.status, ran.stderr) == (0, "")
    return cache


def test_a_question_and_its_answer_are_kept(cache: Path) -> None:
    [[turn]] = turns_of(cache)
    assert (turn.question, turn.files) == (QUESTION, (str(cache / "notes.txt"), "standard input"))
    assert turn.content.endswith(f"piped\n\n{QUESTION}")
    assert "a note" in turn.content
    assert turn.answer.strip()
    assert (turn.state, turn.reason) == (TurnState.DONE, FinishReason.STOP)
    assert len(turn.generated) == turn.stats.thinking_tokens + turn.stats.answer_tokens
    assert turn.prompt
    assert turn.origin is not None
    assert (turn.origin.model, turn.origin.profile, turn.origin.seed) == ("miniature", "chat", 7)
    assert turn.origin.settings["temperature"] == "0"
    assert turn.origin.identity


def test_the_list_says_which_command_asked(cache: Path) -> None:
    listed = qwq(cache, "history")
    _, line = listed.stdout.splitlines()
    assert line.split()[-2:] == ["1", "ask"]
    [record] = json.loads(qwq(cache, "history", "--json").stdout)
    assert (record["command"], record["system"]) == ("ask", "Count.")
    assert "conversation 1 by `qwq ask`" in qwq(cache, "history", "show", "1").stdout


def test_log_probabilities_are_written_as_json_and_kept(tmp_path: Path) -> None:
    """A closed thought shows a forced run of tokens; `--private` keeps nothing and writes the same lines."""
    flags = ("--jsonl", "-s", "logprobs=3", "-s", "thinking_budget=12")
    kept, private = (
        qwq_here(tmp_path, "ask", *GREEDY, *flags, *more, QUESTION) for more in ((), ("--private",))
    )
    lines = [_generated(ran.stdout) for ran in (kept, private)]
    assert lines[0] == lines[1]
    tokens, sampled, logprobs = lines[0]
    assert len(tokens) == len(sampled) == len(logprobs)
    assert not all(sampled)
    assert [each is not None for each in logprobs] == sampled
    for token, each in zip(tokens, logprobs, strict=True):
        if each is not None:
            assert each["token"] == token == each["top"][0][0]
            assert [logprob for _, logprob in each["top"]] == sorted(
                (logprob for _, logprob in each["top"]), reverse=True
            )
            assert len(each["top"]) == 3
            assert each["logprob"] == each["top"][0][1] <= 0
    [[turn]] = turns_of(tmp_path)
    assert turn.generated == tuple(tokens)
    runs = [part.tokens for part in turn.parts if isinstance(part, ThinkingPart | AnswerPart)]
    assert [flag for run in runs for flag in run.sampled or ()] == sampled
    recorded = [each for run in runs for each in run.logprobs or ()]
    assert [each and (each.token, len(each.top)) for each in recorded] == [
        each and (each["token"], 3) for each in logprobs
    ]


def _generated(lines: str) -> tuple[list[int], list[bool], list[Any]]:
    """The tokens of all `generated` lines, which ones were sampled, and their log-probabilities."""
    whole: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for line in map(json.loads, lines.splitlines()):
        if line["event"] == "generated":
            for values, name in zip(whole, ("tokens", "sampled", "logprobs"), strict=True):
                values[line["start"] :] = line[name]
    return whole


def test_a_long_text_from_standard_input_is_kept_whole_but_not_as_the_question(tmp_path: Path) -> None:
    text = "How many r's are in the word strawberry? " * 101
    asked = qwq_here(tmp_path, "ask", *GREEDY, "-s", "max_tokens=1", stdin=text.encode())
    assert asked.status == 6
    [[turn]] = turns_of(tmp_path)
    assert turn.question == text[:4000] + "…"
    assert text.rstrip() in turn.content


def test_the_next_question_continues_the_last_conversation(tmp_path: Path) -> None:
    asked = qwq_here(tmp_path, "ask", *GREEDY, "--system", "Count.", QUESTION)
    continued = qwq_here(tmp_path, "ask", "-c", "-s", "temperature=0", "How many e's are in the word tree?")
    assert (asked.status, continued.status, continued.stderr) == (0, 0, "")
    [[first, second]] = turns_of(tmp_path)
    assert (second.parent, second.question) == (first.id, "How many e's are in the word tree?")
    assert second.answer.strip() == continued.stdout.strip()
    assert len(second.prompt) > len(first.prompt)
    assert second.origin is not None
    assert second.origin.model == "miniature"
    with Archive.open(tmp_path / "data" / FILE) as archive:
        assert archive.conversation(1).system == "Count."
    # A chat continues it too, after both turns.
    chatted = qwq_here(tmp_path, "chat", "-c", stdin=b"How many o's are in the word book?\n")
    assert chatted.status == 0
    [path] = turns_of(tmp_path)
    assert [turn.number for turn in path] == [1, 2, 3]


def test_an_answer_that_was_cut_is_continued_in_a_chat(tmp_path: Path) -> None:
    cut = qwq_here(tmp_path, "ask", *GREEDY, "-s", "max_tokens=2", QUESTION)
    assert cut.status == 6
    [[before]] = turns_of(tmp_path)
    assert (before.state, before.reason) == (TurnState.STOPPED, FinishReason.MAX_TOKENS)
    qwq_here(tmp_path, "chat", "-c", "-s", "temperature=0", stdin=b"/continue\n")
    [[after]] = turns_of(tmp_path)
    assert after.generated[: len(before.generated)] == before.generated
    assert after.reason is FinishReason.STOP
    assert after.answer.startswith(before.answer)


def test_of_a_split_text_the_last_pass_is_kept_with_the_question_alone(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"On day {number} somebody went to the sea.\n\n" for number in range(60)))
    small = ("ask", *GREEDY, "-s", "n_ctx=2048")
    asked = qwq_here(tmp_path, *small, "--split", "-f", str(book), "How many e's are in the word tree?")
    assert asked.status == 0
    [[turn]] = turns_of(tmp_path)
    assert (turn.content, turn.files) == ("How many e's are in the word tree?", (str(book),))
    assert turn.answer.strip() == asked.stdout.strip()
    assert turn.thinking
    continued = qwq_here(tmp_path, *small, "-c", "How many o's are in the word book?")
    assert continued.status == 0
    assert len(turns_of(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("flags", "stdin"),
    [
        (("--private", QUESTION), None),
        (("--dry-run", QUESTION), None),
        (("--each",), b'{"question": "How many e\'s are in the word tree?"}\n'),
    ],
)
def test_private_dry_run_and_each_leave_no_history(
    tmp_path: Path, flags: tuple[str, ...], stdin: bytes | None
) -> None:
    assert qwq_here(tmp_path, "ask", *GREEDY, *flags, stdin=stdin).status == 0
    assert not (tmp_path / "data" / FILE).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "there is no conversation yet"),
        (("--private",), "--private has no past"),
        (("--each",), "leave out --each"),
        (("--split",), "leave out --each and --split"),
    ],
)
def test_a_wrong_continue_is_refused(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    refused = qwq_here(tmp_path, "ask", "-c", *flags, "And?")
    assert refused.status == 2
    assert message in refused.stderr


def test_a_history_that_cannot_be_written_costs_one_line(tmp_path: Path) -> None:
    """A file is in the way of its folder."""
    (tmp_path / "data").write_text("")
    ran = qwq_here(tmp_path, "ask", *GREEDY, QUESTION)
    assert ran.status == 0
    assert "\\boxed{3}" in ran.stdout
    [line] = ran.stderr.splitlines()
    assert line.startswith("note: this turn is not being kept: ")


def recorder(archive: Archive | HistoryError, asked: AskedTurn = ASKED) -> BackgroundRecorder:
    def opened() -> Archive:
        if isinstance(archive, HistoryError):
            raise archive
        return archive

    return BackgroundRecorder(opened, asked, lambda: ORIGIN)


def test_an_origin_is_completed_by_the_plan_and_the_prefill(tmp_path: Path) -> None:
    path = tmp_path / FILE
    background = recorder(Archive.open(path))
    for event in (PLAN, Prompted((1, 2, 3)), Prefill(0, 3, 2), *list(turn_events(3))[2:]):
        background.feed(event)
    assert background.close() == []
    assert background.close() == []
    with Archive.open(path) as archive:
        record = archive.conversation(1)
        [turn] = archive.path(1)
    assert (record.command, record.model, record.system) == ("ask", "QwQ-32B", "Be brief.")
    assert turn.origin == TurnOrigin(
        "QwQ-32B", "sha256:1", "library", "math", {"temperature": "0.6"}, 7, 1.0, "f16", 2
    )
    assert turn.thinking.count("Thought") == 3


def test_a_failure_before_any_text_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / FILE
    background = recorder(Archive.open(path))
    background.feed(PLAN)
    background.close()
    with Archive.open(path) as archive:
        assert archive.conversations() == []


def test_a_failed_turn_leaves_the_continued_conversation_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / FILE
    first = recorder(Archive.open(path))
    for event in turn_events(3):
        first.feed(event)
    first.close()
    failed = recorder(Archive.open(path), AskedTurn("ask", "And?", "And?", "Be long.", (), 1, 1))
    failed.feed(PLAN)
    failed.close()
    with Archive.open(path) as archive:
        assert [turn.question for turn in archive.path(1)] == ["Why?"]
        assert archive.conversation(1).system == "Be long."


def test_a_turn_without_its_end_is_kept_as_stopped(tmp_path: Path) -> None:
    """For example when the reader of the answer has gone."""
    path = tmp_path / FILE
    background = recorder(Archive.open(path))
    for event in (PLAN, Thinking("Half a")):
        background.feed(event)
    background.close()
    with Archive.open(path) as archive:
        [turn] = archive.path(1)
    assert (turn.state, turn.thinking) == (TurnState.STOPPED, "Half a")


def test_feeding_waits_for_no_history() -> None:
    """Not even for a history that opens only after the answer."""
    is_out = threading.Event()

    def opened() -> Archive:
        is_out.wait()
        raise HistoryError("the disk is full.")

    background = BackgroundRecorder(opened, ASKED, lambda: ORIGIN)
    for event in turn_events(100):
        background.feed(event)
    is_out.set()
    assert background.close() == ["this turn is not being kept: the disk is full."]


def test_nothing_is_opened_before_a_turn_begins() -> None:
    background = recorder(HistoryError("opened"))
    background.feed(Notice("the model is elsewhere"))
    assert background.close() == []
    background.feed(Finished(FinishReason.STOP, TurnStats(), "", ""))
    assert background.close() == ["this turn is not being kept: opened"]
