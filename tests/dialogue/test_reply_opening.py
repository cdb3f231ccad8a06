"""A turn that continues another one's tokens, cut at every position, and the token ids that it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest

from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.dialogue.prompts.formats import prompt_format
from qwq_local.dialogue.reply import ReplySettings
from qwq_local.dialogue.transcript import CLOSING_SENTENCES
from qwq_local.engine.api import ContextSettings, SamplerSettings
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.model import LoadedModel
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Notice,
    Steered,
    Thinking,
    ThinkingClosed,
)
from qwq_local.models.header import read_header
from tests.dialogue.decoding import decode
from tests.fakes import CLOSE, END, FakeVocabulary, QueuedEngine, play

SETTINGS = ReplySettings(4096, thinking_budget=1000, answer_reserve=64, wants_tokens=True)
AMPLE = replace(SETTINGS, thinking_budget=100_000)
LLAMA = "🦙".encode()
LOOP = ["Wait", ",", " is", " that", " right", "?", " Let", " me", " check", " it", " again", ".", "\n"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The events and the rest of the queue at a number of tokens after the prompt."""

    thinking: str
    answer: str
    rest: tuple[int, ...]


class WatchedEngine(QueuedEngine):
    """A queue of pieces or tokens that records the events at each sample.

    It asserts that penalties look back at exactly the tokens after the prompt.
    """

    def __init__(
        self,
        pieces: Sequence[str | bytes] = (),
        vocabulary: FakeVocabulary | None = None,
        rest: Iterable[int] = (),
        n_ctx: int = 4096,
        actions: Mapping[int, Callable[[ReplyControl], None]] | None = None,
    ) -> None:
        super().__init__(pieces, n_ctx)
        if vocabulary is not None:
            self.vocabulary, self._queue = vocabulary, list(rest)
        self.control = ReplyControl()
        self.shown: list[Event] = []
        self.moments: dict[int, Moment] = {}
        self._actions = actions or {}
        self.latest = 0

    def sample(self) -> int:
        """The next of the queue."""
        assert self.remembered == self.tokens[len(PROMPT) :]
        moment = Moment(thinking(self.shown), answer(self.shown), tuple(self._queue))
        self.moments[len(self.tokens) - len(PROMPT)] = moment
        self.latest = token = super().sample()
        if self.sampled in self._actions:
            self._actions[self.sampled](self.control)
        return token

    def truncate(self, n_tokens: int) -> None:
        """Drop the records of those tokens too."""
        super().truncate(n_tokens)
        self.moments = {n: each for n, each in self.moments.items() if n + len(PROMPT) < n_tokens}


PROMPT = tuple(FakeVocabulary().encode_text("question"))


def thinking(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Thinking | Steered))


def answer(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Answer))


def run(
    engine: WatchedEngine, settings: ReplySettings = SETTINGS, generated: tuple[int, ...] = ()
) -> tuple[list[Event], Finished]:
    opening = Opening(PROMPT, generated) if generated else None
    for event in play(engine, settings, PROMPT, opening, control=engine.control):
        engine.shown.append(event)
    assert isinstance(event, Finished)
    assert reported_ids(engine.shown, generated) == tuple(engine.tokens[len(PROMPT) :])
    return engine.shown, event


