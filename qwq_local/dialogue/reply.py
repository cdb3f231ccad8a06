"""One reply as a pure state machine: it names the next step, takes its result and returns events.

Thinking, closing, answer, budgets, loop guard, steering and continuing live here. The scheduler samples and
decodes; nothing here knows llama.cpp. A reply is never empty: it has an answer, or Finished says why not.
"""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwq_local.dialogue.control import AnswerNow, Opening, ReplyControl, sentence_of
from qwq_local.dialogue.loops import Loop, LoopGuard, LoopSettings
from qwq_local.dialogue.prompts.segments import encode_plain
from qwq_local.dialogue.thinking import CLOSE
from qwq_local.dialogue.transcript import Closings, Transcript
from qwq_local.engine.api import (
    CutBack,
    End,
    Force,
    Pause,
    PrefillProgress,
    Sample,
    SamplerSettings,
    Step,
    Vocabulary,
)
from qwq_local.events import (
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Notice,
    Prefill,
    ThinkingClosed,
    TokenLogprob,
    TurnStats,
)

REPORT_INTERVAL_S = 0.25
_NOTHING_LEFT = Notice("there is nothing to go on with: the answer had come to its end.")
# A reply that ends so can be continued: text that is held back waits for its rest.
_CAN_CONTINUE = (FinishReason.INTERRUPTED, FinishReason.MAX_TOKENS, FinishReason.CONTEXT)
_FREE, _CONSTRAINED, _PAUSE, _END = Sample(), Sample(is_constrained=True), Pause(), End()


@dataclass(frozen=True, slots=True)
class ReplySettings:
    """How a reply runs, in tokens. `window` is how many tokens prompt and reply may have together.

    `max_tokens` 0 lets the answer run to the end of the window. A reply that `wants_tokens` reports the ids
    it makes, so that another reply can continue from them; `has_logprobs` adds the log-probability of each
    sampled one. With `is_constrained` the answer is sampled under a constraint: a tag in it is content.
    """

    window: int
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    thinking_budget: int = 16384
    answer_reserve: int = 2048
    max_tokens: int = 0
    loop_guard: bool = True
    is_constrained: bool = False
    wants_tokens: bool = False
    has_logprobs: bool = False


