"""The scheduler: the only caller of llama_decode. It runs several generations over one context.

Each step decodes one batch, the next token of every running generation and a chunk of a prompt.
Then it samples. There is no thread of its own: whoever waits for events drives a step, for all. A scheduler
with one slot is a plain decode loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Condition
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qwq_local.engine.api import (
    CutBack,
    End,
    Force,
    Generation,
    Pause,
    PrefillProgress,
    Sample,
    SamplerSettings,
)
from qwq_local.engine.constraint import ConstraintMatcher
from qwq_local.engine.context import CachedSequence, LlamaContext, Rows, SequenceState, common_prefix
from qwq_local.engine.sampler import SamplerChain
from qwq_local.errors import Aborted, AbortFlag, EngineError, PromptTooLong
from qwq_local.events import TokenLogprob

if TYPE_CHECKING:
    import numpy as np

PREFILL_GAP_S = 0.25
_FIRST_CHUNK, _SMALLEST_CHUNK = 64, 16
# From here on the abort callback is worth its cost of one call for each node of the graph.
_SLOW_TOKEN_S = 0.1
# Rows are sampled in threads when one takes longer than handing it to a thread.
_SLOW_SAMPLE_S = 1e-4
# A chunk is sized for this part of the gap: the next one may take longer than the last.
_GAP_SHARE = 0.8
_PAUSE_STEP_S = 0.02
_PARKED_BYTES = 2 << 30
_CLOSED = "the scheduler is closed."
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """What one generation needs: the tokens to prefill, its window, and how it is sampled.

    `window` is the number of tokens of prompt and reply together; the scheduler reserves as many cells.
    `n_logprobs` None computes no log-probabilities, n also the n likeliest. Setting `abort` stops it.
    """

    tokens: Sequence[int]
    window: int
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    matcher: ConstraintMatcher | None = None
    n_logprobs: int | None = None
    abort: AbortFlag = field(default_factory=AbortFlag)


class Submission(Iterator[E], Generic[E]):
    """The events of one submitted generation. Iterating drives the scheduler; `close` ends it early."""

    def __init__(self, scheduler: Scheduler, generation: Generation[E], job: GenerationJob) -> None:
        self._scheduler = scheduler
        self.generation = generation
        self.job = job
        self.events: deque[E] = deque()
        self.error: BaseException | None = None
        self.is_done = False

    def __next__(self) -> E:
        while True:
            is_done = self.is_done  # read first: another thread adds the last events before it sets this
            if self.events:
                return self.events.popleft()
            if not is_done:
                self._scheduler.step_for(self)
            elif self.error is not None:
                error, self.error = self.error, None
                raise error
            else:
                raise StopIteration

    def close(self) -> None:
        """End it without further events; what is cached stays. Closing twice is harmless."""
        self._scheduler.withdraw(self)


@dataclass(slots=True, eq=False)
class _Running:
    """A generation in a slot."""

    submission: Submission[Any]
    sequence: CachedSequence
    chain: SamplerChain
    n_cached: int
    pending: list[int] = field(default_factory=list)  # to decode next
    forced: tuple[int, ...] | None = None  # the end of `pending`, to be confirmed when decoded
    is_prefilled: bool = False
    row: int | None = None  # of the last decode, where the next token is sampled; None when it is stale
    is_constrained: bool = False
    is_paused: bool = False

    @property
    def generation(self) -> Generation[Any]:
        return self.submission.generation

    @property
    def job(self) -> GenerationJob:
        return self.submission.job

    def rewind(self) -> None:
        """Decode the last token once more, for its logits."""
        n_kept = len(self.sequence.tokens) - 1
        self.pending = [self.sequence.tokens[-1]]
        self.sequence.truncate(n_kept)
        self.row = None


@dataclass(frozen=True, slots=True)
class _BatchPart:
    """What a running generation decodes in one step, and how much of it is prompt."""

    running: _Running
    tokens: Sequence[int]
    is_last: bool  # logits are wanted after it
    is_prompt: bool


class Scheduler:
    """Runs generations over a context. Any thread may submit, iterate and stop."""

    def __init__(
        self,
        context: LlamaContext,
        *,
        prefill_gap: float = PREFILL_GAP_S,
        prefill_chunk: int = 0,
        parked_bytes: int = _PARKED_BYTES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Beside running generations a chunk of a prompt keeps a step under `prefill_gap` seconds.

        `prefill_chunk` fixes the chunk's tokens instead, so that runs can be reproduced. Up to `parked_bytes`
        of host memory hold the caches of idle slots.
        """
        self._context = context
        self._clock = clock
        n_batch = context.settings.n_batch
        size = min(prefill_chunk, n_batch)
        # Backends that do not ask the abort callback get short batches even when nothing else runs.
        self._alone = _ChunkSize(n_batch, size, prefill_gap, is_adaptive=not context.is_abortable)
        self._beside = _ChunkSize(n_batch, size, _GAP_SHARE * prefill_gap, is_adaptive=True)
        self._parked = _Parked(parked_bytes if context.settings.n_slots > 1 else 0)
        self._waiting: deque[Submission[Any]] = deque()
        self._running: list[_Running] = []
        self._idle: list[CachedSequence] = list(context.sequences)  # the least recently used first
        self._changed = Condition()  # notified after each step and each withdrawal
        self._is_busy = False  # one thread at a time steps or changes the lists above
        self._n_withdrawing = 0  # threads that wait to do so, before any further step
        self._is_closed = False
        self._token_s = self._sample_s = 0.0
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, generation: Generation[E], job: GenerationJob) -> Submission[E]:
        """Queue a generation; it starts when a slot and its whole window are free.

        Raises PromptTooLong when the context can never hold it.
        """
        n_ctx = self._context.settings.n_ctx
        if not job.tokens:
            raise EngineError("an empty prompt cannot be prefilled.")
        if job.window > n_ctx or len(job.tokens) > job.window:
            raise PromptTooLong(
                f"the prompt has {len(job.tokens):,} tokens and needs a window of {job.window:,}; "
                f"the context holds {n_ctx:,}."
            )
        submission = Submission(self, generation, job)
        with self._changed:
            if self._is_closed:
                raise EngineError(_CLOSED)
            self._waiting.append(submission)
        return submission

    def withdraw(self, submission: Submission[Any]) -> None:
        """Take a generation out of its slot or of the queue, without events."""
        if submission.is_done:
            return
        with self._between_steps():
            if submission in self._waiting:
                self._waiting.remove(submission)
            for running in [each for each in self._running if each.submission is submission]:
                self._release(running)
            submission.is_done = True

    def step_for(self, submission: Submission[Any]) -> None:
        """Run one step, or wait for the one that another thread runs: it may bring events."""
        with self._changed:
            if submission.events or submission.is_done:
                return
            if self._is_busy or self._n_withdrawing:
                self._changed.wait()
                return
            self._is_busy = True
        try:
            self._step()
        finally:
            self._set_free()

    def close(self) -> None:
        """Free the sampler chains and stop the threads; not the context. What is not done gets an error."""
        with self._between_steps():
            with self._changed:
                self._is_closed = True
            unfinished = [*self._waiting, *(each.submission for each in self._running)]
            self._waiting.clear()
            for running in list(self._running):
                self._release(running)
            for submission in unfinished:
                self._fail(submission, EngineError(_CLOSED))
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None
            self._parked.clear()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Wait for the end of the running step, and let no other begin."""
        with self._changed:
            self._n_withdrawing += 1
            try:
                while self._is_busy:
                    self._changed.wait()
                self._is_busy = True
            finally:
                self._n_withdrawing -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            self._set_free()

    def _set_free(self) -> None:
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()

    # One step

    def _step(self) -> None:
        self._end_stopped()
        self._admit()
        for running in [each for each in self._running if each.is_paused]:
            self._wait(running, 0)
        chunks = self._chunks()
        if chunks:
            self._decode(chunks)
        elif self._running and all(each.is_paused for each in self._running):
            self._wait(self._running[0], _PAUSE_STEP_S)
        self._advance_all()

    def _wait(self, running: _Running, seconds: float) -> None:
        with self._guard(running):
            running.is_paused = not running.generation.wait(seconds)

    def _end_stopped(self) -> None:
        for running in [each for each in self._running if each.job.abort]:
            self._finish(running, is_stopped=True)
        for submission in [each for each in list(self._waiting) if each.job.abort]:
            self._waiting.remove(submission)
            self._end(submission, is_stopped=True)

    def _advance_all(self) -> None:
        """Ask every generation that can move what to do, sample where it says so, and ask again."""
        to_sample = []
        for running in [each for each in self._running if each.is_prefilled and not each.pending]:
            with self._guard(running):
                if self._advance(running):
                    to_sample.append(running)
        for running, token in zip(to_sample, self._sampled(to_sample), strict=True):
            with self._guard(running):
                self._took(running, token)

    def _advance(self, running: _Running) -> bool:
        """Follow a generation's steps up to one that needs a decode; returns whether it is to be sampled."""
        while True:
            step = running.generation.next()
            if isinstance(step, Sample):
                running.is_constrained = step.is_constrained
                if running.row is None and not running.pending:
                    running.rewind()
                return not running.pending
            if isinstance(step, Force):
                running.pending += step.tokens
                running.forced = step.tokens
                return False
            if isinstance(step, CutBack):
                self._cut_back(running, step.n_tokens)
            elif isinstance(step, Pause):
                running.is_paused = True
                return False
            else:
                assert isinstance(step, End)
                self._finish(running)
                return False

    def _cut_back(self, running: _Running, n_tokens: int) -> None:
        del running.pending[max(0, n_tokens - len(running.sequence.tokens)) :]
        if n_tokens < len(running.sequence.tokens):
            running.sequence.truncate(n_tokens)
            running.row = None
        running.chain.remember(running.generation.generated)

    def _took(self, running: _Running, token: int | Exception) -> None:
        """Report a sampled token, and ask at once whether to continue."""
        if isinstance(token, Exception):
            raise token
        logprob = self._logprob(running, token)
        running.pending = [token]
        running.submission.events.extend(running.generation.took((token,), logprob))
        self._advance(running)

    # Slots

    def _admit(self) -> None:
        """Start waiting generations, in order, while there are slots and cells."""
        while self._waiting and self._idle and self._can_start(self._waiting[0].job):
            submission = self._waiting.popleft()
            try:
                self._start(submission)
            except Exception as error:
                self._fail(submission, error)

    def _can_start(self, job: GenerationJob) -> bool:
        """Whether its whole window has cells now; those of a prefix that it shares count once.

        It waits while a running generation is still reading a beginning that both prompts have.
        """
        tokens, n_running, n_other = job.tokens, 0, 0
        for running in self._running:
            n_read = common_prefix(running.sequence.tokens, tokens)
            if not running.is_prefilled and common_prefix(running.job.tokens, tokens) > n_read:
                return False
            n_running = max(n_running, n_read)
        for idle in self._idle:
            n_other = max(n_other, common_prefix(idle.tokens, tokens))
        n_shared = n_running if n_running >= max(n_other, self._parked.find(tokens)[1]) else 0
        return job.window - n_shared <= self._free_cells()

    def _free_cells(self) -> int:
        """Cells that no running generation holds or may still need."""
        held: set[int] = set()
        growth = 0
        for running in self._running:
            held.update(running.sequence.cells)
            growth += max(0, running.job.window - len(running.sequence.cells))
        return self._context.settings.n_ctx - len(held) - growth

    def _start(self, submission: Submission[Any]) -> None:
        job = submission.job
        chain = self._context.new_chain(job.sampler)
        sequence = self._take_slot(job.tokens)
        # Idle cells slow every step of the others, and they may be needed.
        for idle in self._idle:
            self._park(idle)
        # The last token is always decoded: its logits are wanted.
        n_cached = min(common_prefix(sequence.tokens, job.tokens), len(job.tokens) - 1)
        sequence.truncate(n_cached)
        running = _Running(submission, sequence, chain, n_cached)
        self._running.append(running)
        with self._guard(running):
            self._report_prefill(running)

    def _take_slot(self, tokens: Sequence[int]) -> CachedSequence:
        """An idle slot that holds as much of the prompt as there is: its own, another slot's, or parked."""
        sequences = [*(each.sequence for each in self._running), *self._idle]
        source = max(sequences, key=lambda each: common_prefix(each.tokens, tokens))
        n_common = common_prefix(source.tokens, tokens)
        parked, n_parked = self._parked.find(tokens)
        if n_parked > n_common:
            # What is parked needs cells.
            for idle in self._idle:
                self._park(idle)
        elif source in self._idle and 2 * n_common > len(source.tokens):
            self._idle.remove(source)
            return source
        # An empty one first, then the least recently used.
        target = min(self._idle, key=lambda each: bool(each.tokens))
        self._idle.remove(target)
        if parked is not None and n_parked > n_common and target.restore(parked):
            return target
        if target is source:
            self._keep_copy(target)
        else:
            self._park(target)
            if n_common := min(n_common, len(source.tokens)):
                target.share(source, n_common)
        return target

    def _park(self, sequence: CachedSequence) -> None:
        self._keep_copy(sequence)
        sequence.truncate(0)

    def _keep_copy(self, sequence: CachedSequence) -> None:
        """Park a copy, if that works; without one the tokens are read again."""
        with suppress(EngineError, MemoryError):
            self._parked.put(sequence)

    def _finish(self, running: _Running, *, is_stopped: bool = False) -> None:
        """End a generation; a part of a Force that is not confirmed leaves the cache."""
        n_known = len(running.sequence.tokens) + len(running.pending) - len(running.forced or ())
        running.sequence.truncate(n_known)
        self._release(running)
        self._end(running.submission, is_stopped=is_stopped)

    def _end(self, submission: Submission[Any], *, is_stopped: bool) -> None:
        try:
            submission.events.extend(submission.generation.finish(is_stopped=is_stopped))
        except Exception as error:
            submission.error = error
        submission.is_done = True

    def _release(self, running: _Running) -> None:
        running.chain.close()
        self._running.remove(running)
        self._idle.append(running.sequence)

    def _fail(self, submission: Submission[Any], error: BaseException) -> None:
        submission.error = error
        submission.is_done = True

    @contextmanager
    def _guard(self, running: _Running) -> Iterator[None]:
        """An error of one generation ends it and leaves the others untouched."""
        try:
            yield
        except Exception as error:
            if running in self._running:
                running.sequence.truncate(0)
                self._release(running)
            self._fail(running.submission, error)

    # Decoding

    def _chunks(self) -> list[_BatchPart]:
        """What the next batch holds: pending tokens of all, then a chunk of the oldest unread prompt."""
        room = self._context.settings.n_batch
        chunks: list[_BatchPart] = []
        prefilling: _Running | None = None
        for running in self._running:
            if not running.is_prefilled:
                prefilling = prefilling or running
            elif running.pending and room and not running.is_paused:
                part = running.pending[:room]
                chunks.append(_BatchPart(running, part, len(part) == len(running.pending), is_prompt=False))
                room -= len(part)
        if prefilling is not None and room:
            sizer = self._beside if chunks else self._alone
            done, tokens = len(prefilling.sequence.tokens), prefilling.job.tokens
            end = min(len(tokens), done + min(sizer.size, room))
            chunks.append(_BatchPart(prefilling, tokens[done:end], end == len(tokens), is_prompt=True))
        return chunks

    def _decode(self, chunks: Sequence[_BatchPart]) -> None:
        started = self._clock()
        abort = self._watched(chunks)
        self._note_stale(chunks)
        rows = [Rows(each.running.sequence.slot, each.tokens, int(each.is_last)) for each in chunks]
        try:
            last_rows = self._context.decode(rows, abort)
        except Aborted:
            self._end_stopped()
            return
        except EngineError as error:
            self._decode_apart(chunks, error)
            return
        elapsed_s = self._clock() - started
        if chunks[-1].is_prompt:
            (self._beside if len(chunks) > 1 else self._alone).measured(len(chunks[-1].tokens), elapsed_s)
        else:
            self._token_s = elapsed_s
        for chunk, row in zip(chunks, last_rows, strict=True):
            with self._guard(chunk.running):
                self._decoded(chunk, row)

    def _note_stale(self, chunks: Sequence[_BatchPart]) -> None:
        """A decode overwrites the logits of everybody that is not in it: of paused generations."""
        for running in self._running:
            if (
                running.row is not None
                and not running.pending
                and all(chunk.running is not running for chunk in chunks)
            ):
                running.rewind()

    def _decode_apart(self, chunks: Sequence[_BatchPart], error: EngineError) -> None:
        """After a failed batch: whoever fails alone too gets the error, the others go on."""
        if len(chunks) > 1:
            for chunk in chunks:
                if chunk.running in self._running:
                    self._decode([chunk])
                    self._advance_all()
            return
        running = chunks[0].running
        running.sequence.truncate(0)
        self._release(running)
        self._fail(running.submission, error)

    def _watched(self, chunks: Sequence[_BatchPart]) -> AbortFlag | None:
        """The flag that may stop this decode: only a batch of one generation can be stopped inside."""
        if len(chunks) > 1 or not (chunks[0].is_prompt or self._token_s > _SLOW_TOKEN_S):
            return None
        return chunks[0].running.job.abort

    def _decoded(self, chunk: _BatchPart, row: int) -> None:
        running = chunk.running
        if chunk.is_prompt:
            running.row = row if chunk.is_last else None
            running.is_prefilled = chunk.is_last
            if chunk.is_last:
                running.chain.remember(running.generation.generated)
            self._report_prefill(running)
            return
        del running.pending[: len(chunk.tokens)]
        running.row = row
        if running.forced is not None and not running.pending:
            forced, running.forced = running.forced, None
            running.submission.events.extend(running.generation.took(forced))
            running.chain.remember(running.generation.generated)

    def _report_prefill(self, running: _Running) -> None:
        progress = PrefillProgress(len(running.sequence.tokens), len(running.job.tokens), running.n_cached)
        running.submission.events.extend(running.generation.prefilled(progress))

    # Sampling

    def _sampled(self, ready: Sequence[_Running]) -> list[int | Exception]:
        """The next token of each, or the error of its sampling."""
        if len(ready) < 2 or self._sample_s < _SLOW_SAMPLE_S:
            return [self._sample_one(running) for running in ready]
        self._context.synchronize()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(thread_name_prefix="sample")
        return list(self._pool.map(self._sample_one, ready))

    def _sample_one(self, running: _Running) -> int | Exception:
        assert running.row is not None
        started = self._clock()
        matcher = running.job.matcher if running.is_constrained else None
        try:
            return self._context.sample(running.chain, running.row, matcher)
        except Exception as error:
            return error
        finally:
            self._sample_s = self._clock() - started

    def _logprob(self, running: _Running, token: int) -> TokenLogprob | None:
        if running.job.n_logprobs is None or running.row is None:
            return None
        return logprob_of(self._context.logits(running.row), token, running.job.n_logprobs)