def reported_ids(events: Iterable[Event], known: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The ids that a reader of Generated has at the end."""
    for event in events:
        if isinstance(event, Generated):
            assert event.start <= len(known)
            known = (*known[: event.start], *event.tokens)
            assert event.thinking <= len(known)
    return known


def notices(events: Iterable[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def steer(control: ReplyControl) -> None:
    control.steer("What of the r's?")


@dataclass(frozen=True, slots=True)
class Script:
    """The model's pieces, the limits, and actions of the user by the number of tokens before them."""

    pieces: Sequence[str | bytes]
    settings: ReplySettings = SETTINGS
    actions: Mapping[int, Callable[[ReplyControl], None]] = field(default_factory=dict)


SCRIPTS = {
    "plain": Script(["Hm", " well", "\n", CLOSE, "\n\n", "It is", " 3.", END]),
    "no tag token": Script(["Hm ", "</th", "ink", ">", " \n", "It ", "is"]),
    "held back": Script(
        ["a </thi", "ck> ", "<", " b </think", CLOSE, "x <", "think> <", "/thi", "n", "</thi"]
    ),
    "characters": Script([LLAMA[:1], LLAMA[1:], b"\xff", CLOSE, LLAMA[:2], LLAMA[2:], LLAMA[:3]]),
    "opened again": Script(["one", CLOSE, "\n", " ", "<think>", "\n two", CLOSE, "Three.", END]),
    "quoted": Script(["a", CLOSE, "use `", "</think>", "` ```\n", "</think>", "\n```", "</think>", "!"]),
    "no answer": Script(["a", CLOSE, "\n\n", " ", END]),
    "stopped thinking": Script(["half ", LLAMA[:2], END, "Three.", END]),
    "budget": Script([*["t "] * 9, "</thi", "Three", " it is.", END], replace(SETTINGS, thinking_budget=10)),
    "budget, opened again": Script(
        [*["t "] * 9, "\n", "<think>", "u", CLOSE, "3", END], replace(SETTINGS, thinking_budget=9)
    ),
    "steered": Script(["a ", "b", LLAMA[:1], "c", CLOSE, "d", END], actions={2: steer, 3: steer, 4: steer}),
    "steered first": Script([" a", CLOSE, "d", END], actions={1: steer}),
    "asked": Script(["a ", LLAMA[:3], "d", "e", END], actions={2: ReplyControl.answer_now}),
    "loop": Script(LOOP * 60, replace(SETTINGS, max_tokens=4)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_turn_cut_at_any_token_continues_to_the_same_end(name: str) -> None:
    """Whenever a token is sampled, everything is as in the uncut turn."""
    script = SCRIPTS[name]
    whole = WatchedEngine(script.pieces, actions=script.actions)
    _, expected = run(whole, script.settings)
    generated = tuple(whole.tokens[len(PROMPT) :])
    is_loop = name == "loop"
    cuts = [n for n in whole.moments if 0 < n <= len(generated) and not (is_loop and n < len(generated) - 4)]
    assert len(cuts) >= 3
    for n_tokens in cuts:
        then = whole.moments[n_tokens]
        engine = WatchedEngine(vocabulary=whole.vocabulary, rest=then.rest)
        # An action is not a token: it happened before the cut, or it is repeated after it.
        engine._actions = {n - whole_sampled(whole, n_tokens): action for n, action in script.actions.items()}
        shown, finished = run(engine, script.settings, generated[:n_tokens])
        assert (finished.thinking, finished.answer) == (expected.thinking, expected.answer), n_tokens
        assert finished.reason is expected.reason
        if not is_loop:
            assert then.thinking + thinking(shown) == expected.thinking
            assert (finished.stats.thinking_tokens, finished.stats.answer_tokens) == (
                expected.stats.thinking_tokens,
                expected.stats.answer_tokens,
            )
        assert then.answer + answer(shown) == expected.answer
        assert tuple(engine.tokens) == PROMPT + generated


def whole_sampled(whole: WatchedEngine, n_tokens: int) -> int:
    """How many of the first `n_tokens` after the prompt were sampled."""
    return sorted(whole.moments).index(n_tokens)


@pytest.mark.parametrize("name", SCRIPTS)
def test_tokens_replay_to_the_same_text_from_any_start(name: str) -> None:
    """Forced tokens too: the text is a function of the tokens."""
    script = SCRIPTS[name]
    whole = WatchedEngine(script.pieces, actions=script.actions)
    _, expected = run(whole, script.settings)
    generated = tuple(whole.tokens[len(PROMPT) :])
    for n_tokens in range(1, len(generated) + 1):
        engine = WatchedEngine(vocabulary=whole.vocabulary, rest=generated[n_tokens:])
        _, finished = run(engine, AMPLE, generated[:n_tokens])
        assert (finished.thinking, finished.answer) == (expected.thinking, expected.answer), n_tokens


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "loop"])
def test_a_turn_stopped_anywhere_continues_as_if_it_had_not_been_stopped(name: str) -> None:
    """Both turns together show what one turn shows: nothing twice, nothing left out."""
    script = SCRIPTS[name]
    whole = WatchedEngine(script.pieces, actions=script.actions)
    _, expected = run(whole, script.settings)
    for n_sampled in range(1, whole.sampled):
        stopped = WatchedEngine(script.pieces, actions=script.actions)
        stopped._abort_after = n_sampled
        for event in play(stopped, script.settings, PROMPT, control=stopped.control):
            stopped.shown.append(event)
        known = reported_ids(stopped.shown)
        assert isinstance(event, Finished)
        assert (thinking(stopped.shown), answer(stopped.shown)) == (event.thinking, event.answer)
        if event.reason is not FinishReason.INTERRUPTED:
            assert known == tuple(whole.tokens[len(PROMPT) :])
            continue
        # The token during whose decode the stop came was shown, so it is reported.
        assert known[: len(stopped.tokens) - len(PROMPT)] == tuple(stopped.tokens[len(PROMPT) :])
        assert len(known) - (len(stopped.tokens) - len(PROMPT)) in (0, 1)
        end = [stopped.latest] if stopped.vocabulary.is_end(stopped.latest) else []
        engine = WatchedEngine(vocabulary=stopped.vocabulary, rest=[*end, *stopped._queue])
        engine._actions = {n - stopped.sampled: action for n, action in script.actions.items()}
        if (lost := script.actions.get(stopped.sampled)) is not None:
            lost(engine.control)
        shown, finished = run(engine, script.settings, known)
        assert (finished.thinking, finished.answer) == (expected.thinking, expected.answer), n_sampled
        assert event.thinking + thinking(shown) == expected.thinking
        assert event.answer + answer(shown) == expected.answer


def test_an_answer_at_its_limit_may_be_as_long_again() -> None:
    settings = replace(SETTINGS, max_tokens=3)
    whole = WatchedEngine(["t", CLOSE, *"abcdefgh", END])
    known: tuple[int, ...] = ()
    for expected in ("abc", "abcdef", "abcdefgh"):
        engine = WatchedEngine(vocabulary=whole.vocabulary, rest=whole._queue[len(known) :])
        shown, finished = run(engine, settings, known)
        assert finished.answer == expected
        assert answer(shown) == expected[max(0, len(known) - 2) :]
        known = tuple(engine.tokens[len(PROMPT) :])
    assert finished.reason is FinishReason.STOP


def test_budgets_count_the_whole() -> None:
    settings = replace(SETTINGS, thinking_budget=5, max_tokens=4)
    vocabulary = FakeVocabulary()
    piece = vocabulary.token_of
    engine = WatchedEngine(vocabulary=vocabulary, rest=[piece("t")] * 100)
    shown, finished = run(engine, settings, (piece("t"),) * 3)
    assert thinking(shown) == f"tt\n\n{CLOSING_SENTENCES[CloseReason.BUDGET]}\n"
    engine = WatchedEngine(vocabulary=vocabulary, rest=[piece("t")] * 100)
    shown, finished = run(engine, settings, (piece("t"), piece(CLOSE), piece("a"), piece("a")))
    assert (finished.answer, answer(shown)) == ("aatt", "tt")
    assert not any(isinstance(event, ThinkingClosed) for event in shown)
    assert finished.stats.resumed_tokens == 4


def test_rates_count_this_turn_alone() -> None:
    """Ten tokens of another turn are prefilled with the prompt, and two are sampled in a second each."""
    now = [0.0]
    vocabulary = FakeVocabulary()
    engine = WatchedEngine(vocabulary=vocabulary, rest=[vocabulary.token_of("b")] * 2)
    generated = (*[vocabulary.token_of("t")] * 5, vocabulary.token_of(CLOSE), *[vocabulary.token_of("b")] * 4)
    events = []
    for event in play(engine, SETTINGS, PROMPT, Opening(PROMPT, generated), clock=lambda: now[0]):
        now[0] += 1.0
        events.append(event)
    event = events[-1]
    assert isinstance(event, Finished)
    assert (event.stats.thinking_tokens, event.stats.answer_tokens) == (6, 6)
    assert event.stats.prompt_tokens == len(PROMPT)
    assert event.stats.prefill_rate == (len(PROMPT) + 10) / event.stats.prefill_s
    assert event.stats.decode_rate == 2 / event.stats.decode_s


@pytest.mark.parametrize("ends_with_end", [False, True])
def test_an_ended_answer_has_nothing_to_continue(ends_with_end: bool) -> None:
    """Both when the end of the turn was stored and when the model samples it again."""
    vocabulary = FakeVocabulary()
    generated = tuple(map(vocabulary.token_of, ["t", CLOSE, "3."]))
    engine = WatchedEngine(vocabulary=vocabulary, rest=[vocabulary.token_of(END)])
    if ends_with_end:
        generated += (vocabulary.token_of(END),)
    opening = Opening(PROMPT, generated)
    *shown, finished = play(engine, SETTINGS, PROMPT, opening)
    assert notices(shown) == ["there is nothing to go on with: the answer had come to its end."]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.thinking, finished.answer) == (FinishReason.STOP, "t", "3.")
    assert (thinking(shown), answer(shown)) == ("", "")
    assert not any(isinstance(event, Generated) for event in shown)


