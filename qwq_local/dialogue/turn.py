"""One turn: prompt token ids in, events out, over any Engine.

The turn prefills, samples the thinking, closes it when the model does or a limit says so, samples the
answer from the same KV cache, and tells why it ended. The reply is never empty: it has an answer, or
Finished says why not. Knows no terminal, no template and no llama.cpp.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from qwq_local.dialogue.loops import Loop, LoopGuard, LoopSettings
from qwq_local.dialogue.thinking import Closed, State, ThinkingParser
from qwq_local.engine.api import Aborted, Engine, Grammar, SamplerSettings
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
    TurnStats,
)

CLOSE_TAG = "</think>"
AFTER_CLOSE = "\n\n"
# Put into the model's mouth when its thinking is ended for it: the answer follows more readily.
CLOSING_SENTENCES = {
    CloseReason.BUDGET: "I have thought long enough. Time to give the answer.",
    CloseReason.CONTEXT: "There is no room left to think. Time to give the answer.",
    CloseReason.LOOP: "I am repeating myself. Time to give the answer.",
    CloseReason.MODEL: "",
}


@dataclass(frozen=True, slots=True)
class TurnSettings:
    """How a turn runs, in tokens. `max_tokens` 0 lets the answer go on to the end of the window."""

    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    thinking_budget: int = 16384
    answer_reserve: int = 2048
    max_tokens: int = 0
    loop_guard: bool = True
    grammar: Grammar | None = None


class _Ended(Exception):
    """The turn is over; carries the reason up to the one place that finishes it."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Turn:
    """A turn over an engine; `events` runs it once."""

    def __init__(
        self, engine: Engine, settings: TurnSettings, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._parser = ThinkingParser()
        self._decoder = _utf8_decoder()
        self._closing: dict[CloseReason, list[int]] = {}
        self._thinking: list[str] = []
        self._kept_thinking = 0  # pieces of an earlier phase of thinking, which a loop does not touch
        self._answer: list[str] = []
        self._answer_tokens: list[int] = []
        self._thinking_tokens = 0
        self._phase_start = 0  # where in the KV cache the thinking, later the answer, begins
        self._cached = self._prompt_tokens = 0
        self._began = self._decode_began = clock()

    def events(self, prompt: Sequence[int]) -> Iterator[Event]:
        """The events of the turn, Finished last. The engine's cache is consistent whenever it pauses."""
        self._prompt_tokens = len(prompt)
        try:
            yield from self._prefill(prompt)
            reopened = True
            while reopened:
                yield from self._think()
                reopened = yield from self._give_answer()
            reason = FinishReason.STOP
        except Aborted:
            reason = FinishReason.INTERRUPTED
        except _Ended as ended:
            reason = ended.reason
        yield from self._flush()
        if reason is FinishReason.STOP and not "".join(self._answer).strip():
            reason = FinishReason.NO_ANSWER
        yield Finished(reason, self._stats(), "".join(self._thinking), "".join(self._answer))

    def _prefill(self, prompt: Sequence[int]) -> Iterator[Event]:
        for progress in self._engine.prefill(prompt):
            self._cached = progress.cached
            yield Prefill(progress.done, progress.total, progress.cached)
        self._decode_began = self._clock()
        self._phase_start = len(self._engine.tokens)
        self._engine.start_sampling(self._settings.sampler)
        if self._settings.grammar is not None:
            self._settings.grammar.reset()

    def _think(self) -> Iterator[Event]:
        self._guard = LoopGuard(LoopSettings.thinking())
        self._phase_start = len(self._engine.tokens)
        self._kept_thinking = len(self._thinking)
        while True:
            limit = self._thinking_limit()
            if limit is not None:
                yield from self._close(limit)
                return
            token = self._engine.sample()
            if self._engine.vocabulary.is_end(token):
                yield Notice("the model stopped inside its thinking; it was closed and asked to answer.")
                yield from self._close(CloseReason.MODEL)
                return
            self._thinking_tokens += 1
            piece = self._decoder.decode(self._engine.vocabulary.piece(token))
            events, closed = self._take(piece)
            yield from events
            if closed:
                yield from self._closed_by_model(token, piece)
                return
            loop = self._guard.feed(token, piece) if self._settings.loop_guard else None
            self._engine.append(token)
            if loop is not None:
                yield from self._cut_thinking(loop)
                return

    def _thinking_limit(self) -> CloseReason | None:
        if self._thinking_tokens >= self._settings.thinking_budget:
            return CloseReason.BUDGET
        room = self._engine.settings.n_ctx - len(self._engine.tokens)
        closing = len(self._closing_tokens(CloseReason.CONTEXT))
        return CloseReason.CONTEXT if room <= self._settings.answer_reserve + closing else None

    def _closed_by_model(self, token: int, piece: str) -> Iterator[Event]:
        """The model wrote </think>: under a grammar, only what is sampled from here on counts."""
        yield self._thinking_closed(CloseReason.MODEL)
        if self._settings.grammar is None:
            self._engine.append(token)
        else:
            _, _, after = piece.rpartition(CLOSE_TAG[-1])
            close = self._encode(CLOSE_TAG) if after.strip() else [token]
            self._force([*close, *self._encode(AFTER_CLOSE)])
            self._parser = ThinkingParser(State.ANSWER)
        self._phase_start = len(self._engine.tokens)

    def _cut_thinking(self, loop: Loop) -> Iterator[Event]:
        self._engine.truncate(self._phase_start + loop.start)
        kept = self._text_of(self._engine.tokens[self._phase_start :])
        parser = ThinkingParser()
        events = [*parser.feed(kept), *parser.flush()]
        self._thinking[self._kept_thinking :] = [
            event.text for event in events if isinstance(event, Thinking)
        ]
        self._parser, self._decoder = ThinkingParser(), _utf8_decoder()
        yield from self._close(CloseReason.LOOP)

    def _close(self, reason: CloseReason) -> Iterator[Event]:
        """End the thinking for the model, with a sentence of its own and the tag, in one decode."""
        for event in self._parser.flush():
            yield from self._record(event)
        sentence = CLOSING_SENTENCES[reason]
        if sentence:
            text = f"\n\n{sentence}\n" if self._thinking else f"{sentence}\n"
            self._thinking.append(text)
            yield Thinking(text)
        self._force(self._closing_tokens(reason))
        self._parser = ThinkingParser(State.ANSWER)
        self._decoder = _utf8_decoder()
        self._phase_start = len(self._engine.tokens)
        yield self._thinking_closed(reason)

    def _closing_tokens(self, reason: CloseReason) -> list[int]:
        if reason not in self._closing:
            sentence = CLOSING_SENTENCES[reason]
            tag = self._engine.vocabulary.special_tokens.get(CLOSE_TAG)
            before = self._encode(f"\n\n{sentence}\n" if sentence else "\n")
            close = self._encode(CLOSE_TAG) if tag is None else [tag]
            self._closing[reason] = [*before, *close, *self._encode(AFTER_CLOSE)]
        return self._closing[reason]

    def _give_answer(self) -> Generator[Event, None, bool]:
        """The events of the answer; returns whether the model went back to thinking before it began."""
        self._guard = LoopGuard(LoopSettings.answer())
        while True:
            if self._settings.max_tokens and len(self._answer_tokens) >= self._settings.max_tokens:
                raise _Ended(FinishReason.MAX_TOKENS)
            if len(self._engine.tokens) >= self._engine.settings.n_ctx:
                raise _Ended(FinishReason.CONTEXT)
            token = self._engine.sample(self._settings.grammar)
            if self._engine.vocabulary.is_end(token):
                return False
            self._answer_tokens.append(token)
            piece = self._decoder.decode(self._engine.vocabulary.piece(token))
            events, _ = self._take(piece)
            yield from events
            loop = self._guard.feed(token, piece) if self._settings.loop_guard else None
            if loop is not None:
                self._cut_answer(loop)
                raise _Ended(FinishReason.LOOP)
            self._engine.append(token)
            if self._parser.state is State.THINKING:
                self._thinking_tokens += len(self._answer_tokens)
                self._answer_tokens.clear()
                return True

    def _cut_answer(self, loop: Loop) -> None:
        """What was printed stays; what is stored ends before the loop."""
        self._engine.truncate(self._phase_start + loop.start)
        parser = ThinkingParser(State.ANSWER)
        kept = self._text_of(self._answer_tokens[: loop.start])
        events = [*parser.feed(kept), *parser.flush()]
        self._answer = [event.text for event in events if isinstance(event, Answer)]
        self._parser = ThinkingParser(State.ANSWER)
        self._decoder = _utf8_decoder()

    def _take(self, piece: str) -> tuple[list[Event], bool]:
        """The events of a piece of text, recorded; and whether the thinking closed in it."""
        if self._settings.grammar is not None and self._parser.state is State.ANSWER:
            # Under a grammar nothing is dropped: a tag there is the content of a string.
            return (list(self._record(Answer(piece))) if piece else []), False
        events: list[Event] = []
        closed = False
        for event in self._parser.feed(piece):
            if isinstance(event, Closed):
                closed = True
            elif not (closed and self._settings.grammar is not None):
                events.extend(self._record(event))
        return events, closed

    def _record(self, event: Thinking | Answer | Closed) -> Iterator[Event]:
        if isinstance(event, Thinking):
            self._thinking.append(event.text)
            yield event
        elif isinstance(event, Answer):
            self._answer.append(event.text)
            yield event

    def _flush(self) -> Iterator[Event]:
        for event in [*self._parser.feed(self._decoder.decode(b"", True)), *self._parser.flush()]:
            yield from self._record(event)

    def _force(self, tokens: Sequence[int]) -> None:
        """Put tokens that were not sampled into the cache, in one batch."""
        for _ in self._engine.prefill([*self._engine.tokens, *tokens]):
            pass

    def _encode(self, text: str) -> list[int]:
        return self._engine.vocabulary.encode_text(text)

    def _text_of(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._engine.vocabulary.piece, tokens)).decode("utf-8", "replace")

    def _thinking_closed(self, reason: CloseReason) -> ThinkingClosed:
        return ThinkingClosed(reason, self._thinking_tokens, self._clock() - self._decode_began)

    def _stats(self) -> TurnStats:
        now = self._clock()
        prefilled = self._decode_began if self._phase_start else now
        return TurnStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            thinking_tokens=self._thinking_tokens,
            answer_tokens=len(self._answer_tokens),
            prefill_s=prefilled - self._began,
            decode_s=now - prefilled,
        )


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")