def logprob_of(logits: np.ndarray[Any, Any], token: int, n_top: int) -> TokenLogprob:
    """The log-probability of a token and of the `n_top` likeliest, by the softmax at temperature 1."""
    import numpy as np

    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    n_top = min(n_top, len(values))
    best = np.argpartition(values, -n_top)[-n_top:].tolist() if n_top else []
    top = sorted(((each, float(values[each])) for each in best), key=lambda pair: -pair[1])
    return TokenLogprob(token, float(values[token]), tuple(top))


class _ChunkSize:
    """Tokens of a prompt for one step: fixed, or adapted so that a step takes `gap` seconds at most."""

    def __init__(self, n_batch: int, fixed: int, gap: float, *, is_adaptive: bool) -> None:
        self._n_batch = n_batch
        self._gap = gap
        self._is_adaptive = is_adaptive and not fixed
        self.size = fixed or (min(_FIRST_CHUNK, n_batch) if is_adaptive else n_batch)

    def measured(self, n_tokens: int, elapsed_s: float) -> None:
        """Note how long a chunk took; the next is at most twice as large."""
        if not self._is_adaptive or n_tokens < min(self.size, _SMALLEST_CHUNK):
            return
        fitting = int(n_tokens * self._gap / max(elapsed_s, 1e-6))
        self.size = max(min(_SMALLEST_CHUNK, self._n_batch), min(fitting, self.size * 2, self._n_batch))


class _Parked:
    """The caches of idle slots in host memory, the least recently used dropped first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._states: list[SequenceState] = []

    def put(self, sequence: CachedSequence) -> None:
        """Keep a copy of a sequence, if it is not larger than the limit."""
        if not sequence.tokens or sequence.state_bytes > self._limit_bytes:
            return
        self._states = [
            each for each in self._states if each.tokens != tuple(sequence.tokens[: len(each.tokens)])
        ]
        self._states.append(sequence.saved_state())
        while sum(len(each.buffer) for each in self._states) > self._limit_bytes:
            del self._states[0]

    def find(self, tokens: Sequence[int]) -> tuple[SequenceState | None, int]:
        """The state that begins most like the tokens, and how many tokens they share."""
        wanted = tuple(tokens)
        best, n_best = None, 0
        for each in self._states:
            if (n_common := common_prefix(each.tokens, wanted)) > n_best:
                best, n_best = each, n_common
        return best, n_best

    def clear(self) -> None:
        """Drop everything."""
        self._states.clear()