def test_a_window_that_is_full_already_ends_the_turn_in_order() -> None:
    vocabulary = FakeVocabulary()
    generated = (vocabulary.token_of("t"),) * 92
    for close in ((), (vocabulary.token_of(CLOSE),)):
        engine = WatchedEngine(vocabulary=vocabulary, n_ctx=100 + len(close))
        _, finished = run(engine, SETTINGS, generated + close)
        assert finished.reason is FinishReason.CONTEXT
        assert finished.thinking == "t" * 92


def test_tokens_are_reported_four_times_a_second_and_at_the_end() -> None:
    """A tenth of a second passes with each token."""
    now = [0.0]

    class Slow(WatchedEngine):
        def sample(self) -> int:
            now[0] += 0.1
            return super().sample()

    engine = Slow([*"thinking it over", CLOSE, *"and the answer", END])
    shown = list(play(engine, SETTINGS, PROMPT, clock=lambda: now[0]))
    generated = [event for event in shown if isinstance(event, Generated)]
    assert [len(event.tokens) for event in generated] == [3] * 10 + [1]
    assert [event.start for event in generated] == [*range(0, 33, 3)]
    assert [event.thinking for event in generated] == [3, 6, 9, 12, 15, *[17] * 6]
    assert isinstance(shown[-2], Generated)
    assert reported_ids(shown) == tuple(engine.tokens[len(PROMPT) :])
    assert not any(
        isinstance(event, Generated)
        for event in play(WatchedEngine("ab"), replace(SETTINGS, wants_tokens=False), PROMPT)
    )


