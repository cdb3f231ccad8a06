"""The reply over an engine that replays a queue: limits, closing, loops, interruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from qwq_local.dialogue.reply import ReplySettings
from qwq_local.dialogue.transcript import CLOSING_SENTENCES
from qwq_local.errors import AbortFlag
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Notice,
    Prefill,
    Thinking,
    ThinkingClosed,
)
from tests.fakes import CLOSE, END, QueuedEngine, play

PROMPT = "question"
SETTINGS = ReplySettings(4096, thinking_budget=1000, answer_reserve=64)


def run(engine: QueuedEngine, settings: ReplySettings = SETTINGS) -> list[Event]:
    return list(play(engine, settings, engine.vocabulary.encode_text(PROMPT)))


def thinking(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Thinking))


def answer(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Answer))


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Finished) for event in events) == 1
    return events[-1]


def closed(events: Sequence[Event]) -> ThinkingClosed:
    return next(event for event in events if isinstance(event, ThinkingClosed))


def test_thinking_and_answer_are_separate_and_counted_apart() -> None:
    events = run(QueuedEngine(["Hm", " well", CLOSE, "\n\n", "It is", " 3.", END]))

    assert (thinking(events), answer(events)) == ("Hm well", "It is 3.")
    assert closed(events).reason is CloseReason.MODEL
    end = finished(events)
    assert (end.reason, end.thinking, end.answer) == (FinishReason.STOP, "Hm well", "It is 3.")
    assert (end.stats.prompt_tokens, end.stats.thinking_tokens, end.stats.answer_tokens) == (8, 3, 3)


def test_events_come_in_the_documented_order() -> None:
    kinds = [type(event) for event in run(QueuedEngine(["a", CLOSE, "b", END]))]

    assert kinds == [Prefill, Prefill, Thinking, ThinkingClosed, Answer, Finished]


def test_a_thinking_at_its_budget_is_closed_and_the_cache_stays() -> None:
    """The sentence and the tag go into the cache; the tag does not go into any text."""
    engine = QueuedEngine([*["thought "] * 10, "The answer", " is 3.", END])
    engine_events = run(engine, replace(SETTINGS, thinking_budget=10))

    assert closed(engine_events).reason is CloseReason.BUDGET
    assert closed(engine_events).tokens == 10
    sentence = CLOSING_SENTENCES[CloseReason.BUDGET]
    assert thinking(engine_events) == "thought " * 10 + f"\n\n{sentence}\n"
    assert answer(engine_events) == "The answer is 3."
    assert engine.cached_text.startswith(PROMPT + "thought " * 10 + f"\n\n{sentence}\n</think>\n\nThe answer")


def test_a_budget_of_zero_answers_at_once() -> None:
    events = run(QueuedEngine(["Yes.", END]), replace(SETTINGS, thinking_budget=0))

    assert closed(events).tokens == 0
    assert answer(events) == "Yes."


@pytest.mark.parametrize("n_ctx", [200, 256, 300])
def test_the_reserve_of_the_window_is_kept_for_the_answer(n_ctx: int) -> None:
    """The window is never exceeded (the fake engine asserts it), and the answer gets its share."""
    engine = QueuedEngine([*["t"] * 1000], n_ctx=n_ctx)
    settings = replace(SETTINGS, answer_reserve=64, loop_guard=False)
    events = run(engine, settings)

    assert closed(events).reason is CloseReason.CONTEXT
    assert finished(events).reason is FinishReason.CONTEXT
    assert finished(events).stats.answer_tokens >= 64


def test_max_tokens_counts_the_answer_alone() -> None:
    events = run(QueuedEngine([*["t"] * 50, CLOSE, *["a"] * 50]), replace(SETTINGS, max_tokens=7))

    assert finished(events).reason is FinishReason.MAX_TOKENS
    assert answer(events) == "a" * 7
    assert finished(events).stats.thinking_tokens == 51


def test_a_model_that_ends_its_turn_inside_the_thinking_is_asked_to_answer() -> None:
    events = run(QueuedEngine(["half a thou", END, "Three.", END]))

    assert any(isinstance(event, Notice) for event in events)
    assert answer(events) == "Three."
    assert finished(events).reason is FinishReason.STOP


def test_an_empty_reply_says_so() -> None:
    for pieces in (["x", CLOSE, END], ["x", CLOSE, "\n\n", " ", END], ["x", END, END]):
        assert finished(run(QueuedEngine(pieces))).reason is FinishReason.NO_ANSWER


def test_a_thinking_that_is_opened_again_before_the_answer_is_thinking() -> None:
    events = run(QueuedEngine(["one", CLOSE, "\n", "<think>", "two", CLOSE, "Three.", END]))

    assert "two" in thinking(events)
    assert answer(events) == "Three."
    assert finished(events).reason is FinishReason.STOP
    assert (finished(events).stats.thinking_tokens, finished(events).stats.answer_tokens) == (6, 1)


def test_a_character_that_is_cut_between_tokens_comes_whole() -> None:
    raw = "量子🦙".encode()
    events = run(QueuedEngine([*(raw[i : i + 1] for i in range(len(raw))), CLOSE, raw[:5], raw[5:], END]))

    assert thinking(events) == "量子🦙"
    assert answer(events) == "量子🦙"


LOOP = ["Wait", ",", " is", " that", " right", "?", " Let", " me", " check", " it", " again", ".", "\n"]


def test_a_loop_in_the_thinking_is_cut_back_closed_and_answered() -> None:
    start = ["First", " I", " count", " the", " letters", ".", "\n"]
    # The guard decides when to cut; the rest of the queue would be the model's answer.
    engine = QueuedEngine(start + LOOP * 200)
    events = run(engine, replace(SETTINGS, thinking_budget=2500, max_tokens=3))

    assert closed(events).reason is CloseReason.LOOP
    kept = finished(events).thinking
    sentence = CLOSING_SENTENCES[CloseReason.LOOP]
    assert kept.startswith("First I count the letters.\nWait, is that right?")
    assert kept.count("Wait, is that right?") == 1
    assert kept.endswith(f"{sentence}\n")
    assert engine.cached_text.count("Wait, is that right?") == 1
    assert f"{sentence}\n{CLOSE}\n\n" in engine.cached_text
    # What was cut stays counted: it took the budget and the time.
    assert finished(events).stats.thinking_tokens > len(start) + 2 * len(LOOP)


def test_a_loop_in_the_answer_ends_it_and_the_stored_answer_is_cut_before_it() -> None:
    engine = QueuedEngine(["t", CLOSE, "\n\n", "So", ":", "\n", *LOOP * 200], n_ctx=8192)
    events = run(engine)

    assert finished(events).reason is FinishReason.LOOP
    assert answer(events).count("Wait, is that right?") > 2
    assert finished(events).answer.startswith("So:\nWait, is that right?")
    assert finished(events).stats.answer_tokens > 3 + 2 * len(LOOP)
    assert finished(events).answer.count("Wait, is that right?") == 1
    assert engine.cached_text.count("Wait, is that right?") == 1


def test_the_loop_guard_can_be_turned_off() -> None:
    events = run(QueuedEngine(LOOP * 60), replace(SETTINGS, thinking_budget=700, loop_guard=False))

    assert closed(events).reason is CloseReason.BUDGET


@pytest.mark.parametrize(("abort_after", "expected"), [(0, ("", "")), (2, ("ab", "")), (5, ("abc", "de"))])
def test_an_interrupted_turn_keeps_its_text(abort_after: int, expected: tuple[str, str]) -> None:
    abort = AbortFlag()
    engine = QueuedEngine(["a", "b", "c", CLOSE, "d", "e", "f", END], abort=abort, abort_after=abort_after)
    events = run(engine)

    end = finished(events)
    assert end.reason is FinishReason.INTERRUPTED
    # The piece during whose decode the abort came was sampled and shown.
    assert end.thinking.startswith(expected[0])
    assert end.answer.startswith(expected[1])
    assert len(end.thinking + end.answer) <= abort_after + 1


def test_an_abort_in_prefill_ends_the_turn_in_order() -> None:
    abort = AbortFlag()
    abort.set()
    events = run(QueuedEngine(["a"], abort=abort))

    assert [type(event) for event in events] == [Finished]
    assert finished(events).reason is FinishReason.INTERRUPTED


def test_a_constraint_sees_only_tokens_sampled_under_it() -> None:
    """The thinking, the tag and the blank line after it do not reach the constraint."""
    engine = QueuedEngine(["{thinking}", CLOSE, '{"a"', ": 1}", END])
    events = run(engine, replace(SETTINGS, is_constrained=True))

    assert engine.vocabulary.text(engine.matcher.seen) == '{"a": 1}' + END
    assert answer(events) == '{"a": 1}'
    assert f"{CLOSE}\n\n" + '{"a"' in engine.cached_text


def test_text_after_a_tag_in_the_same_piece_does_not_bypass_the_constraint() -> None:
    engine = QueuedEngine(["thought", "</think>\n\nSure! ", '{"a": 1}', END])
    events = run(engine, replace(SETTINGS, is_constrained=True))

    assert answer(events) == '{"a": 1}'
    assert "Sure" not in engine.cached_text


def test_a_tag_inside_an_answer_under_a_constraint_is_content() -> None:
    pieces = ["thought", CLOSE, '{"a": "', "</th", "ink>", '"}', END]
    events = run(QueuedEngine(pieces), replace(SETTINGS, is_constrained=True))

    assert answer(events) == '{"a": "</think>"}'
