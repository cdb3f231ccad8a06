"""Control of a running reply: answer now, steer, pause; over an engine that replays a queue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from qwq_local.dialogue.control import ReplyControl, sentence_of
from qwq_local.dialogue.reply import ReplySettings
from qwq_local.dialogue.transcript import CLOSING_SENTENCES
from qwq_local.errors import Aborted, AbortFlag
from qwq_local.events import (
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Notice,
    Prefill,
    Steered,
    Thinking,
    ThinkingClosed,
)
from tests.fakes import CLOSE, END, QueuedEngine, play

PROMPT = "question"
SETTINGS = ReplySettings(4096, thinking_budget=1000, answer_reserve=64)
ASKED = CLOSING_SENTENCES[CloseReason.ASKED]
Action = Callable[[ReplyControl], None]


class SteeredEngine(QueuedEngine):
    """An engine that runs actions of the user by the number of pieces sampled before them."""

    def __init__(
        self,
        pieces: Sequence[str | bytes],
        actions: Mapping[int, Action],
        n_ctx: int = 4096,
        abort: AbortFlag | None = None,
    ) -> None:
        super().__init__(pieces, n_ctx, abort)
        self.control = ReplyControl()
        self._actions = actions
        if 0 in actions:
            actions[0](self.control)

    def sample(self) -> int:
        """The next of the queue; an action at this point takes effect after it."""
        token = super().sample()
        if self.sampled in self._actions:
            self._actions[self.sampled](self.control)
        return token


class CountingEngine(SteeredEngine):
    """An engine that records the number of tokens of each Force."""

    def __init__(self, pieces: Sequence[str | bytes], actions: Mapping[int, Action]) -> None:
        super().__init__(pieces, actions)
        self.forced: list[int] = []

    def force(self, tokens: Sequence[int]) -> None:
        """Record their number."""
        self.forced.append(len(tokens))
        super().force(tokens)


def steer(text: str) -> Action:
    return lambda control: control.steer(text)


def run(engine: SteeredEngine, settings: ReplySettings = SETTINGS) -> list[Event]:
    """The events of a turn. Asserts that the shown thinking is the kept one."""
    prompt = engine.vocabulary.encode_text(PROMPT)
    events = list(play(engine, settings, prompt, control=engine.control))
    shown = [event.text for event in events if isinstance(event, Thinking | Steered)]
    assert "".join(shown) == finished(events).thinking
    return events


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def closed(events: Sequence[Event]) -> ThinkingClosed:
    return next(event for event in events if isinstance(event, ThinkingClosed))


def notices(events: Sequence[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def test_answer_now_closes_the_thinking_with_a_sentence_and_answers_from_the_same_cache() -> None:
    engine = SteeredEngine(["Hm", " well", "It is", " 3.", END], {2: ReplyControl.answer_now})
    events = run(engine)

    assert (closed(events).reason, closed(events).tokens) == (CloseReason.ASKED, 2)
    end = finished(events)
    assert (end.thinking, end.answer) == (f"Hm well\n\n{ASKED}\n", "It is 3.")
    assert (end.reason, end.stats.thinking_tokens) == (FinishReason.STOP, 2)
    assert engine.cached_text == f"{PROMPT}Hm well\n\n{ASKED}\n{CLOSE}\n\nIt is 3."
    assert sum(isinstance(event, Prefill) for event in events) == 2


@pytest.mark.parametrize(
    ("action", "forced"),
    [(ReplyControl.answer_now, f"\n\n{ASKED}\n_\n\n"), (steer("Count twice."), "\n\nCount twice.\n\n")],
    ids=["answer now", "steer"],
)
def test_steering_decodes_only_the_forced_tokens(action: Action, forced: str) -> None:
    """Each character and the closing tag are one token: prompt and thought stay in the cache."""
    engine = CountingEngine(["Hm", " well", CLOSE, "It is", " 3.", END], {2: action})
    run(engine)

    assert engine.forced == [len(forced)]


def test_answer_now_while_it_prefills_counts_when_the_thinking_begins() -> None:
    events = run(SteeredEngine(["Three.", END], {0: ReplyControl.answer_now}))

    assert (closed(events).reason, closed(events).tokens) == (CloseReason.ASKED, 0)
    assert (finished(events).thinking, finished(events).answer) == (f"{ASKED}\n", "Three.")


def test_a_steered_sentence_is_a_paragraph_of_the_thinking() -> None:
    engine = SteeredEngine(["Hm", " well", "So", CLOSE, "3.", END], {2: steer(" Count\n the r's. ")})
    events = run(engine)

    assert [event for event in events if isinstance(event, Thinking | Steered)] == [
        Thinking("Hm"),
        Thinking(" well"),
        Thinking("\n\n"),
        Steered("Count the r's."),
        Thinking("\n\n"),
        Thinking("So"),
    ]
    assert engine.cached_text == f"{PROMPT}Hm well\n\nCount the r's.\n\nSo{CLOSE}3."
    assert sum(isinstance(event, Prefill) for event in events) == 2
    assert finished(events).stats.thinking_tokens == 4 + len("\n\nCount the r's.\n\n")


@pytest.mark.parametrize("before", [["a"], ["a\n"], ["a\n\n"], ["a", "\n", "\n"], ["\n\n", "a\n"]])
def test_a_steered_sentence_is_between_blank_lines(before: list[str]) -> None:
    engine = SteeredEngine([*before, "b", CLOSE, "c", END], {len(before): steer("No.")})
    assert finished(run(engine)).thinking == "a\n\nNo.\n\nb"


def test_a_sentence_steered_before_the_thinking_begins_is_its_first() -> None:
    engine = SteeredEngine([" Yes", CLOSE, "3.", END], {0: steer("Be quick.")})
    assert finished(run(engine)).thinking == "Be quick.\n\n Yes"
    assert engine.cached_text.startswith(f"{PROMPT}Be quick.\n\n Yes")


@pytest.mark.parametrize("piece", ["</th", "<think", "草".encode()[:2], "🦙".encode()[:1]])
def test_held_back_text_comes_before_a_steered_sentence(piece: str | bytes) -> None:
    engine = SteeredEngine(["a\n", piece, "b", CLOSE, "c", END], {2: steer("Go.")})
    held = piece if isinstance(piece, str) else "\ufffd"
    assert finished(run(engine)).thinking == f"a\n{held}\n\nGo.\n\nb"


@pytest.mark.parametrize(
    "text",
    ["Close it: </think> now", "<think>", "<</think>>", "</think</think>", "a </think", f"{END}{CLOSE}"],
)
def test_a_tag_in_a_steered_sentence_closes_nothing_and_is_no_control_token(text: str) -> None:
    engine = SteeredEngine(["a", "b", CLOSE, "c", END], {1: steer(text)})
    events = run(engine)

    assert closed(events).reason is CloseReason.MODEL
    assert finished(events).answer == "c"
    assert finished(events).thinking.endswith("\n\nb")
    controls = set(engine.vocabulary.special_tokens.values())
    assert [token for token in engine.tokens if token in controls] == [engine.vocabulary.token_of(CLOSE)]
    assert engine.cached_text.count(CLOSE) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  two\r\n lines\t", "two lines"),
        ("a\x1b[31m\x00b\x07", "a[31mb"),
        ("half \ud800 a pair", "half  a pair"),
        ("cafe\u0301 🧑‍💻", "café 🧑‍💻"),
        ("\n \u2028", ""),
        ("</think>", "< /think>"),
    ],
)
def test_a_sentence_is_one_line_without_controls(text: str, expected: str) -> None:
    assert sentence_of(text) == expected


def test_an_empty_sentence_changes_nothing() -> None:
    engine = SteeredEngine(["a", "b", CLOSE, "c", END], {1: steer(" \n ")})
    events = run(engine)
    assert engine.cached_text == f"{PROMPT}ab{CLOSE}c"
    assert not any(isinstance(event, Steered) for event in events)


@pytest.mark.parametrize(
    ("settings", "n_ctx"),
    [(replace(SETTINGS, thinking_budget=12), 4096), (replace(SETTINGS, answer_reserve=40), 140)],
)
def test_a_sentence_that_the_limits_leave_no_room_for_is_refused_by_a_notice(
    settings: ReplySettings, n_ctx: int
) -> None:
    engine = SteeredEngine(["a", "b", CLOSE, "c", END], {1: steer("A sentence of many characters.")}, n_ctx)
    events = run(engine, settings)
    assert notices(events) == [
        "not steered: the sentence has 34 tokens, and the thinking is too near its end."
    ]
    assert finished(events).thinking == "ab"
    assert engine.cached_text == f"{PROMPT}ab{CLOSE}c"


def test_steered_tokens_count_against_the_budget() -> None:
    engine = SteeredEngine(["t"] * 100, {1: steer("Go on.")})
    events = run(engine, replace(SETTINGS, thinking_budget=20, max_tokens=1))
    assert (closed(events).reason, closed(events).tokens) == (CloseReason.BUDGET, 20)
    assert engine.sampled == 20 - len("\n\nGo on.\n\n") + 1


def test_steering_during_the_answer_is_refused_with_a_notice() -> None:
    def both(control: ReplyControl) -> None:
        control.answer_now()
        control.steer("No.")

    engine = SteeredEngine(["a", CLOSE, "b", "c", END], {3: both})
    events = run(engine)
    assert notices(events) == ["it answers already: there is no thinking left to steer."]
    assert (finished(events).thinking, finished(events).answer) == ("a", "bc")
    assert [event.reason for event in events if isinstance(event, ThinkingClosed)] == [CloseReason.MODEL]


def test_requests_are_served_in_order() -> None:
    def several(control: ReplyControl) -> None:
        control.steer("One.")
        control.steer("Two.")
        control.answer_now()
        control.steer("Three.")

    events = run(SteeredEngine(["a", "b", END], {1: several}))
    assert finished(events).thinking == f"a\n\nOne.\n\nTwo.\n\n\n\n{ASKED}\n"
    assert finished(events).answer == "b"
    assert notices(events) == ["it answers already: there is no thinking left to steer."]


LOOP = ["Wait", ",", " is", " that", " right", "?", " Let", " me", " check", " it", " again", ".", "\n"]


def test_the_loop_guard_restarts_after_a_steered_sentence() -> None:
    """A loop is found as many tokens after the sentence as without one, and cut back to the sentence."""
    plain, steered = (
        SteeredEngine(LOOP * 200, {600: steer("Stop that.")} if is_steered else {}) for is_steered in (0, 1)
    )
    kept = ""
    for engine in (plain, steered):
        settings = replace(SETTINGS, thinking_budget=2500, max_tokens=1)
        prompt = engine.vocabulary.encode_text(PROMPT)
        events = list(play(engine, settings, prompt, control=engine.control))
        assert closed(events).reason is CloseReason.LOOP
        kept = finished(events).thinking

    assert 600 < plain.sampled < steered.sampled - 500
    before, _, after = kept.partition("\n\nStop that.\n\n")
    assert before.count("Wait, is that right?") > 40
    assert after.count("Wait, is that right?") <= 2
    assert steered.cached_text.startswith(f"{PROMPT}{kept}{CLOSE}\n\n")


def test_a_thinking_under_a_grammar_can_be_steered_and_ended() -> None:
    def both(control: ReplyControl) -> None:
        control.steer("Be brief.")
        control.answer_now()

    engine = SteeredEngine(["a", '{"a"', ": 1}", END], {1: both})
    events = run(engine, replace(SETTINGS, is_constrained=True))
    assert engine.vocabulary.text(engine.matcher.seen) == '{"a": 1}' + END
    assert finished(events).answer == '{"a": 1}'


class FakeClock:
    """A clock whose time is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class PausedControl(ReplyControl):
    """A paused control that calls `then` at the third wait. It never sleeps."""

    def __init__(self, clock: FakeClock, then: Callable[[], None]) -> None:
        super().__init__()
        self._clock, self._then = clock, then
        self.waits = 0

    def wait(self, seconds: float) -> bool:
        """Waits, but half a minute passes at once."""
        assert 0 < seconds <= 0.1
        if super().wait(0):
            return True
        self.waits += 1
        self._clock.now += 30.0
        if self.waits == 3:
            self._then()
        return super().wait(0)