def test_tokens_of_a_loop_are_withdrawn() -> None:
    now = [0.0]

    class Slow(WatchedEngine):
        def sample(self) -> int:
            now[0] += 0.02
            return super().sample()

    engine = Slow([*LOOP * 60, CLOSE, *["So", ":", "\n"], *LOOP * 200], n_ctx=8192)
    settings = replace(SETTINGS, thinking_budget=2500)
    shown = list(play(engine, settings, PROMPT, clock=lambda: now[0]))
    told_at = [
        (event.start, event.start + len(event.tokens)) for event in shown if isinstance(event, Generated)
    ]
    taken_back = [after[0] < before[1] for before, after in pairwise(told_at)]
    assert sum(taken_back) == 2
    assert reported_ids(shown) == tuple(engine.tokens[len(PROMPT) :])
    assert len(engine.tokens) < 300


def test_a_constraint_holds_in_the_answer_of_a_continued_thinking() -> None:
    vocabulary = FakeVocabulary()
    rest = map(vocabulary.token_of, ["b", CLOSE, '{"a"', ": 1}", END])
    engine = WatchedEngine(vocabulary=vocabulary, rest=rest)
    settings = replace(SETTINGS, is_constrained=True)
    _, finished = run(engine, settings, (vocabulary.token_of("a"),))
    assert (finished.thinking, finished.answer) == ("ab", '{"a": 1}')
    assert vocabulary.text(engine.matcher.seen) == '{"a": 1}' + END


