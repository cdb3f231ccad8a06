"""The scheduler over a real model: several generations at once, each as if it were alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.engine.api import (
    ContextSettings,
    CutBack,
    End,
    Force,
    Pause,
    PrefillProgress,
    Sample,
    SamplerSettings,
    Step,
)
from qwq_local.engine.constraint import ConstraintMatcher
from qwq_local.engine.context import CachedSequence, LlamaContext, Rows, SequenceState
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.sampler import SamplerChain
from qwq_local.engine.scheduler import GenerationJob, Scheduler, logprob_of
from qwq_local.errors import AbortFlag, EngineError, PromptTooLong
from qwq_local.events import Event, Finished, FinishReason, TokenLogprob
from tests.conftest import load

GREEDY = SamplerSettings(temperature=0)
# In float32 the shape of a batch decides no token of these prompts.
SETTINGS = ContextSettings(1024, kv_type_k="f32", kv_type_v="f32", flash_attention=False, threads=1)
WORDS = ("strawberry", "banana", "mississippi", "tree", "letter", "refrigerator", "apple", "keyboard")


@pytest.fixture(scope="module")
def model(miniature: Callable[[str], Path]) -> Iterator[LoadedModel]:
    with closing(load(miniature("F32"))) as loaded:
        yield loaded


@dataclass
class Counted:
    """A generation of `n_tokens` sampled tokens whose events are the scheduler's calls."""

    n_tokens: int
    steps: list[Step] = field(default_factory=list)  # taken before the next sample
    fails_at: int = -1
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    is_paused: bool = False
    waits: int = 0

    def prefilled(self, progress: PrefillProgress) -> Sequence[object]:
        return (progress,)

    def next(self) -> Step:
        if self.steps:
            step = self.steps.pop(0)
            if isinstance(step, CutBack):
                del self.generated[-1:]
            return step
        if self.is_paused:
            return Pause()
        return Sample() if len(self.generated) < self.n_tokens else End()

    def took(self, tokens: Sequence[int], logprob: TokenLogprob | None = None) -> Sequence[object]:
        if len(self.generated) == self.fails_at:
            raise ValueError("this generation fails")
        self.generated += tokens
        self.logprobs.append(logprob)
        return tuple(tokens)

    def finish(self, *, is_stopped: bool = False) -> Sequence[object]:
        return ("stopped" if is_stopped else "ended",)

    def wait(self, seconds: float) -> bool:
        self.waits += 1
        return not self.is_paused


def prompt_of(model: LoadedModel, word: str) -> tuple[int, ...]:
    vocabulary = model.vocabulary
    special, text = vocabulary.special_tokens, vocabulary.encode_text
    return (
        special["<|im_start|>"],
        *text(f"user\nHow many r's are in the word {word}?"),
        special["<|im_end|>"],
        *text("\n"),
        special["<|im_start|>"],
        *text("assistant\n"),
        special["<think>"],
        *text("\n"),
    )