class Reply:
    """A reply to a prompt of token ids; see `qwq_local.engine.api.Generation` for the calls.

    With an opening the reply continues it: events tell what is new, Finished has the whole; budgets and the
    loop guard count the whole.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: ReplySettings,
        opening: Opening,
        control: ReplyControl | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._vocabulary = vocabulary
        self._settings = settings
        self._control = control
        self._closings = Closings(vocabulary)
        generated = list(opening.generated)
        self._reason: FinishReason | None = None
        self._held: list[Event] = []  # events of `next`, returned by the next `took` or `finish`
        if generated and vocabulary.is_end(generated[-1]):
            del generated[-1]
            self._reason = FinishReason.STOP
            self._held.append(_NOTHING_LEFT)
        self.prompt = opening.prompt
        self._generated = generated
        self._n_prompt, self._n_known = len(opening.prompt), len(generated)
        self._text = self._new_transcript()
        n_thinking = self._text.replay(generated, opening.steered)
        n_answer = self._text.answer_tokens
        self._n_resumed = self._text.thinking_tokens + n_answer
        # Where the answer begins, as a number of generated tokens.
        self._thinking_end = None if self._text.is_thinking else n_thinking
        # An answer that has reached `max_tokens` may be as long again.
        self._max_tokens = settings.max_tokens
        if n_answer >= self._max_tokens > 0:
            self._max_tokens += n_answer
        self._reserved = settings.answer_reserve + self._closings.longest
        self._watch = _Stopwatch(clock)
        self._report = (
            _Report(clock, self._n_known, has_logprobs=settings.has_logprobs)
            if settings.wants_tokens
            else None
        )
        self._steps: deque[Step] = deque()
        self._must_close: CloseReason | None = None
        self._on_forced: Callable[[], Sequence[Event]] | None = None
        self._n_cached = 0

    @property
    def generated(self) -> Sequence[int]:
        """The token ids after the prompt, sampled and forced."""
        return self._generated

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to generate."""
        return self._reason is not None

    def prefilled(self, progress: PrefillProgress) -> Sequence[Event]:
        """A Prefill event."""
        self._watch.start_prefill()
        self._n_cached = progress.cached
        return (Prefill(progress.done, progress.total, progress.cached),)

    def next(self) -> Step:
        """Cut back, force tokens, sample, pause or end."""
        if self._steps:
            return self._steps.popleft()
        if self._reason is not None:
            return _END
        if not self._watch.has_prefilled:
            self._watch.start_decode()
            self._watch_for_loops()
        if self._control is not None:
            if self._control.is_paused:
                self._watch.pause()
                return _PAUSE
            self._watch.resume()
        return self._next_in_thinking() if self._text.is_thinking else self._next_in_answer()

    def took(self, tokens: Sequence[int], logprob: TokenLogprob | None = None) -> Sequence[Event]:
        """The events of one sampled token, or of the tokens of a Force."""
        if self._on_forced is not None:
            commit, self._on_forced = self._on_forced, None
            self._generated += tokens
            if self._report is not None:
                self._report.add(len(tokens), is_sampled=False)
            events = commit()
        elif self._text.is_thinking:
            events = self._took_in_thinking(tokens[0], logprob)
        else:
            events = self._took_in_answer(tokens[0], logprob)
        if self._held:
            events = [*self._held, *events]
            self._held = []
        if self._report is not None and self._report.is_due:
            return [*events, *self._reported()]
        return events

    def finish(self, *, is_stopped: bool = False) -> Sequence[Event]:
        """The last events; Finished is the very last."""
        self._watch.resume()
        reason = FinishReason.INTERRUPTED if is_stopped or self._reason is None else self._reason
        events, self._held = self._held, []
        if not (self._settings.wants_tokens and reason in _CAN_CONTINUE):
            events += self._text.flush()
        events += self._reported()
        if reason is FinishReason.STOP and not self._text.answer.strip():
            reason = FinishReason.NO_ANSWER
        return [*events, Finished(reason, self._stats(), self._text.thinking, self._text.answer)]

    def wait(self, seconds: float) -> bool:
        """Wait at most this long for the end of a pause."""
        return self._control is None or self._control.wait(seconds)

    # The thinking

    def _next_in_thinking(self) -> Step:
        limit = self._must_close or self._thinking_limit()
        if limit is None and self._control is not None:
            while (request := self._control.take()) is not None:
                if isinstance(request, AnswerNow):
                    limit = CloseReason.ASKED
                    break
                if (step := self._steer(sentence_of(request.text))) is not None:
                    return step
        return _FREE if limit is None else self._close(limit)

    def _thinking_limit(self, n_more: int = 0) -> CloseReason | None:
        """Why the thinking must end now, or after `n_more` tokens."""
        if self._text.thinking_tokens + n_more >= self._settings.thinking_budget:
            return CloseReason.BUDGET
        return CloseReason.CONTEXT if self._room - n_more <= self._reserved else None

    def _took_in_thinking(self, token: int, logprob: TokenLogprob | None) -> Sequence[Event]:
        if self._vocabulary.is_end(token):
            self._steps.append(CutBack(self._n_tokens))
            self._must_close = CloseReason.MODEL
            return [Notice("the model stopped inside its thinking; it was closed and asked to answer.")]
        piece, events, closed = self._text.feed(token)
        self._append(token, logprob)
        if closed:
            return [*events, *self._closed_by_model(token, piece)]
        if self._settings.loop_guard and (loop := self._guard.feed(token, piece)) is not None:
            self._cut(loop)
            self._must_close = CloseReason.LOOP
        return events

    def _closed_by_model(self, token: int, piece: str) -> list[Event]:
        """The model wrote </think>; under a constraint the answer begins with the next sampled token."""
        event = self._thinking_closed(CloseReason.MODEL)
        if self._settings.is_constrained:
            if piece.rpartition(CLOSE[-1])[2].strip():
                # The token holds text after the tag, which would escape the constraint.
                self._drop_from(self._n_tokens - 1)
                forced = self._closings.after(self._closings.tag())
            else:
                forced = self._closings.after([])
            self._text.enter_answer()
            self._steps.append(self._force(forced, self._enter_answer))
        else:
            self._enter_answer()
        return [event]

    def _close(self, reason: CloseReason) -> Step:
        """End the thinking with a sentence and the tag, in one decode."""
        closing = self._closings.tokens(reason)
        if len(closing) > self._room:
            self._reason = FinishReason.CONTEXT
            return _END

        def commit() -> Sequence[Event]:
            self._must_close = None
            events = self._text.close(reason)
            return [*events, self._thinking_closed(reason), *self._enter_answer()]

        return self._force(closing, commit)

    def _steer(self, sentence: str) -> Step | None:
        """Put a sentence into the thinking, if it fits; the loop guard restarts after it."""
        if not sentence:
            return None
        paragraph = self._text.paragraph(sentence)
        tokens = encode_plain("".join(paragraph), self._vocabulary)
        if self._thinking_limit(len(tokens)) is not None:
            size = f"{len(tokens):,} tokens"
            self._held.append(
                Notice(f"not steered: the sentence has {size}, and the thinking is too near its end.")
            )
            return None

        def commit() -> Sequence[Event]:
            events = self._text.steer(paragraph, len(tokens))
            self._watch_for_loops()
            return events

        return self._force(tokens, commit)

    # The answer

    def _enter_answer(self) -> Sequence[Event]:
        self._thinking_end = len(self._generated)
        self._watch_for_loops()
        return ()

    def _next_in_answer(self) -> Step:
        if self._control is not None:
            while (request := self._control.take()) is not None:
                if not isinstance(request, AnswerNow):
                    self._held.append(Notice("it answers already: there is no thinking left to steer."))
        if 0 < self._max_tokens <= self._text.answer_tokens:
            self._reason = FinishReason.MAX_TOKENS
        elif self._room <= 0:
            self._reason = FinishReason.CONTEXT
        else:
            return _CONSTRAINED if self._settings.is_constrained else _FREE
        return _END

    def _took_in_answer(self, token: int, logprob: TokenLogprob | None) -> Sequence[Event]:
        if self._vocabulary.is_end(token):
            self._reason = FinishReason.STOP
            is_unchanged = self._n_known and len(self._generated) == self._n_known
            return [_NOTHING_LEFT] if is_unchanged else []
        piece, events, _ = self._text.feed(token)
        self._append(token, logprob)
        if self._settings.loop_guard and (loop := self._guard.feed(token, piece)) is not None:
            # What was shown stays; the stored answer ends before the loop.
            self._cut(loop)
            self._reason = FinishReason.LOOP
        elif self._text.is_thinking:
            # The model thinks again before it has answered.
            self._thinking_end = None
            self._watch_for_loops()
        return events

    # Tokens

    @property
    def _n_tokens(self) -> int:
        return self._n_prompt + len(self._generated)

    @property
    def _room(self) -> int:
        """How many more tokens the window takes."""
        return self._settings.window - self._n_tokens

    def _append(self, token: int, logprob: TokenLogprob | None) -> None:
        self._generated.append(token)
        if self._report is not None:
            self._report.add(1, is_sampled=True, logprob=logprob)

    def _force(self, tokens: Sequence[int], commit: Callable[[], Sequence[Event]]) -> Step:
        """A step that forces tokens; `commit` runs once they are in the cache."""
        self._on_forced = commit
        return Force(tuple(tokens))

    def _cut(self, loop: Loop) -> None:
        """Drop a loop from the tokens and the text; its tokens stay counted."""
        self._drop_from(self._phase_start + self._n_prompt + loop.start)
        counts = self._text.thinking_tokens, self._text.answer_tokens
        self._text = self._new_transcript()
        self._text.replay(self._generated)
        self._text.thinking_tokens, self._text.answer_tokens = counts

    def _drop_from(self, n_tokens: int) -> None:
        n_kept = n_tokens - self._n_prompt
        del self._generated[n_kept:]
        self._n_known = 0
        if self._report is not None:
            self._report.cut(n_kept)
        self._steps.append(CutBack(n_tokens))

    def _watch_for_loops(self) -> None:
        """Start the loop guard where this stretch of thinking or answer began, also before an opening."""
        is_thinking = self._text.is_thinking
        self._guard = LoopGuard(LoopSettings.thinking() if is_thinking else LoopSettings.answer())
        self._phase_start = len(self._generated) - self._text.stretch
        if not self._settings.loop_guard:
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._generated[self._phase_start :]:
            # A loop that was let pass before is found again if it continues.
            self._guard.feed(token, decoder.decode(self._vocabulary.piece(token)))

    def _new_transcript(self) -> Transcript:
        return Transcript(self._vocabulary, self._closings, is_exact=self._settings.is_constrained)

    # Figures

    def _reported(self) -> Sequence[Event]:
        """The token ids that are new, if they are wanted."""
        if self._report is None or not self._watch.has_prefilled:
            return ()
        end = len(self._generated) if self._thinking_end is None else self._thinking_end
        generated = self._report.next(self._generated, end)
        return () if generated is None else (generated,)

    def _thinking_closed(self, reason: CloseReason) -> ThinkingClosed:
        return ThinkingClosed(reason, self._text.thinking_tokens, self._watch.decode_s)

    def _stats(self) -> TurnStats:
        return TurnStats(
            prompt_tokens=self._n_prompt,
            cached_tokens=min(self._n_cached, self._n_prompt),
            thinking_tokens=self._text.thinking_tokens,
            answer_tokens=self._text.answer_tokens,
            prefill_s=self._watch.prefill_s,
            decode_s=self._watch.decode_s,
            resumed_tokens=self._n_resumed,
            resumed_cached=min(max(0, self._n_cached - self._n_prompt), self._n_resumed),
        )