QUESTION = "How many r's are in the word strawberry?"


def test_the_miniature_continues_from_any_token_to_the_same_end(
    loaded: LoadedModel, miniature: Callable[[str], Path]
) -> None:
    """Greedy, each time with an empty cache; the reported ids are those in the cache."""
    template = read_header(miniature("Q8_0")).text("tokenizer.chat_template")
    form = prompt_format(template, loaded.vocabulary.special_tokens, "miniature")
    prompt = form.encode([Message(Role.USER, QUESTION)], loaded.vocabulary).tokens
    settings = replace(SETTINGS, window=512, sampler=SamplerSettings(temperature=0))
    with closing(LlamaContext(loaded, ContextSettings(512, threads=1))) as context:
        shown = list(decode(context, settings, Opening(prompt)))
        generated = tuple(context.sequences[0].tokens[len(prompt) :])
        assert reported_ids(shown) == generated
        expected = shown[-1]
        assert isinstance(expected, Finished)
        assert expected.answer
        for n_tokens in {*range(1, len(generated), 7), len(generated) - 1, len(generated)}:
            context.sequences[0].truncate(0)
            shown = list(decode(context, settings, Opening(prompt, generated[:n_tokens])))
            finished = shown[-1]
            assert isinstance(finished, Finished)
            assert (
                reported_ids(shown, generated[:n_tokens])
                == generated
                == tuple(context.sequences[0].tokens[len(prompt) :])
            )
            assert (finished.thinking, finished.answer) == (expected.thinking, expected.answer)
            assert finished.stats.thinking_tokens == expected.stats.thinking_tokens


def test_the_miniature_is_steered_and_asked_to_answer(
    loaded: LoadedModel, miniature: Callable[[str], Path]
) -> None:
    """From the same cache: no token is prefilled twice, and none of the sentence is a control token."""
    template = read_header(miniature("Q8_0")).text("tokenizer.chat_template")
    form = prompt_format(template, loaded.vocabulary.special_tokens, "miniature")
    prompt = form.encode([Message(Role.USER, QUESTION)], loaded.vocabulary).tokens
    settings = replace(SETTINGS, window=512, sampler=SamplerSettings(temperature=0))
    control = ReplyControl()
    shown: list[Event] = []
    with closing(LlamaContext(loaded, ContextSettings(512, threads=1))) as context:
        for event in decode(context, settings, Opening(prompt), control):
            shown.append(event)
            if isinstance(event, Thinking) and len(shown) == 12:
                control.steer(f"The letters are counted {CLOSE}{END}.")
                control.answer_now()
        generated = tuple(context.sequences[0].tokens[len(prompt) :])
    assert isinstance(event, Finished)
    assert thinking(shown) == event.thinking
    assert f"\n\nThe letters are counted < /think>{END}.\n\n" in event.thinking
    assert event.thinking.endswith(f"{CLOSING_SENTENCES[CloseReason.ASKED]}\n")
    assert event.answer
    assert reported_ids(shown) == generated
    controls = set(loaded.vocabulary.special_tokens.values())
    (tag,) = [token for token in generated if token in controls]
    assert loaded.vocabulary.piece(tag) == CLOSE.encode()
