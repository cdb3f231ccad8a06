"""Turns are written while they run: the effect of a kill, a full disk or another process."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.dialogue.reply import REPORT_INTERVAL_S
from qwq_local.errors import HistoryError
from qwq_local.events import (
    Answer,
    CloseReason,
    Finished,
    FinishReason,
    Generated,
    Prefill,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.archive import Archive
from qwq_local.history.recorder import WRITE_EVERY_S
from qwq_local.history.records import TurnOrigin, TurnStart, TurnState
from tests.history.programs import PLAN, started, thoughts, turn_events

TIMEOUT_S = 60
PAGE_BYTES = 4096 + 24  # in the log, with its header


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.sqlite3"


def test_the_thought_of_a_killed_process_is_found_whole_and_once(path: Path) -> None:
    """The pieces were written without an event after them and without an end."""
    with Archive.open(path) as archive, started("think", path, 100) as process:
        assert process.stdout is not None
        turn = int(process.stdout.readline())
        wait_for(lambda: archive.turn(turn).thinking == "".join(thoughts(100)))
        assert archive.lost() == []
        assert archive.turn(turn).state is TurnState.RUNNING
        with pytest.raises(HistoryError, match="right now"):
            archive.resume_turn(turn)
        with pytest.raises(HistoryError, match="another qwq"):
            archive.remove(archive.turn(turn).conversation)
        process.kill()
        process.wait()
        [lost] = archive.lost()
        assert archive.lost() == []
        assert (lost.id, lost.state, lost.can_go_on) == (turn, TurnState.LOST, True)
        assert lost.thinking == "".join(thoughts(100))
        assert (lost.prompt, lost.generated) == ((1, 2, 3), tuple(range(100)))
        assert (lost.stats.thinking_tokens, lost.plan["seed"]) == (100, 7)
        assert [hit.turn for hit in archive.search("量子纠缠")] == [turn]
    with Archive.open(path) as archive:
        archive.begin_turn(TurnStart(lost.conversation, None, "And now?", "And now?"))
        assert len(list((path.parent / "running").iterdir())) == 1
    assert not list((path.parent / "running").iterdir())


def test_a_lost_turn_taken_by_another_process_is_still_reported(path: Path) -> None:
    with started("think", path, 10) as process:
        assert process.stdout is not None
        turn = int(process.stdout.readline())
    with Archive.open(path) as listing:
        listing.pick_up()
        assert listing.turn(turn).state is TurnState.LOST
    with Archive.open(path) as archive:
        assert [lost.id for lost in archive.lost()] == [turn]
        assert archive.lost() == []


def test_a_kill_in_mid_thought_loses_at_most_a_second() -> None:
    """Text waits for the ids of its tokens, and both for the next write; bench/kill.py measures the loss."""
    assert REPORT_INTERVAL_S + WRITE_EVERY_S < 1


def test_kills_at_any_moment_leave_every_kept_turn_whole(path: Path) -> None:
    chance = random.Random(7)
    kept: list[int] = []
    for _ in range(6):
        with started("converse", path, 1000) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(1, 12)):
                kept.append(int(process.stdout.readline()))
            process.kill()
            kept += [int(line) for line in process.stdout if line.endswith("\n")]
    with Archive.open(path) as archive:
        assert archive.notices == ()
        archive.lost()
        for turn in map(archive.turn, kept):
            assert turn.state is TurnState.DONE
            assert turn.thinking == "".join(thoughts(25))
            assert (
                turn.answer
                == f"It is {turn.question.removesuffix('?').lower().replace('question', 'answer')}."
            )
            assert turn.generated == (*range(25), 9)
        found = {hit.turn for hit in archive.search("量子纠缠", limit=10_000)}
        assert set(kept) <= found
        assert all(len(archive.path(record.id)) == record.n_turns for record in archive.conversations())


def test_processes_that_write_at_once_do_not_block_each_other(path: Path) -> None:
    with started("converse", path, 40) as one, started("converse", path, 40) as other:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in (one, other)]
    kept = [line for output, complaint in outputs for line in output.splitlines()]
    assert len(set(map(int, kept))) == 80
    with Archive.open(path) as archive:
        assert [record.n_turns for record in archive.conversations()] == [40, 40]
        assert len(archive.search("answer 39")) == 2


def test_a_full_disk_stops_no_turn_and_is_reported(path: Path) -> None:
    with started("overflow", path, 120_000) as process:
        output, complaint = process.communicate(timeout=TIMEOUT_S)
    problem, *facts, refused, copied, afterwards = json.loads(output or complaint)
    whole = "".join(thoughts(20_000))
    assert "this turn is not being kept: the history" in problem
    assert "QWQ_DATA_DIR" in problem
    assert facts == [len(whole), 20_001, "It is so.", "done", True]
    assert "disk" in refused
    assert copied == "It is so."
    assert afterwards is None  # there was room again before it ended
    with Archive.open(path) as archive:
        [turn] = archive.path(1)
        assert (turn.thinking, turn.answer, turn.state) == (whole, "It is so.", TurnState.DONE)
        assert turn.generated == (*range(20_000), 9)


def begun(archive: Archive, question: str = "Why?") -> tuple[int, TurnStart]:
    conversation = archive.begin("miniature", "default", "")
    return conversation, TurnStart(conversation, None, question, question)


def test_a_turn_can_be_read_before_anything_of_it_is_written() -> None:
    with Archive.private() as archive:
        conversation, start = begun(archive)
        recorder = archive.begin_turn(start)
        recorder.feed(Prompted((5, 6)))
        recorder.feed(Thinking("First. "))
        recorder.feed(Steered("Be short."))
        recorder.feed(Generated(0, (10, 11, 12, 13), 4))
        recorder.feed(Generated(2, (20,), 3))
        [turn] = archive.path(conversation)
        assert (turn.thinking, turn.steered) == ("First. Be short.", ("Be short.",))
        assert (turn.prompt, turn.generated, turn.state) == ((5, 6), (10, 11, 20), TurnState.RUNNING)
        assert (turn.stats.prompt_tokens, turn.stats.thinking_tokens) == (2, 3)


def test_withdrawn_ids_are_removed_after_they_were_written(path: Path) -> None:
    with Archive.open(path) as archive:
        _, start = begun(archive)
        recorder = archive.begin_turn(start)
        recorder.feed(Generated(0, (1, 2, 3, 4), 4))
        wait_for(lambda: n_entries(path) == 1)
        recorder.feed(Generated(1, (7,), 2))
        recorder.feed(Generated(2, (8, 9), 4))
        wait_for(lambda: n_entries(path) == 2)
        recorder.feed(Generated(4, (10,), 4))
        recorder.close()
        assert n_entries(path) == 0
        turn = archive.turn(recorder.turn_id)
    assert turn.generated == (1, 7, 8, 9, 10)
    assert (turn.state, turn.reason) == (TurnState.STOPPED, FinishReason.INTERRUPTED)


def test_text_is_not_written_past_the_ids_it_continues_from(path: Path) -> None:
    def written() -> str:
        connection = sqlite3.connect(path)
        try:
            entries = connection.execute("SELECT events FROM journal ORDER BY id")
            events = [json.loads(line) for (lines,) in entries for line in lines.split("\n")]
            return "".join(event["text"] for event in events if event["event"] == "thinking")
        finally:
            connection.close()

    with Archive.open(path) as archive:
        _, start = begun(archive)
        recorder = archive.begin_turn(start)
        recorder.feed(Thinking("one "))
        recorder.feed(Generated(0, (1,), 1))
        recorder.feed(Thinking("two "))
        wait_for(lambda: n_entries(path) == 1)
        assert written() == "one "
        assert archive.turn(recorder.turn_id).thinking == "one two "
        recorder.feed(Generated(1, (2,), 2))
        recorder.feed(Thinking("three"))
        wait_for(lambda: n_entries(path) == 2)
        assert written() == "one two "
        recorder.close()
        assert archive.turn(recorder.turn_id).thinking == "one two three"


def n_entries(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM journal").fetchone()[0])
    finally:
        connection.close()


def test_a_long_turn_costs_no_more_to_write_than_a_short_one(path: Path) -> None:
    """Counted in bytes of the log: the cost of a piece does not depend on the text before it."""
    with Archive.open(path) as archive:
        _, start = begun(archive)
        recorder = archive.begin_turn(start)
        log = path.with_name(path.name + "-wal")

        def growth(text: str, tokens: tuple[int, ...]) -> int:
            written, before = n_entries(path), log.stat().st_size
            recorder.feed(Thinking(text))
            recorder.feed(Generated(n_tokens, tokens, 1))
            wait_for(lambda: n_entries(path) > written)
            return log.stat().st_size - before

        n_tokens = 0
        growth("first", (1,))
        n_tokens = 1
        at_first = growth("short", (2,))
        n_tokens = 2
        large = growth("long " * 200_000, tuple(range(100_000)))
        n_tokens += 100_000
        assert large > 1_400_000
        assert growth("short", (3,)) <= at_first + 2 * PAGE_BYTES


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (FinishReason.STOP, TurnState.DONE),
        (FinishReason.NO_ANSWER, TurnState.DONE),
        (FinishReason.LOOP, TurnState.DONE),
        (FinishReason.INTERRUPTED, TurnState.STOPPED),
        (FinishReason.MAX_TOKENS, TurnState.STOPPED),
        (FinishReason.CONTEXT, TurnState.STOPPED),
    ],
)
def test_a_cut_turn_can_be_continued_and_an_ended_one_cannot(reason: FinishReason, state: TurnState) -> None:
    with Archive.private() as archive:
        _, start = begun(archive)
        recorder = archive.begin_turn(start)
        recorder.feed(Finished(reason, TurnStats(), "thought", "said"))
        turn = archive.turn(recorder.turn_id)
    assert (turn.state, turn.reason, turn.can_go_on) == (state, reason, state is TurnState.STOPPED)


def test_a_continued_turn_is_one_turn_with_its_beginning(path: Path) -> None:
    with Archive.open(path) as archive:
        _, start = begun(archive)
        first = archive.begin_turn(start)
        first.feed(Prompted((1, 2)))
        first.feed(Thinking("One "))
        first.feed(Generated(0, (5, 6), 2))
        stats = TurnStats(2, 0, 2, 0, 0.5, 1.0)
        first.feed(Finished(FinishReason.INTERRUPTED, stats, "One ", ""))
        assert len(archive.search("One")) == 1
    with Archive.open(path) as archive:
        second = archive.resume_turn(first.turn_id)
        assert archive.turn(first.turn_id).state is TurnState.RUNNING
        second.feed(Prompted((1, 2)))
        second.feed(Thinking("two."))
        second.feed(Generated(2, (7,), 3))
        turn = archive.turn(first.turn_id)
        assert (turn.thinking, turn.generated, turn.stats.thinking_tokens) == ("One two.", (5, 6, 7), 3)
        second.feed(ThinkingClosed(CloseReason.ASKED, 3, 4.0))
        second.feed(Answer("Yes."))
        second.feed(Generated(3, (8,), 3))
        after = TurnStats(2, 0, 3, 1, 0.25, 3.0, resumed_tokens=2)
        second.feed(Finished(FinishReason.STOP, after, "One two.", "Yes."))
        turn = archive.turn(first.turn_id)
        assert (turn.thinking, turn.answer, turn.generated) == ("One two.", "Yes.", (5, 6, 7, 8))
        assert (turn.state, turn.closed) == (TurnState.DONE, CloseReason.ASKED)
        assert turn.stats == TurnStats(2, 0, 3, 1, 0.75, 4.0)
        assert turn.stats.decode_rate == 1.0
        assert [hit.part for hit in archive.search("One two")] == ["thinking"]
        assert archive.search("One Zwei") == []


def test_the_end_of_a_turn_is_written_once_another_process_is_done(path: Path) -> None:
    with Archive.open(path) as archive:
        _, start = begun(archive)
        recorder = archive.begin_turn(start)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for event in turn_events(25):
            recorder.feed(event)
        assert (recorder.is_written, recorder.problem) == (False, None)
        recorder.close()
        assert recorder.problem is not None
        assert "by another qwq" in recorder.problem
        assert archive.turn(recorder.turn_id).state is TurnState.DONE
        other.execute("ROLLBACK")
        other.close()
        wait_for(lambda: recorder.is_written and recorder.problem is None)
        assert archive.turn(recorder.turn_id).generated == (*range(25), 9)


def test_the_origin_of_a_turn_is_completed_by_its_plan_and_prefill(path: Path) -> None:
    known = TurnOrigin("QwQ-32B", "sha256:1", "0.3.36", "math", {"temperature": "0.6"})
    whole = replace(known, seed=7, yarn_factor=1.0, kv_type="f16", cached_tokens=2)
    with Archive.open(path) as archive:
        conversation, start = begun(archive)
        recorder = archive.begin_turn(replace(start, origin=known))
        record = archive.conversation(conversation)
        assert (record.model, record.profile) == ("QwQ-32B", "math")
        for event in (PLAN, Prompted((1, 2, 3)), Prefill(1, 3, 2), Prefill(3, 3, 0), Thinking("Well.")):
            recorder.feed(event)
        assert archive.turn(recorder.turn_id).origin == whole
        wait_for(lambda: n_entries(path) == 1)
        with Archive.open(path) as other:
            assert other.turn(recorder.turn_id).origin == whole
    with Archive.open(path) as archive:
        assert archive.turn(recorder.turn_id).origin == whole
        again = archive.resume_turn(recorder.turn_id)
        for event in (replace(PLAN, seed=8), Prompted((1, 2, 3)), Prefill(3, 3, 3)):
            again.feed(event)
        again.close()
        assert archive.turn(recorder.turn_id).origin == replace(whole, is_continued=True)


def test_a_turn_without_an_origin_has_the_conversations() -> None:
    with Archive.private() as archive:
        _, start = begun(archive)
        turn = archive.turn(archive.begin_turn(start).turn_id)
        assert turn.origin == TurnOrigin("miniature", profile="default")


def test_a_turn_whose_conversation_was_removed_continues(path: Path) -> None:
    with Archive.open(path) as archive:
        conversation, start = begun(archive)
        recorder = archive.begin_turn(start)
        archive.remove(conversation)
        for event in turn_events(5):
            recorder.feed(event)
        assert recorder.problem is not None
        assert "removed" in recorder.problem