class _Stopwatch:
    """Seconds of prefill and of decode; pauses are not counted."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._prefill_started: float | None = None
        self._decode_started: float | None = None
        self._pause_started: float | None = None
        self._paused_s = 0.0

    def start_prefill(self) -> None:
        """The prefill begins, unless it has begun."""
        if self._prefill_started is None:
            self._prefill_started = self._clock()

    def start_decode(self) -> None:
        """The prefill is done."""
        self._decode_started = self._clock()

    def pause(self) -> None:
        """Stop counting."""
        if self._pause_started is None:
            self._pause_started = self._clock()

    def resume(self) -> None:
        """Count again."""
        if self._pause_started is not None:
            self._paused_s += self._clock() - self._pause_started
            self._pause_started = None

    @property
    def has_prefilled(self) -> bool:
        return self._decode_started is not None

    @property
    def prefill_s(self) -> float:
        if self._prefill_started is None:
            return 0.0
        end = self._clock() if self._decode_started is None else self._decode_started
        return end - self._prefill_started

    @property
    def decode_s(self) -> float:
        return 0.0 if self._decode_started is None else self._clock() - self._decode_started - self._paused_s


class _Report:
    """The generated tokens that were not reported yet, and when the next report is due."""

    def __init__(self, clock: Callable[[], float], n_known: int, *, has_logprobs: bool) -> None:
        self._clock = clock
        self._has_logprobs = has_logprobs
        self._n_reported = self._n_valid = n_known
        self._is_sampled: list[bool] = []
        self._logprobs: list[TokenLogprob | None] = []
        self._due_at = clock() + REPORT_INTERVAL_S

    @property
    def is_due(self) -> bool:
        return self._clock() >= self._due_at

    def add(self, n_tokens: int, *, is_sampled: bool, logprob: TokenLogprob | None = None) -> None:
        """Note tokens that were appended."""
        self._is_sampled += [is_sampled] * n_tokens
        self._logprobs += [logprob] * n_tokens

    def cut(self, n_generated: int) -> None:
        """Only the first `n_generated` tokens are left: what was reported after them is wrong."""
        n_kept = max(0, n_generated - self._n_valid)
        del self._is_sampled[n_kept:], self._logprobs[n_kept:]
        self._n_valid = min(self._n_valid, n_generated)

    def next(self, generated: Sequence[int], n_thinking: int) -> Generated | None:
        """The tokens that were not reported yet; None when nothing is new."""
        self._due_at = self._clock() + REPORT_INTERVAL_S
        start, end = self._n_valid, len(generated)
        if start == end == self._n_reported:
            return None
        self._n_reported = self._n_valid = end
        logprobs = tuple(self._logprobs) if self._has_logprobs else None
        event = Generated(start, tuple(generated[start:]), n_thinking, tuple(self._is_sampled), logprobs)
        self._is_sampled, self._logprobs = [], []
        return event
