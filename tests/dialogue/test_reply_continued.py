"""A continued turn equals an uninterrupted one: penalties and loop guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.reply import ReplySettings
from qwq_local.engine.api import ContextSettings, SamplerSettings
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.sampler import SamplerChain
from qwq_local.events import CloseReason, Event, Finished, FinishReason, Generated, ThinkingClosed
from tests.conftest import load
from tests.dialogue.decoding import decode
from tests.fakes import CLOSE, END, FakeVocabulary, QueuedEngine, play

SETTINGS = ReplySettings(4096, thinking_budget=2000, answer_reserve=64, wants_tokens=True)
SHORT = replace(SETTINGS, max_tokens=3)
PROMPT = tuple(FakeVocabulary().encode_text("question"))
Action = Callable[[ReplyControl], None]


def finished(events: Sequence[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


# The loop guard, over an engine that replays a queue.

CYCLE = ["Wait", ",", " is", " that", " right", "?", " Let", " me", " check", " it", " again", ".", "\n"]
COUNTING = [
    piece for n in range(450) for piece in ("Let", " me", " try", " x", " =", f" {n}", ".", " No", ".", "\n")
]
CLOSING = [CLOSE, "\n\n", "So", ":", "\n"]


def steer(control: ReplyControl) -> None:
    control.steer("Stop that.")


@dataclass(frozen=True, slots=True)
class Script:
    """The model's tokens, the user's actions by the number of tokens before them, and where to continue."""

    pieces: Sequence[str]
    cuts: Sequence[int]
    actions: Mapping[int, Action] = field(default_factory=dict)
    settings: ReplySettings = SHORT


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


class SteeredEngine(QueuedEngine):
    """An engine that runs actions at given tokens and records its state at each token."""

    def __init__(
        self, queue: Sequence[int], vocabulary: FakeVocabulary, actions: Mapping[int, Action]
    ) -> None:
        super().__init__([], n_ctx=8192)
        self.vocabulary, self._queue = vocabulary, list(queue)
        self.control = ReplyControl()
        self.at: list[tuple[int, ...]] = []
        self._actions = actions

    def sample(self) -> int:
        """The next of the queue."""
        self.at.append(tuple(self.tokens[len(PROMPT) :]))
        token = super().sample()
        if self.sampled in self._actions:
            self._actions[self.sampled](self.control)
        return token


@dataclass(frozen=True, slots=True)
class Whole:
    """A turn without a stop."""

    queue: Sequence[int]
    engine: SteeredEngine
    end: Finished


def whole(script: Script) -> Whole:
    vocabulary = FakeVocabulary()
    queue = [vocabulary.token_of(piece) for piece in script.pieces]
    engine = SteeredEngine(queue, vocabulary, script.actions)
    events = list(play(engine, script.settings, PROMPT, control=engine.control))
    assert any(
        isinstance(event, ThinkingClosed | Finished) and event.reason in (CloseReason.LOOP, FinishReason.LOOP)
        for event in events
    )
    return Whole(queue, engine, finished(events))


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_cut_at_the_same_place_as_without_a_stop(name: str) -> None:
    """The turn is stopped at several points."""
    script = LOOPS[name]
    expected = whole(script)
    assert len(expected.engine.at) > max(script.cuts) + 5
    for n_sampled in script.cuts:
        vocabulary = expected.engine.vocabulary
        later = {n - n_sampled: action for n, action in script.actions.items() if n > n_sampled}
        engine = SteeredEngine(expected.queue[n_sampled:], vocabulary, later)
        steered = ("Stop that.",) if any(n <= n_sampled for n in script.actions) else ()
        opening = Opening(PROMPT, expected.engine.at[n_sampled], steered)
        end = finished(list(play(engine, script.settings, PROMPT, opening, control=engine.control)))
        assert n_sampled + engine.sampled == expected.engine.sampled, n_sampled
        assert (end.thinking, end.answer) == (expected.end.thinking, expected.end.answer)
        assert end.reason is expected.end.reason
        assert engine.tokens == expected.engine.tokens


def test_text_before_a_steered_sentence_does_not_count_as_repetition() -> None:
    """Without the sentence, the guard would count the text before and after it as one."""
    script = LOOPS["after a sentence was put in"]
    expected = whole(script)
    engine = SteeredEngine(expected.queue[640:], expected.engine.vocabulary, {})
    list(play(engine, script.settings, PROMPT, Opening(PROMPT, expected.engine.at[640])))
    assert engine.sampled < expected.engine.sampled - 640


def test_repetition_in_the_thinking_does_not_count_in_the_answer() -> None:
    """Nearly a loop on either side, with and without a stop between them."""
    vocabulary = FakeVocabulary()
    pieces = [*COUNTING[:1400], CLOSE, *COUNTING[1400:4500], END]
    queue = [vocabulary.token_of(piece) for piece in pieces]
    for n_known in (0, len(queue) - 100):
        engine = SteeredEngine(queue[n_known:], vocabulary, {})
        opening = Opening(PROMPT, tuple(queue[:n_known]))
        assert finished(list(play(engine, SETTINGS, PROMPT, opening))).reason is FinishReason.STOP
        assert engine.tokens == [*PROMPT, *queue[:-1]]


def test_a_loop_from_before_the_guard_was_on_is_found_in_the_continuation() -> None:
    vocabulary = FakeVocabulary()
    cycle = [vocabulary.token_of(piece) for piece in CYCLE]
    engine = SteeredEngine(cycle * 300, vocabulary, {})
    events = list(play(engine, SETTINGS, PROMPT, Opening(PROMPT, tuple(cycle * 70))))
    (closed,) = [event for event in events if isinstance(event, ThinkingClosed)]
    assert closed.reason is CloseReason.LOOP
    assert finished(events).thinking.count("Wait, is that right?") == 1


def test_without_a_loop_guard_nothing_is_cut() -> None:
    vocabulary = FakeVocabulary()
    cycle = [vocabulary.token_of(piece) for piece in CYCLE]
    engine = SteeredEngine(cycle * 60, vocabulary, {})
    settings = replace(SETTINGS, loop_guard=False)
    end = finished(list(play(engine, settings, PROMPT, Opening(PROMPT, tuple(cycle * 40)))))
    assert end.thinking.count("Wait, is that right?") == 100


# The real model and the real sampler chain.

PENALTIES = SamplerSettings(temperature=0, repeat_penalty=1.3, presence_penalty=1.0, frequency_penalty=0.2)
SAMPLERS = {
    "penalties": replace(PENALTIES, penalty_window=64),
    "a short window": replace(PENALTIES, penalty_window=9),
    "DRY": SamplerSettings(temperature=0, dry_multiplier=3.0, dry_allowed_length=1),
}


class ForgetfulChain(SamplerChain):
    """A chain that does not remember earlier tokens for its penalties."""

    def remember(self, tokens: Sequence[int]) -> None:
        """Remember nothing."""


class ForgetfulContext(LlamaContext):
    """A context that makes forgetful chains."""

    chain_class = ForgetfulChain


@dataclass(frozen=True, slots=True)
class Said:
    """The text of a reply, its ids, and which of them were sampled."""

    thinking: str
    answer: str
    tokens: tuple[int, ...]
    sampled_at: tuple[int, ...] = field(compare=False)


def said_by(
    context: LlamaContext, prompt: tuple[int, ...], settings: ReplySettings, generated: tuple[int, ...] = ()
) -> Said:
    """The text of a reply that starts from these ids."""
    events = list(decode(context, settings, Opening(prompt, generated)))
    tokens, sampled = list(generated), [True] * len(generated)
    for event in events:
        if isinstance(event, Generated):
            tokens[event.start :], sampled[event.start :] = event.tokens, event.sampled
    end = finished(events)
    at = tuple(index for index, is_sampled in enumerate(sampled) if is_sampled)
    return Said(end.thinking, end.answer, tuple(tokens), at)


@pytest.mark.parametrize("budget", [100, 20], ids=["late", "early"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_miniature_under_penalties_continues_to_the_same_end(
    miniature: Callable[[str], Path], name: str, budget: int
) -> None:
    """Greedy, in float32, so that the shape of a batch decides no token. A chain that forgets the earlier
    tokens ends differently; otherwise the test would prove nothing. Without its template the miniature
    repeats one letter for ever, unless it is penalized.
    """
    loaded = load(miniature("F32"))
    prompt = tuple(loaded.vocabulary.encode_text("Say something."))
    settings = replace(SETTINGS, window=1024, sampler=SAMPLERS[name], thinking_budget=budget, max_tokens=30)
    with (
        closing(loaded),
        closing(
            LlamaContext(loaded, ContextSettings(1024, kv_type_k="f32", kv_type_v="f32", threads=1))
        ) as context,
        closing(
            ForgetfulContext(loaded, ContextSettings(1024, kv_type_k="f32", kv_type_v="f32", threads=1))
        ) as forgetful,
    ):
        expected = said_by(context, prompt, settings)
        cuts = expected.sampled_at[1 :: len(expected.sampled_at) // 8]
        for at in cuts:
            assert said_by(context, prompt, settings, expected.tokens[:at]) == expected, at
        assert any(said_by(forgetful, prompt, settings, expected.tokens[:at]) != expected for at in cuts)