def alone(model: LoadedModel, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """The model's tokens when nothing else runs, in a context of one slot."""
    generation = Counted(n_tokens)
    with closing(LlamaContext(model, SETTINGS)) as context:
        list(Scheduler(context).submit(generation, GenerationJob(prompt, 512, GREEDY)))
    return generation.generated


@pytest.fixture
def four(model: LoadedModel) -> Iterator[LlamaContext]:
    """A context of four slots."""
    with closing(LlamaContext(model, replace(SETTINGS, n_slots=4))) as context:
        yield context


def job(prompt: Sequence[int], window: int = 256, abort: AbortFlag | None = None) -> GenerationJob:
    return GenerationJob(prompt, window, GREEDY, abort=AbortFlag() if abort is None else abort)


def test_eight_generations_in_four_slots_say_what_each_says_alone(
    model: LoadedModel, four: LlamaContext
) -> None:
    """They are read one after the other. Whoever waits drives all, so the batches are shared."""
    scheduler = Scheduler(four)
    prompts = [prompt_of(model, word) for word in WORDS]
    generations = [Counted(30 + number) for number in range(len(prompts))]
    submissions = [
        scheduler.submit(generation, job(prompt))
        for generation, prompt in zip(generations, prompts, strict=True)
    ]
    for submission in submissions:
        assert list(submission)[-1] == "ended"
    for generation, prompt in zip(generations, prompts, strict=True):
        assert generation.generated == alone(model, prompt, generation.n_tokens)


def test_replies_finish_beside_each_other(model: LoadedModel, four: LlamaContext) -> None:
    """Whole replies with thinking and answer, each in its own thread."""
    scheduler = Scheduler(four)
    settings = ReplySettings(256, GREEDY, thinking_budget=150, answer_reserve=60)
    finished: dict[str, Finished] = {}

    def answer(word: str) -> None:
        prompt = prompt_of(model, word)
        reply = Reply(model.vocabulary, settings, Opening(prompt))
        *_, end = scheduler.submit(reply, job(prompt))
        assert isinstance(end, Finished)
        finished[word] = end

    threads = [threading.Thread(target=answer, args=(word,)) for word in WORDS[:5]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "\\boxed{3}" in finished["strawberry"].answer
    assert "\\boxed{0}" in finished["banana"].answer
    assert {end.reason for end in finished.values()} == {FinishReason.STOP}


def test_one_generation_stopped_failed_or_closed_leaves_the_others_untouched(
    model: LoadedModel, four: LlamaContext
) -> None:
    scheduler, flag = Scheduler(four), AbortFlag()
    prompts = [prompt_of(model, word) for word in WORDS[:4]]
    stopped, failing, closed, untouched = Counted(99), Counted(99, fails_at=7), Counted(99), Counted(40)
    streams = [
        scheduler.submit(stopped, job(prompts[0], abort=flag)),
        scheduler.submit(failing, job(prompts[1])),
        scheduler.submit(closed, job(prompts[2])),
        scheduler.submit(untouched, job(prompts[3])),
    ]
    for _ in range(12):
        next(streams[3])
    flag.set()
    streams[2].close()
    assert list(streams[3])[-1] == "ended"
    assert untouched.generated == alone(model, prompts[3], 40)
    assert list(streams[0])[-1] == "stopped"
    assert stopped.generated == alone(model, prompts[0], 99)[: len(stopped.generated)]
    with pytest.raises(ValueError, match="this generation fails"):
        list(streams[1])
    assert len(closed.generated) < 40


def test_a_released_slot_serves_the_next_generation(model: LoadedModel, four: LlamaContext) -> None:
    scheduler = Scheduler(four)
    prompt = prompt_of(model, "tree")
    for _ in range(3):
        with closing(scheduler.submit(Counted(99), job(prompt))) as stream:
            for _ in range(8):
                next(stream)
    generation = Counted(20)
    list(scheduler.submit(generation, job(prompt)))
    assert generation.generated == alone(model, prompt, 20)


def test_a_generation_waits_until_its_whole_window_has_cells(model: LoadedModel, four: LlamaContext) -> None:
    """Two of 500 fill the 1,024 cells; the third starts when one of them is done, before the short fourth."""
    scheduler = Scheduler(four)
    first, second, third, fourth = (
        scheduler.submit(Counted(10 + 30 * number), job(prompt_of(model, word), window))
        for number, (word, window) in enumerate(zip(WORDS, (500, 500, 500, 100), strict=False))
    )
    while not second.events:
        next(first)
    assert not first.is_done
    assert [bool(stream.events) for stream in (third, fourth)] == [False, False]
    list(first)
    while not third.events:
        next(second)
    assert not second.is_done
    assert not fourth.events
    assert [list(stream)[-1] for stream in (second, third, fourth)] == ["ended"] * 3


def test_a_generation_that_can_never_fit_is_refused_with_numbers(four: LlamaContext) -> None:
    scheduler = Scheduler(four)
    with pytest.raises(PromptTooLong, match=r"needs a window of 2,000.*1,024"):
        scheduler.submit(Counted(1), job([5] * 3, 2000))
    with pytest.raises(PromptTooLong, match="300 tokens"):
        scheduler.submit(Counted(1), job([5] * 300, 200))
    with pytest.raises(EngineError, match="empty"):
        scheduler.submit(Counted(1), job([], 200))


def first_prefill(stream: Iterator[object]) -> PrefillProgress:
    event = next(stream)
    assert isinstance(event, PrefillProgress)
    return event


def test_a_prefix_is_shared_with_a_running_generation_and_its_cells_are_counted_once(
    model: LoadedModel, four: LlamaContext
) -> None:
    """Three windows of 400 fit 1,024 cells only because 250 tokens of the prompt are the same."""
    scheduler = Scheduler(four)
    book = tuple(model.vocabulary.encode_text("one two three four five six seven eight nine ten " * 20)[:250])
    prompts = [book + prompt_of(model, word) for word in WORDS[:4]]
    expected = [alone(model, prompt, 12) for prompt in prompts]
    generations = [Counted(12) for _ in prompts]
    streams = [scheduler.submit(generations[0], job(prompts[0], 400))]
    while not generations[0].generated:
        next(streams[0])
    streams += [
        scheduler.submit(generation, job(prompt, 400))
        for generation, prompt in zip(generations[1:], prompts[1:], strict=True)
    ]
    assert [first_prefill(stream).cached >= 250 for stream in streams[1:3]] == [True] * 2
    assert not streams[0].is_done
    assert first_prefill(streams[3]).cached >= 250
    assert [list(stream)[-1] for stream in streams] == ["ended"] * 4
    assert [generation.generated for generation in generations] == expected


def test_an_idle_conversation_is_parked_and_comes_back_without_being_read_again(
    model: LoadedModel, four: LlamaContext
) -> None:
    scheduler = Scheduler(four)
    kept, other = prompt_of(model, "strawberry"), prompt_of(model, "refrigerator")
    generation = Counted(20)
    list(scheduler.submit(generation, job(kept)))
    list(scheduler.submit(Counted(5), job(other, 900)))
    assert sum(len(sequence.tokens) for sequence in four.sequences) < 900
    again = Counted(10)
    stream = scheduler.submit(again, job((*kept, *generation.generated)))
    assert first_prefill(stream).cached == len(kept) + 19
    list(stream)
    assert again.generated == alone(model, (*kept, *generation.generated), 10)


def test_nothing_is_parked_beyond_its_limit(model: LoadedModel, four: LlamaContext) -> None:
    scheduler = Scheduler(four, parked_bytes=1000)
    kept = prompt_of(model, "strawberry")
    list(scheduler.submit(Counted(5), job(kept)))
    list(scheduler.submit(Counted(5), job(prompt_of(model, "tree"), 900)))
    assert first_prefill(scheduler.submit(Counted(5), job(kept))).cached < len(kept) - 5


def test_a_paused_generation_waits_while_the_others_run_and_continues_where_it_was(
    model: LoadedModel, four: LlamaContext
) -> None:
    """The others overwrite its logits meanwhile."""
    scheduler = Scheduler(four)
    prompts = [prompt_of(model, word) for word in WORDS[:2]]
    paused, other = Counted(30), Counted(25)
    streams = [
        scheduler.submit(each, job(prompt)) for each, prompt in zip((paused, other), prompts, strict=True)
    ]
    while len(paused.generated) < 5:
        next(streams[0])
    paused.is_paused = True
    list(streams[1])
    assert len(paused.generated) <= 6
    paused.is_paused = False
    list(streams[0])
    assert paused.generated == alone(model, prompts[0], 30)
    assert other.generated == alone(model, prompts[1], 25)


def test_when_everything_is_paused_the_scheduler_waits_and_can_still_be_stopped(
    model: LoadedModel, four: LlamaContext
) -> None:
    flag = AbortFlag()

    class StopsWhilePaused(Counted):
        def wait(self, seconds: float) -> bool:
            if seconds:
                flag.set()
            return super().wait(seconds)

    generation = StopsWhilePaused(9, is_paused=True)
    events = list(Scheduler(four).submit(generation, job(prompt_of(model, "tree"), abort=flag)))
    assert events[-1] == "stopped"
    assert generation.generated == []


def test_forced_tokens_and_cuts_leave_exactly_what_the_generation_says(
    model: LoadedModel, four: LlamaContext
) -> None:
    """A forced text, longer than a batch, and a cut: the rest is what follows the same tokens alone."""
    prompt = prompt_of(model, "tree")
    forced = tuple(model.vocabulary.encode_text("I count the letters again. " * 6))
    generation = Counted(len(forced) + 21, [Force(forced)])
    with closing(LlamaContext(model, replace(SETTINGS, n_batch=64, n_ubatch=64, n_slots=2))) as context:
        scheduler = Scheduler(context)
        beside = scheduler.submit(Counted(40), job(prompt_of(model, "apple")))
        next(beside)
        stream = scheduler.submit(generation, job(prompt, 400))
        while len(generation.generated) < len(forced) + 5:
            next(stream)
        generation.steps.append(CutBack(len(prompt) + len(generation.generated) - 1))
        list(stream)
        list(beside)
    n_before = len(forced) + 4
    assert tuple(generation.generated[: len(forced)]) == forced
    said = alone(model, (*prompt, *generation.generated[:n_before]), 17)
    assert generation.generated[n_before:] == said


def test_a_stop_in_the_middle_of_forced_tokens_leaves_none_of_them_in_the_cache(
    model: LoadedModel, four: LlamaContext
) -> None:
    flag = AbortFlag()

    class Stopped(Counted):
        def next(self) -> Step:
            step = super().next()
            if isinstance(step, Force):
                flag.set()
            return step

    prompt = prompt_of(model, "tree")
    generation = Stopped(99, [Force((5, 6, 7))])
    assert list(Scheduler(four).submit(generation, job(prompt, abort=flag)))[-1] == "stopped"
    assert [sequence.tokens for sequence in four.sequences if sequence.tokens] == [list(prompt)]


def test_a_context_of_several_slots_used_by_one_equals_a_context_of_one_bit_for_bit(
    model: LoadedModel, four: LlamaContext
) -> None:
    prompt = prompt_of(model, "strawberry")
    with closing(LlamaContext(model, SETTINGS)) as one:
        rows = [context.decode([Rows(0, prompt)])[0] for context in (one, four)]
        assert np.array_equal(one.logits(rows[0]), four.logits(rows[1]))


def test_log_probabilities_are_those_of_the_unmodified_softmax(
    model: LoadedModel, four: LlamaContext
) -> None:
    """By scipy's definition, whatever the sampler does; the temperature here is far from 1."""
    prompt = prompt_of(model, "strawberry")
    generation = Counted(6)
    sampler = SamplerSettings(temperature=3.0, top_k=5, seed=4, repeat_penalty=1.5)
    list(Scheduler(four).submit(generation, GenerationJob(prompt, 256, sampler, n_logprobs=3)))
    with closing(LlamaContext(model, SETTINGS)) as context:
        tokens = list(prompt)
        for token, logprob in zip(generation.generated, generation.logprobs, strict=True):
            sequence = context.sequences[0]
            (row,) = context.decode([Rows(0, tokens[len(sequence.tokens) :])])
            logits = context.logits(row).astype(np.float64)
            expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            assert logprob is not None
            assert logprob.token == token
            assert logprob.logprob == pytest.approx(expected[token], abs=1e-3)
            best = np.argsort(-expected)[:3]
            assert [each for each, _ in logprob.top] == best.tolist()
            assert [value for _, value in logprob.top] == pytest.approx(expected[best].tolist(), abs=1e-3)
            tokens.append(token)


def test_log_probabilities_sum_to_one() -> None:
    logits = np.array([1000.0, 999.0, -5.0, 0.0], np.float32)
    each = [logprob_of(logits, token, 4) for token in range(4)]
    assert sum(np.exp(one.logprob) for one in each) == pytest.approx(1)
    assert [token for token, _ in each[0].top] == [0, 1, 3, 2]
    assert logprob_of(logits, 2, 0).top == ()


class SteppingClock:
    """A clock that advances by a fixed time for each decoded token."""

    def __init__(self, token_s: float) -> None:
        self.now, self.token_s = 0.0, token_s

    def __call__(self) -> float:
        return self.now


class ClockedContext(LlamaContext):
    """A context that records the size of each batch and advances a clock."""

    clock: SteppingClock
    sizes: list[tuple[int, int]]

    def decode(self, rows: Sequence[Rows], abort: AbortFlag | None = None) -> list[int]:
        n_tokens = sum(len(each.tokens) for each in rows)
        self.sizes.append((len(rows), n_tokens))
        self.clock.now += n_tokens * self.clock.token_s
        return super().decode(rows, abort)


@pytest.mark.parametrize("token_s", [0.001, 0.004])
def test_a_prompt_beside_a_running_generation_keeps_each_step_within_the_gap(
    model: LoadedModel, token_s: float
) -> None:
    """Measured by the given clock; a chunk is at most twice the one before."""
    with closing(ClockedContext(model, replace(SETTINGS, n_ctx=4096, n_slots=2))) as context:
        context.clock, context.sizes = SteppingClock(token_s), []
        scheduler = Scheduler(context, prefill_gap=0.25, clock=context.clock)
        beside = scheduler.submit(Counted(60), job(prompt_of(model, "tree")))
        while len(beside.generation.generated) < 5:
            next(beside)
        context.sizes.clear()
        book = model.vocabulary.encode_text("one two three four five six seven eight nine ten " * 200)[:3000]
        reading = scheduler.submit(Counted(1), job(book, 3100))
        list(beside)
        list(reading)
    both = [n_tokens for n_rows, n_tokens in context.sizes if n_rows == 2]
    assert len(both) > 5
    assert max(both) * token_s <= 0.26
    assert max(both) * token_s >= 0.18


def test_a_fixed_chunk_size_is_used(model: LoadedModel) -> None:
    with closing(ClockedContext(model, replace(SETTINGS, n_slots=2))) as context:
        context.clock, context.sizes = SteppingClock(9.0), []
        scheduler = Scheduler(context, prefill_chunk=32, clock=context.clock)
        prompt = prompt_of(model, "strawberry")
        list(scheduler.submit(Counted(2), job(prompt)))
    n_whole, rest = divmod(len(prompt), 32)
    assert [n_tokens for _, n_tokens in context.sizes] == [*[32] * n_whole, rest, 1]


class FailingContext(LlamaContext):
    """A context whose decode fails whenever a certain token is in the batch."""

    poison: int

    def decode(self, rows: Sequence[Rows], abort: AbortFlag | None = None) -> list[int]:
        if any(self.poison in each.tokens for each in rows):
            raise EngineError("llama_decode failed with status -3.")
        return super().decode(rows, abort)


def test_when_a_batch_fails_only_the_generation_that_fails_alone_gets_the_error(model: LoadedModel) -> None:
    prompts = [prompt_of(model, word) for word in WORDS[:3]]
    with closing(FailingContext(model, replace(SETTINGS, n_slots=3))) as context:
        context.poison = 5
        assert all(5 not in prompt for prompt in prompts)
        scheduler = Scheduler(context)
        first, poisoned, third = Counted(20), Counted(20, [Force((5,))]), Counted(20)
        streams = [
            scheduler.submit(each, job(prompt))
            for each, prompt in zip((first, poisoned, third), prompts, strict=True)
        ]
        with pytest.raises(EngineError, match="status -3"):
            list(streams[1])
        list(streams[0])
        list(streams[2])
    assert first.generated == alone(model, prompts[0], 20)
    assert third.generated == alone(model, prompts[2], 20)


def test_a_reply_is_steered_and_answered_beside_another(model: LoadedModel, four: LlamaContext) -> None:
    control = ReplyControl()
    settings = ReplySettings(400, GREEDY, thinking_budget=200, answer_reserve=60)
    scheduler, prompt = Scheduler(four), prompt_of(model, "strawberry")
    beside = scheduler.submit(Counted(60), job(prompt_of(model, "tree")))
    reply = Reply(model.vocabulary, settings, Opening(prompt), control)
    stream = scheduler.submit(reply, job(prompt, 400))
    events: list[Event] = [next(stream) for _ in range(10)]
    control.steer("Count them twice.")
    control.answer_now()
    events += stream
    assert isinstance(events[-1], Finished)
    assert "\n\nCount them twice.\n\n" in events[-1].thinking
    assert events[-1].answer
    list(beside)


class RacedEvents(deque[object]):
    """Events that another thread adds right after somebody has seen that there are none."""

    def __init__(self, race: Callable[[], object]) -> None:
        super().__init__()
        self._races = [race]

    def __bool__(self) -> bool:
        if len(self) or not self._races:
            return len(self) > 0
        self._races.pop()()
        return False


@pytest.mark.parametrize("fails_at", [-1, 2])
def test_the_last_events_and_the_error_are_not_lost_when_another_thread_brings_them(
    model: LoadedModel, four: LlamaContext, fails_at: int
) -> None:
    scheduler = Scheduler(four)
    generation = Counted(3, fails_at=fails_at)
    stream = scheduler.submit(generation, job(prompt_of(model, "tree")))
    beside = scheduler.submit(Counted(20), job(prompt_of(model, "apple")))
    stream.events = RacedEvents(lambda: list(beside))
    events: list[object] = []
    with nullcontext() if fails_at < 0 else pytest.raises(ValueError, match="this generation fails"):
        for event in stream:
            events.append(event)
    ending = ["ended"] if fails_at < 0 else []
    assert [event for event in events if not isinstance(event, PrefillProgress)] == [
        *generation.generated,
        *ending,
    ]


def test_a_thread_gets_its_events_while_another_thread_goes_on_stepping(
    model: LoadedModel, four: LlamaContext
) -> None:
    scheduler, arrived = Scheduler(four), threading.Event()
    main = threading.current_thread()
    was_in_time: list[bool] = []

    class Driving(Counted):
        def next(self) -> Step:
            if other.generated and threading.current_thread() is main:
                was_in_time.append(arrived.wait(60))
            return super().next()

    other = Counted(200)
    driving = scheduler.submit(Driving(10), job(prompt_of(model, "tree"), 300))
    stream = scheduler.submit(other, job(prompt_of(model, "apple"), 300))

    def receive() -> None:
        for event in stream:
            if event in other.generated:
                arrived.set()

    thread = threading.Thread(target=receive)
    thread.start()
    list(driving)
    thread.join(60)
    assert not thread.is_alive()
    assert all(was_in_time)


@pytest.fixture
def two(model: LoadedModel) -> Iterator[LlamaContext]:
    """A context of two slots."""
    with closing(LlamaContext(model, replace(SETTINGS, n_slots=2))) as context:
        yield context


def test_a_parked_conversation_comes_back_into_the_only_free_slot(
    model: LoadedModel, two: LlamaContext
) -> None:
    scheduler = Scheduler(two)
    kept = prompt_of(model, "strawberry")
    list(scheduler.submit(Counted(5), job(kept)))
    list(scheduler.submit(Counted(5), job((7, 8, 9))))
    running = scheduler.submit(Counted(99), job((10, 11, 12)))
    next(running)
    list(scheduler.submit(Counted(5), job((13, 14, 15))))
    again = Counted(10)
    stream = scheduler.submit(again, job((*kept, 5)))
    assert first_prefill(stream).cached == len(kept)
    list(stream)
    assert again.generated == alone(model, (*kept, 5), 10)


def test_a_conversation_that_loses_the_only_free_slot_is_parked(
    model: LoadedModel, two: LlamaContext
) -> None:
    """Two conversations take turns in one slot; they begin with the same token."""
    scheduler = Scheduler(two)
    running = scheduler.submit(Counted(99), job((10, 11, 12)))
    next(running)
    prompts = [prompt_of(model, word) for word in WORDS[:2]]
    for prompt in prompts:
        list(scheduler.submit(Counted(5), job(prompt)))
    for prompt in prompts:
        stream = scheduler.submit(Counted(5), job((*prompt, 5)))
        assert first_prefill(stream).cached == len(prompt)
        list(stream)


def test_a_parked_conversation_gets_the_cells_of_idle_ones(model: LoadedModel, four: LlamaContext) -> None:
    """900 of 1,024 cells are idle when 600 come back."""
    scheduler = Scheduler(four)
    text = model.vocabulary.encode_text("one two three four five six seven eight nine ten " * 99)
    kept, other = text[:600], text[1:901]
    for prompt in (kept, other):
        list(scheduler.submit(Counted(1), job(prompt, 1000)))
    assert first_prefill(scheduler.submit(Counted(5), job((*kept, 5), 1000))).cached == 600


def test_what_was_parked_first_makes_room_for_the_last(model: LoadedModel, two: LlamaContext) -> None:
    prompts = [(number, *model.vocabulary.encode_text("one two three " * 9)) for number in (5, 6, 7, 8)]
    list(Scheduler(two).submit(Counted(1), job(prompts[0])))
    size = two.sequences[0].state_bytes or two.sequences[1].state_bytes
    for sequence in two.sequences:
        sequence.truncate(0)
    scheduler = Scheduler(two, parked_bytes=2 * size + size // 2)
    for prompt in prompts:
        list(scheduler.submit(Counted(1), job(prompt)))
    # The fourth is in its slot, the third and the second are parked.
    assert first_prefill(scheduler.submit(Counted(1), job((*prompts[2], 9)))).cached == len(prompts[2])


class UnsavedSequence(CachedSequence):
    """A sequence that cannot be copied."""

    def saved_state(self) -> SequenceState:
        raise EngineError("llama.cpp wrote 0 of 9 bytes of the KV cache.")


class UnsavedContext(LlamaContext):
    def __init__(self, model: LoadedModel, settings: ContextSettings) -> None:
        super().__init__(model, settings)
        self.sequences = tuple(
            UnsavedSequence(self._lib, self.handle, each.slot, each.settings) for each in self.sequences
        )


def test_a_sequence_that_cannot_be_parked_is_dropped_and_keeps_no_slot(model: LoadedModel) -> None:
    with closing(UnsavedContext(model, replace(SETTINGS, n_slots=2))) as context:
        scheduler = Scheduler(context)
        for word in WORDS[:5]:
            prompt, generation = prompt_of(model, word), Counted(5)
            list(scheduler.submit(generation, job(prompt)))
            assert generation.generated == alone(model, prompt, 5)


def test_a_generation_that_fails_while_it_is_stopped_in_the_queue_leaves_the_others_untouched(
    model: LoadedModel, four: LlamaContext
) -> None:
    class FailsAtTheEnd(Counted):
        def finish(self, *, is_stopped: bool = False) -> Sequence[object]:
            raise ValueError("it fails at the end")

    scheduler, flag = Scheduler(four), AbortFlag()
    running = scheduler.submit(Counted(9), job(prompt_of(model, "tree"), 1000))
    next(running)
    waiting = scheduler.submit(FailsAtTheEnd(9), job((5, 6), 1000, flag))
    next(running)
    flag.set()
    assert list(running)[-1] == "ended"
    with pytest.raises(ValueError, match="it fails at the end"):
        next(waiting)


def test_a_generation_that_fails_while_it_is_paused_leaves_the_others_untouched(
    model: LoadedModel, four: LlamaContext
) -> None:
    class FailsInPause(Counted):
        def wait(self, seconds: float) -> bool:
            raise ValueError("it fails in its pause")

    scheduler = Scheduler(four)
    paused = scheduler.submit(FailsInPause(9, is_paused=True), job((5, 6)))
    running = scheduler.submit(Counted(9), job(prompt_of(model, "tree")))
    assert list(running)[-1] == "ended"
    with pytest.raises(ValueError, match="it fails in its pause"):
        list(paused)


class BrokenMatcher(ConstraintMatcher):
    def __init__(self) -> None:
        pass

    def candidates(self, logits: object) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        raise ValueError("the matcher fails")


def test_any_error_of_a_sampling_ends_that_generation_alone(model: LoadedModel, four: LlamaContext) -> None:
    scheduler = Scheduler(four)
    failing = scheduler.submit(
        Counted(9, [Sample(is_constrained=True)]), replace(job((5, 6)), matcher=BrokenMatcher())
    )
    running = scheduler.submit(Counted(9), job(prompt_of(model, "tree")))
    assert list(running)[-1] == "ended"
    with pytest.raises(ValueError, match="the matcher fails"):
        list(failing)


def test_a_generation_may_be_submitted_while_the_queue_is_read(
    model: LoadedModel, four: LlamaContext
) -> None:
    scheduler = Scheduler(four)
    prompt = prompt_of(model, "tree")

    class Submits(AbortFlag):
        """Reading it takes long enough for another thread to submit."""

        def __bool__(self) -> bool:
            if len(more) < 3:
                more.append(scheduler.submit(Counted(3), job(prompt)))
            return False

    more: list[Iterator[object]] = []
    list(scheduler.submit(Counted(3), job(prompt, abort=Submits())))
    assert [list(stream)[-1] for stream in more] == ["ended"] * 3


def test_closing_ends_what_runs_and_what_waits_with_an_error(model: LoadedModel, four: LlamaContext) -> None:
    scheduler = Scheduler(four)
    running, waiting = (scheduler.submit(Counted(99), job((5, number), 1000)) for number in (6, 7))
    next(running)
    scheduler.close()
    scheduler.close()
    for stream in (running, waiting):
        with pytest.raises(EngineError, match="closed"):
            list(stream)
        stream.close()
    with pytest.raises(EngineError, match="closed"):
        scheduler.submit(Counted(1), job((5, 6)))


def test_closing_waits_for_the_step_of_another_thread(model: LoadedModel, four: LlamaContext) -> None:
    """The chains are not freed under it."""
    scheduler, is_stepping, may_go_on = Scheduler(four), threading.Event(), threading.Event()
    errors: list[EngineError] = []

    class Slow(Counted):
        def next(self) -> Step:
            if len(self.generated) == 3 and not is_stepping.is_set():
                is_stepping.set()
                may_go_on.wait(60)
                self.is_paused = True
            return super().next()

    generation = Slow(99)
    stream = scheduler.submit(generation, job(prompt_of(model, "tree")))

    def receive() -> None:
        try:
            list(stream)
        except EngineError as error:
            errors.append(error)

    threads = [threading.Thread(target=receive), threading.Thread(target=scheduler.close)]
    threads[0].start()
    assert is_stepping.wait(60)
    threads[1].start()
    assert not stream.is_done
    may_go_on.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(errors) == 1
    assert len(generation.generated) == 3


class NotedChain(SamplerChain):
    """A chain that notes what penalties look back at."""

    remembered: ClassVar[list[list[int]]] = []

    def remember(self, tokens: Sequence[int]) -> None:
        self.remembered.append(list(tokens))
        super().remember(tokens)


class NotedContext(LlamaContext):
    chain_class = NotedChain


def test_penalties_look_back_at_what_was_generated_before_forced_and_not_cut(model: LoadedModel) -> None:
    prompt = prompt_of(model, "tree")
    with closing(NotedContext(model, SETTINGS)) as context:
        NotedChain.remembered.clear()
        generation = Counted(6, [Force((5, 6))], generated=[8, 9])
        stream = Scheduler(context).submit(generation, job((*prompt, 8, 9)))
        while len(generation.generated) < 5:
            next(stream)
        assert NotedChain.remembered == [[8, 9], [8, 9, 5, 6]]
        before = generation.generated[:-1]
        generation.steps.append(CutBack(len(prompt) + len(before)))
        list(stream)
        assert NotedChain.remembered[2:] == [before]


class SlowlySamplingContext(LlamaContext):
    """A context that notes in which threads it samples and moves a clock meanwhile."""

    clock: SteppingClock
    threads: set[str]

    def sample(self, chain: SamplerChain, row: int, matcher: ConstraintMatcher | None = None) -> int:
        self.threads.add(threading.current_thread().name)
        self.clock.now += self.clock.token_s
        return super().sample(chain, row, matcher)


@pytest.mark.parametrize("sample_s", [1e-5, 1e-3])
def test_slow_rows_are_sampled_in_threads_and_fast_ones_at_once(model: LoadedModel, sample_s: float) -> None:
    prompts = [prompt_of(model, word) for word in WORDS[:2]]
    with closing(SlowlySamplingContext(model, replace(SETTINGS, n_slots=2))) as context:
        context.clock, context.threads = SteppingClock(sample_s), set()
        scheduler = Scheduler(context, clock=context.clock)
        generations = [Counted(12), Counted(12)]
        streams = [
            scheduler.submit(each, job(prompt)) for each, prompt in zip(generations, prompts, strict=True)
        ]
        for stream in streams:
            list(stream)
        scheduler.close()
    assert any(name.startswith("sample") for name in context.threads) == (sample_s > 1e-4)
    assert [each.generated for each in generations] == [alone(model, prompt, 12) for prompt in prompts]


def test_prompts_submitted_together_read_their_common_beginning_once(
    model: LoadedModel, four: LlamaContext
) -> None:
    """Four windows of 400 fit 1,024 cells only because each counts the 250 shared tokens once."""
    scheduler = Scheduler(four)
    book = tuple(model.vocabulary.encode_text("one two three four five six seven eight nine ten " * 20)[:250])
    prompts = [book + prompt_of(model, word) for word in WORDS[:4]]
    generations = [Counted(12) for _ in prompts]
    streams = [
        scheduler.submit(generation, job(prompt, 400))
        for generation, prompt in zip(generations, prompts, strict=True)
    ]
    first, *others = streams
    while not others[-1].events:
        next(first)
    assert not first.is_done
    assert [first_prefill(stream).cached >= 250 for stream in others] == [True] * 3
    for stream, generation, prompt in zip(streams, generations, prompts, strict=True):
        assert list(stream)[-1] == "ended"
        assert generation.generated == alone(model, prompt, 12)
