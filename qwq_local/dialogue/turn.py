"""One turn: prompt token ids in, events out, over any Engine.

The turn prefills, samples the thinking, closes it when the model does, a limit says so or a person asks,
samples the answer from the same KV cache, and tells why it ended. It may go on from where an earlier one
ended. The reply is never empty: it has an answer, or Finished says why not. Knows no terminal, no template
and no llama.cpp.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from qwq_local.dialogue.closing import Closings
from qwq_local.dialogue.control import AnswerNow, Opening, TurnControl, sentence_of
from qwq_local.dialogue.limits import Limits, TurnSettings
from qwq_local.dialogue.loops import Loop, LoopGuard, LoopSettings
from qwq_local.dialogue.prompts.segments import encode_plain
from qwq_local.dialogue.stopwatch import Stopwatch
from qwq_local.dialogue.telling import Telling
from qwq_local.dialogue.thinking import CLOSE
from qwq_local.dialogue.transcript import Transcript
from qwq_local.engine.api import Aborted, AbortFlag, Engine
from qwq_local.events import (
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Notice,
    Prefill,
    ThinkingClosed,
    TurnStats,
)

__all__ = ["Turn", "TurnSettings"]

_NO_FLAG = AbortFlag()
_NOTHING_LEFT = Notice("there is nothing to go on with: the answer had come to its end.")
# What ended so may be gone on with: what is held back waits for its rest.
_CAN_GO_ON = (FinishReason.INTERRUPTED, FinishReason.MAX_TOKENS, FinishReason.CONTEXT)


class _Ended(Exception):
    """The turn is over; carries the reason up to the one place that finishes it."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Turn:
    """A turn over an engine; `events` runs it once. `abort` is what the engine is stopped by."""

    def __init__(
        self,
        engine: Engine,
        settings: TurnSettings,
        clock: Callable[[], float] = time.perf_counter,
        control: TurnControl | None = None,
        abort: AbortFlag = _NO_FLAG,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._control = control
        self._abort = abort
        self._closings = Closings(engine.vocabulary)
        self._text = self._new_transcript()
        self._limits = Limits(engine, settings, self._closings)
        self._watch = Stopwatch(clock)
        self._telling: Telling | None = None
        self._pending: tuple[int, ...] = ()  # sampled and shown, but not cached yet
        self._n_prompt = self._n_known = self._cached = 0
        self._n_resumed = 0  # thinking and answer tokens of an earlier turn
        self._phase_start = 0  # where in the KV cache the guard began to watch
        self._thinking_end: int | None = None  # where in the KV cache the answer begins

    def events(self, prompt: Sequence[int], opening: Opening | None = None) -> Iterator[Event]:
        """The events of the turn, Finished last. The engine's cache is consistent whenever it pauses.

        With an opening over the same prompt it goes on from there: events tell what is new, Finished has
        the whole; budgets, penalties and the loop guard know the whole. Only the seed begins anew.
        """
        opening = opening or Opening(tuple(prompt), ())
        generated = opening.generated
        has_ended = bool(generated) and self._engine.vocabulary.is_end(generated[-1])
        self._take_up(len(prompt), generated[:-1] if has_ended else generated, opening.steered)
        reason = FinishReason.STOP
        try:
            if has_ended:
                yield _NOTHING_LEFT
            else:
                yield from self._prefill([*prompt, *generated])
                yield from self._reply()
        except Aborted:
            reason = FinishReason.INTERRUPTED
        except _Ended as ended:
            reason = ended.reason
        if not (self._settings.wants_tokens and reason in _CAN_GO_ON):
            yield from self._text.flush()
        yield from self._told()
        if reason is FinishReason.STOP and not self._text.answer.strip():
            reason = FinishReason.NO_ANSWER
        yield Finished(reason, self._stats(), self._text.thinking, self._text.answer)

    def _take_up(self, n_prompt: int, generated: Sequence[int], steered: Sequence[str]) -> None:
        """Be where the tokens after the prompt leave off."""
        self._n_prompt, self._n_known = n_prompt, len(generated)
        n_thinking = self._text.replay(generated, steered)
        n_answer = self._text.answer_tokens
        self._n_resumed = self._text.thinking_tokens + n_answer
        self._limits = Limits(self._engine, self._settings, self._closings, n_answer)
        if self._settings.wants_tokens:
            self._telling = Telling(self._clock, n_prompt, len(generated))
        if not self._text.is_thinking:
            self._thinking_end = n_prompt + n_thinking

    def _prefill(self, tokens: Sequence[int]) -> Iterator[Event]:
        for progress in self._engine.prefill(tokens):
            self._cached = progress.cached
            yield Prefill(progress.done, progress.total, progress.cached)
        self._watch.decodes()
        self._engine.start_sampling(self._settings.sampler)
        self._remember()
        if self._settings.grammar is not None:
            self._settings.grammar.reset()

    def _reply(self) -> Iterator[Event]:
        """Thinking and answer; the model may go back to thinking before it answers."""
        goes_on = True
        while goes_on:
            if self._text.is_thinking:
                yield from self._think()
                self._thinking_end = len(self._engine.tokens)
            goes_on = yield from self._give_answer()

    def _think(self) -> Iterator[Event]:
        self._enter_thinking()
        while True:
            limit = self._limits.of_thinking(self._text.thinking_tokens)
            if limit is None and self._control is not None and self._control.is_wanted:
                limit = yield from self._heed(self._control)
            if limit is not None:
                yield from self._close(limit)
                return
            token = self._engine.sample()
            if self._engine.vocabulary.is_end(token):
                yield Notice("the model stopped inside its thinking; it was closed and asked to answer.")
                yield from self._close(CloseReason.MODEL)
                return
            self._pending = (token,)
            piece, events, closed = self._text.feed(token)
            yield from events
            if closed:
                yield from self._closed_by_model(token, piece)
                return
            loop = self._guard.feed(token, piece) if self._settings.loop_guard else None
            self._append(token)
            if loop is not None:
                self._cut(loop)
                yield from self._close(CloseReason.LOOP)
                return
            if self._telling is not None and self._telling.is_due:
                yield from self._told()

    def _enter_thinking(self) -> None:
        self._watch_for_loops(LoopSettings.thinking())
        self._thinking_end = None

    def _watch_for_loops(self, settings: LoopSettings) -> None:
        """Let the guard watch from where this stretch began: here, or in what there was before the turn."""
        self._guard = LoopGuard(settings)
        self._phase_start = len(self._engine.tokens) - self._text.stretch
        if not self._settings.loop_guard:
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._engine.tokens[self._phase_start :]:
            # A loop that is there already was let pass: it is found again if it goes on.
            self._guard.feed(token, decoder.decode(self._engine.vocabulary.piece(token)))

    def _heed(self, control: TurnControl) -> Generator[Event, None, CloseReason | None]:
        """Wait for the end of a pause, then do what is wanted; returns ASKED when that ends the thinking."""
        self._watch.wait(control, self._abort)
        while (wish := control.take()) is not None:
            if isinstance(wish, AnswerNow):
                return CloseReason.ASKED
            yield from self._steer(sentence_of(wish.text))
        return None

    def _steer(self, sentence: str) -> Iterator[Event]:
        """Put a sentence into the thinking, where it fits; the loop guard begins anew after it."""
        if not sentence:
            return
        paragraph = self._text.paragraph(sentence)
        tokens = encode_plain("".join(paragraph), self._engine.vocabulary)
        if self._limits.of_thinking(self._text.thinking_tokens, len(tokens)) is not None:
            yield Notice(
                f"not steered: the sentence has {len(tokens):,} tokens, and the thinking is too near its end."
            )
            return
        self._force(tokens)
        yield from self._text.steer(paragraph, len(tokens))
        self._enter_thinking()

    def _closed_by_model(self, token: int, piece: str) -> Iterator[Event]:
        """The model wrote </think>: under a grammar, only what is sampled from here on counts."""
        yield self._thinking_closed(CloseReason.MODEL)
        if self._settings.grammar is None:
            self._append(token)
            return
        _, _, after = piece.rpartition(CLOSE[-1])
        close = self._closings.tag() if after.strip() else [token]
        self._force(self._closings.after(close))
        self._text.enter_answer()

    def _close(self, reason: CloseReason) -> Iterator[Event]:
        """End the thinking for the model, with a sentence of its own and the tag, in one decode."""
        closing = self._closings.tokens(reason)
        if len(closing) > self._limits.room:
            raise _Ended(FinishReason.CONTEXT)
        self._force(closing)
        yield from self._text.close(reason)
        yield self._thinking_closed(reason)

    def _give_answer(self) -> Generator[Event, None, bool]:
        """The events of the answer; returns whether the model went back to thinking before it began."""
        self._watch_for_loops(LoopSettings.answer())
        while True:
            if self._control is not None and self._control.is_wanted:
                yield from self._decline(self._control)
            limit = self._limits.of_answer(self._text.answer_tokens)
            if limit is not None:
                raise _Ended(limit)
            token = self._engine.sample(self._settings.grammar)
            if self._engine.vocabulary.is_end(token):
                if self._n_known and len(self._engine.tokens) == self._n_prompt + self._n_known:
                    yield _NOTHING_LEFT
                return False
            self._pending = (token,)
            piece, events, _ = self._text.feed(token)
            yield from events
            loop = self._guard.feed(token, piece) if self._settings.loop_guard else None
            self._append(token)
            if loop is not None:
                # What was shown stays; what is kept ends before the loop.
                self._cut(loop)
                raise _Ended(FinishReason.LOOP)
            if self._text.is_thinking:
                return True
            if self._telling is not None and self._telling.is_due:
                yield from self._told()

    def _decline(self, control: TurnControl) -> Iterator[Event]:
        self._watch.wait(control, self._abort)
        while (wish := control.take()) is not None:
            if not isinstance(wish, AnswerNow):
                yield Notice("it answers already: there is no thinking left to steer.")

    def _append(self, token: int) -> None:
        self._engine.append(token)
        self._pending = ()

    def _force(self, tokens: Sequence[int]) -> None:
        """Put tokens that were not sampled into the cache, in one batch: all of them or none."""
        n_before = len(self._engine.tokens)
        try:
            for _ in self._engine.prefill([*self._engine.tokens, *tokens]):
                pass
        except Aborted:
            self._engine.truncate(n_before)
            raise
        self._pending = ()
        self._remember()

    def _remember(self) -> None:
        """Let penalties look back at what follows the prompt, put in or sampled, and at nothing else.

        So they are a function of the tokens, as the text is, and nothing is lost when another turn goes on.
        """
        self._engine.remember(self._engine.tokens[self._n_prompt :])

    def _cut(self, loop: Loop) -> None:
        """Drop a loop from the cache and from the text; the tokens that it took stay counted."""
        n_tokens = self._phase_start + loop.start
        self._engine.truncate(n_tokens)
        self._n_known = 0
        if self._telling is not None:
            self._telling.cut(n_tokens)
        counts = self._text.thinking_tokens, self._text.answer_tokens
        self._text = self._new_transcript()
        self._text.replay(self._engine.tokens[self._n_prompt :])
        self._text.thinking_tokens, self._text.answer_tokens = counts

    def _new_transcript(self) -> Transcript:
        is_exact = self._settings.grammar is not None
        return Transcript(self._engine.vocabulary, self._closings, is_exact=is_exact)

    def _told(self) -> Iterator[Event]:
        """The token ids that are new, for whoever wants them."""
        if self._telling is None or not self._watch.has_prefilled:
            return
        tokens = [*self._engine.tokens, *self._pending] if self._pending else self._engine.tokens
        end = self._thinking_end or len(tokens)
        generated = self._telling.next(tokens, end - self._n_prompt)
        if generated is not None:
            yield generated

    def _thinking_closed(self, reason: CloseReason) -> ThinkingClosed:
        return ThinkingClosed(reason, self._text.thinking_tokens, self._watch.decode_s)

    def _stats(self) -> TurnStats:
        return TurnStats(
            prompt_tokens=self._n_prompt,
            cached_tokens=min(self._cached, self._n_prompt),
            thinking_tokens=self._text.thinking_tokens,
            answer_tokens=self._text.answer_tokens,
            prefill_s=self._watch.prefill_s,
            decode_s=self._watch.decode_s,
            resumed_tokens=self._n_resumed,
            resumed_cached=min(max(0, self._cached - self._n_prompt), self._n_resumed),
        )