def test_a_pause_is_not_counted_and_requests_in_it_are_served_after_it() -> None:
    clock = FakeClock()

    def then() -> None:
        control.steer("Go.")
        control.resume()

    control = PausedControl(clock, then)
    engine = SteeredEngine(["a", "b", CLOSE, "c", END], {1: lambda _: control.pause()})
    events = []
    prompt = engine.vocabulary.encode_text(PROMPT)
    for event in play(engine, SETTINGS, prompt, control=control, clock=clock):
        events.append(event)
        clock.now += 1.0

    assert control.waits == 3
    assert finished(events).thinking == "a\n\nGo.\n\nb"
    # A second for each event since the prefill was done, without the ninety of the pause.
    n_before = sum(isinstance(event, Prefill) for event in events)
    at_close = next(i for i, event in enumerate(events) if isinstance(event, ThinkingClosed))
    assert closed(events).elapsed_s == at_close - n_before
    assert finished(events).stats.decode_s == len(events) - 1 - n_before
    assert finished(events).stats.prefill_s == n_before


def test_an_answer_can_be_paused_too() -> None:
    clock = FakeClock()
    control = PausedControl(clock, lambda: control.resume())
    engine = SteeredEngine(["a", CLOSE, "c", END], {3: lambda _: control.pause()})
    events = list(play(engine, SETTINGS, [1, 2], control=control, clock=clock))
    assert control.waits == 3
    assert finished(events).stats.decode_s == 0


def test_a_paused_turn_can_be_stopped() -> None:
    clock, abort = FakeClock(), AbortFlag()
    control = PausedControl(clock, abort.set)
    engine = SteeredEngine(["a", "b", END], {1: lambda _: control.pause()}, abort=abort)
    events = list(play(engine, SETTINGS, [1, 2], control=control, clock=clock))
    assert (finished(events).reason, finished(events).thinking) == (FinishReason.INTERRUPTED, "a")
    assert (control.waits, finished(events).stats.decode_s) == (3, 0)


class StoppedInForce(SteeredEngine):
    """An engine that is stopped while forced tokens are added to its cache."""

    def force(self, tokens: Sequence[int]) -> None:
        """Stop before they are cached."""
        raise Aborted


@pytest.mark.parametrize("action", [ReplyControl.answer_now, steer("Go.")])
def test_a_stop_while_a_sentence_is_forced_leaves_nothing_of_it(action: Action) -> None:
    engine = StoppedInForce(["a", "b", END], {1: action})
    events = run(engine)
    assert (finished(events).reason, finished(events).thinking) == (FinishReason.INTERRUPTED, "a")
    assert engine.cached_text == f"{PROMPT}a"
