"""A turn that is gone on with is the turn that it would have been: penalties and loop guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import pytest

from qwq_local.dialogue.control import Opening, TurnControl
from qwq_local.dialogue.turn import Turn, TurnSettings
from qwq_local.engine.api import AbortFlag, ContextSettings, Grammar, SamplerSettings
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.model import LoadedModel
from qwq_local.events import CloseReason, Event, Finished, FinishReason, ThinkingClosed
from tests.fakes import CLOSE, END, FakeVocabulary, QueuedEngine

SETTINGS = TurnSettings(thinking_budget=2000, answer_reserve=64, wants_tokens=True)
SHORT = replace(SETTINGS, max_tokens=3)
PROMPT = tuple(FakeVocabulary().encode_text("question"))
Wish = Callable[[TurnControl], None]


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


# The loop guard, over an engine that replays a queue.

CYCLE = ["Wait", ",", " is", " that", " right", "?", " Let", " me", " check", " it", " again", ".", "\n"]
COUNTING = [
    piece for n in range(450) for piece in ("Let", " me", " try", " x", " =", f" {n}", ".", " No", ".", "\n")
]
CLOSING = [CLOSE, "\n\n", "So", ":", "\n"]


def steer(control: TurnControl) -> None:
    control.steer("Stop that.")


@dataclass(frozen=True, slots=True)
class Script:
    """What the model says, what is wished after how many tokens, and where it is gone on with."""

    pieces: Sequence[str]
    cuts: Sequence[int]
    wishes: Mapping[int, Wish] = field(default_factory=dict)
    settings: TurnSettings = SHORT


LOOPS = {
    "a cycle in the thinking": Script(["First", ".", "\n", *CYCLE * 60], (1, 10, 50, 400, 630)),
    "counting in the thinking": Script(COUNTING, (15, 700, 1400)),
    "a cycle in the answer": Script(["Hm", *CLOSING, *CYCLE * 130], (3, 20, 900, 1190), settings=SETTINGS),
    "after a sentence was put in": Script([*CYCLE * 120], (590, 601, 640, 1000), {600: steer}),
    "after a thought that the model broke off": Script(
        ["Hm", END, *["\n\n", "No", ".", " Let", " me", " see", "."] * 200], (6, 700), settings=SETTINGS
    ),
    "in a thought that was opened again": Script(["Hm", CLOSE, "\n", "<think>", *CYCLE * 60], (2, 4, 500)),
}


class WishingEngine(QueuedEngine):
    """A queue of pieces or tokens during which something is wished; it notes how it stood at each token."""

    def __init__(self, queue: Sequence[int], vocabulary: FakeVocabulary, wishes: Mapping[int, Wish]) -> None:
        super().__init__([], n_ctx=8192)
        self.vocabulary, self._queue = vocabulary, list(queue)
        self.control = TurnControl()
        self.at: list[tuple[int, ...]] = []
        self._wishes = wishes

    def sample(self, grammar: Grammar | None = None) -> int:
        """The next of the queue."""
        self.at.append(tuple(self.tokens[len(PROMPT) :]))
        token = super().sample(grammar)
        if self.sampled in self._wishes:
            self._wishes[self.sampled](self.control)
        return token


@dataclass(frozen=True, slots=True)
class Whole:
    """A turn that nobody stopped."""

    queue: Sequence[int]
    engine: WishingEngine
    end: Finished


def whole(script: Script) -> Whole:
    vocabulary = FakeVocabulary()
    queue = [vocabulary.token_of(piece) for piece in script.pieces]
    engine = WishingEngine(queue, vocabulary, script.wishes)
    events = list(Turn(engine, script.settings, control=engine.control).events(PROMPT))
    assert any(
        isinstance(event, ThinkingClosed | Finished) and event.reason in (CloseReason.LOOP, FinishReason.LOOP)
        for event in events
    )
    return Whole(queue, engine, finished(events))


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_found_and_cut_where_it_would_have_been(name: str) -> None:
    """However much of it had come when the turn was stopped."""
    script = LOOPS[name]
    expected = whole(script)
    assert len(expected.engine.at) > max(script.cuts) + 5
    for n_sampled in script.cuts:
        vocabulary = expected.engine.vocabulary
        later = {n - n_sampled: wish for n, wish in script.wishes.items() if n > n_sampled}
        engine = WishingEngine(expected.queue[n_sampled:], vocabulary, later)
        steered = ("Stop that.",) if any(n <= n_sampled for n in script.wishes) else ()
        opening = Opening(PROMPT, expected.engine.at[n_sampled], steered)
        end = finished(list(Turn(engine, script.settings, control=engine.control).events(PROMPT, opening)))
        assert n_sampled + engine.sampled == expected.engine.sampled, n_sampled
        assert (end.thinking, end.answer) == (expected.end.thinking, expected.end.answer)
        assert end.reason is expected.end.reason
        assert engine.tokens == expected.engine.tokens


def test_what_was_said_before_a_sentence_was_put_in_is_not_held_against_what_follows() -> None:
    """Where the sentence is not known, the guard takes what was before it for the same stretch."""
    script = LOOPS["after a sentence was put in"]
    expected = whole(script)
    engine = WishingEngine(expected.queue[640:], expected.engine.vocabulary, {})
    list(Turn(engine, script.settings).events(PROMPT, Opening(PROMPT, expected.engine.at[640])))
    assert engine.sampled < expected.engine.sampled - 640


def test_what_the_thinking_repeated_is_not_held_against_the_answer() -> None:
    """Nearly a loop on either side, whether the turn is stopped there or not."""
    vocabulary = FakeVocabulary()
    pieces = [*COUNTING[:1400], CLOSE, *COUNTING[1400:4500], END]
    queue = [vocabulary.token_of(piece) for piece in pieces]
    for n_known in (0, len(queue) - 100):
        engine = WishingEngine(queue[n_known:], vocabulary, {})
        opening = Opening(PROMPT, tuple(queue[:n_known]))
        assert finished(list(Turn(engine, SETTINGS).events(PROMPT, opening))).reason is FinishReason.STOP
        assert engine.tokens == [*PROMPT, *queue[:-1]]


def test_a_loop_that_the_guard_was_off_for_is_found_once_it_goes_on() -> None:
    vocabulary = FakeVocabulary()
    cycle = [vocabulary.token_of(piece) for piece in CYCLE]
    engine = WishingEngine(cycle * 300, vocabulary, {})
    events = list(Turn(engine, SETTINGS).events(PROMPT, Opening(PROMPT, tuple(cycle * 70))))
    (closed,) = [event for event in events if isinstance(event, ThinkingClosed)]
    assert closed.reason is CloseReason.LOOP
    assert finished(events).thinking.count("Wait, is that right?") == 1


def test_without_a_loop_guard_nothing_is_cut() -> None:
    vocabulary = FakeVocabulary()
    cycle = [vocabulary.token_of(piece) for piece in CYCLE]
    engine = WishingEngine(cycle * 60, vocabulary, {})
    settings = replace(SETTINGS, loop_guard=False)
    end = finished(list(Turn(engine, settings).events(PROMPT, Opening(PROMPT, tuple(cycle * 40)))))
    assert end.thinking.count("Wait, is that right?") == 100


# The real model and the real sampler chain.

PENALTIES = SamplerSettings(temperature=0, repeat_penalty=1.3, presence_penalty=1.0, frequency_penalty=0.2)
SAMPLERS = {
    "penalties": replace(PENALTIES, penalty_window=64),
    "a short window": replace(PENALTIES, penalty_window=9),
    "DRY": SamplerSettings(temperature=0, dry_multiplier=3.0, dry_allowed_length=1),
}


class Watched(LlamaContext):
    """A real engine that notes how many tokens it has whenever it samples, and may tell penalties nothing."""

    is_forgetful = False

    def sample(self, grammar: Grammar | None = None) -> int:
        """The next token."""
        self.sampled_at.append(len(self.tokens))
        return super().sample(grammar)

    def start_sampling(self, settings: SamplerSettings) -> None:
        """Begin to note anew."""
        self.sampled_at: list[int] = []
        super().start_sampling(settings)

    def remember(self, tokens: Sequence[int]) -> None:
        """Tell the penalties, or do not."""
        if not self.is_forgetful:
            super().remember(tokens)


def said_by(
    engine: Watched, prompt: tuple[int, ...], settings: TurnSettings, generated: tuple[int, ...] = ()
) -> tuple[str, str, tuple[int, ...]]:
    """What a turn says, and its ids, begun where it is told."""
    opening = Opening(prompt, generated)
    end = finished(list(Turn(engine, settings).events(prompt, opening)))
    return end.thinking, end.answer, tuple(engine.tokens[len(prompt) :])


@pytest.mark.parametrize("budget", [100, 20], ids=["late", "early"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_miniature_under_penalties_goes_on_to_the_same_end(
    loaded: LoadedModel, name: str, budget: int
) -> None:
    """Greedy, from the same cache; where the penalties are told nothing it ends otherwise, else this would
    prove nothing. Without its template the miniature says one letter for ever, unless it is penalized.
    """
    prompt = tuple(loaded.vocabulary.encode_text("Say something."))
    settings = replace(SETTINGS, sampler=SAMPLERS[name], thinking_budget=budget, max_tokens=30)
    with closing(Watched(loaded, ContextSettings(1024, threads=1), AbortFlag())) as context:
        expected = said_by(context, prompt, settings)
        generated = expected[2]
        cuts = context.sampled_at[1 :: len(context.sampled_at) // 8]
        for at in cuts:
            assert said_by(context, prompt, settings, generated[: at - len(prompt)]) == expected, at
        context.is_forgetful = True
        assert any(
            said_by(context, prompt, settings, generated[: at - len(prompt)]) != expected for at in cuts
        )
