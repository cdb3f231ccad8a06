"""Tokens in, thinking and answer out, piece by piece and whole; what a turn has said so far.

A transcript is a function of its tokens: those that were sampled and those that were forced come to the same
text when they are read again. Knows no engine, no limits and no clock.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

from qwq_local.dialogue.closing import CLOSING_SENTENCES, Closings, closing_text
from qwq_local.dialogue.prompts.segments import encode_plain
from qwq_local.dialogue.thinking import Closed, State, ThinkingParser
from qwq_local.engine.api import Vocabulary
from qwq_local.events import Answer, CloseReason, Event, Steered, Thinking

_BLANK_LINE = "\n\n"


class Transcript:
    """The reply so far. `is_exact`, for an answer under a grammar: a tag in it is content.

    `thinking_tokens` and `answer_tokens` count what was fed or steered; a closing sentence is nobody's.
    `stretch` counts what the loop guard watches: the tokens since the thinking or the answer began, or since
    a sentence was put into it.
    """

    def __init__(self, vocabulary: Vocabulary, closings: Closings, *, is_exact: bool) -> None:
        self._vocabulary = vocabulary
        self._closings = closings
        self._is_exact = is_exact
        self._parser = ThinkingParser()
        self._decoder = _utf8_decoder()
        self._thinking: list[str] = []
        self._answer: list[str] = []
        self.thinking_tokens = self.answer_tokens = self.stretch = 0

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next belongs to the thinking."""
        return self._parser.state is State.THINKING

    @property
    def thinking(self) -> str:
        """The whole thinking."""
        return "".join(self._thinking)

    @property
    def answer(self) -> str:
        """The whole answer."""
        return "".join(self._answer)

    def feed(self, token: int) -> tuple[str, Sequence[Event], bool]:
        """The text of the next token, the events that are certain now, and whether the thinking closed in it.

        When the thinking goes on after a close, before anything was answered, what came between is its.
        """
        was_thinking = self.is_thinking
        if was_thinking:
            self.thinking_tokens += 1
        else:
            self.answer_tokens += 1
        self.stretch += 1
        piece = self._decoder.decode(self._vocabulary.piece(token))
        if self._is_exact and not was_thinking:
            return piece, self._answered(piece), False
        events, closed = self._parsed(piece)
        is_opened = not was_thinking and self.is_thinking
        if is_opened:
            self.thinking_tokens += self.answer_tokens
            self.answer_tokens = 0
        if closed or is_opened:
            self.stretch = 0
        return piece, events, closed

    def flush(self) -> Sequence[Event]:
        """What was held back, at the end: half a character, or what might have become a tag."""
        events, _ = self._parsed(self._decoder.decode(b"", True))
        self._decoder = _utf8_decoder()
        for part in self._parser.flush():
            events += self._recorded(part)
        return events

    def close(self, reason: CloseReason) -> Sequence[Event]:
        """End the thinking with our sentence, or as the model would have."""
        held = self.flush()
        if not CLOSING_SENTENCES[reason]:
            return [*held, *self._closed_without_words(reason)]
        events, _ = self._parsed(closing_text(reason))
        self.enter_answer()
        return [*held, *events]

    def enter_answer(self) -> None:
        """What comes next is the answer's."""
        self.stretch = 0
        self._parser = ThinkingParser(State.ANSWER)
        self._decoder = _utf8_decoder()

    def paragraph(self, sentence: str) -> tuple[str, str, str]:
        """A sentence with the newlines before and after that part it from the thinking."""
        if self._parser.is_holding or self._decoder.getstate()[0]:
            return _BLANK_LINE, sentence, _BLANK_LINE
        end = "".join(self._thinking[-2:])
        n_newlines = len(end) - len(end.rstrip("\n"))
        return (_BLANK_LINE[n_newlines:] if end else ""), sentence, _BLANK_LINE

    def steer(self, paragraph: tuple[str, str, str], n_tokens: int) -> Sequence[Event]:
        """Put a paragraph of `n_tokens`, which holds no tag, into the thinking, after what was held back."""
        before, sentence, after = paragraph
        self.thinking_tokens += n_tokens
        held = self.flush()
        events, _ = self._parsed(before)
        # The parser reads it too, so that it knows where it is; it ends with nothing to be held back.
        self._parser.feed(sentence + after)
        self._thinking += sentence, after
        self.stretch = 0
        return [*held, *events, Steered(sentence), Thinking(after)]

    def replay(self, tokens: Sequence[int], steered: Sequence[str] = ()) -> int:
        """Read tokens again that were sampled or forced before; how many of them are the thinking's.

        `steered` are the sentences that were put into them, in order.
        """
        sentences = deque(steered)
        encode = cache(lambda text: tuple(encode_plain(text, self._vocabulary)))
        n_after = len(self._closings.after([]))
        at = n_thinking = 0
        while at < len(tokens):
            if self.is_thinking and (n_forced := self._forced(tokens, at, sentences, encode)):
                at += n_forced
                n_thinking = at
                continue
            _, _, closed = self.feed(tokens[at])
            at += 1
            if closed and self._is_exact:
                self.enter_answer()
                at += n_after
            if closed or self.is_thinking:
                n_thinking = at
        return n_thinking

    def _forced(
        self,
        tokens: Sequence[int],
        at: int,
        steered: deque[str],
        encode: Callable[[str], tuple[int, ...]],
    ) -> int:
        """Take what was put into the thinking at a position, if anything was; how many tokens that are."""
        if (reason := self._closings.found(tokens, at)) is not None:
            self.close(reason)
            return len(self._closings.tokens(reason))
        if steered:
            paragraph = self.paragraph(steered[0])
            ids = encode("".join(paragraph))
            if tuple(tokens[at : at + len(ids)]) == ids:
                steered.popleft()
                self.steer(paragraph, len(ids))
                return len(ids)
        return 0

    def _closed_without_words(self, reason: CloseReason) -> Sequence[Event]:
        """These tokens might be the model's own, and nobody could tell them apart later."""
        shown: list[Event] = []
        for token in self._closings.tokens(reason):
            _, events, closed = self.feed(token)
            shown += events
            if closed and self._is_exact:
                self.enter_answer()
                break
        return shown

    def _parsed(self, piece: str) -> tuple[list[Event], bool]:
        events: list[Event] = []
        closed = False
        for part in self._parser.feed(piece):
            if isinstance(part, Closed):
                closed = True
            elif not (closed and self._is_exact):
                events += self._recorded(part)
        return events, closed

    def _answered(self, piece: str) -> list[Event]:
        return self._recorded(Answer(piece)) if piece else []

    def _recorded(self, part: Thinking | Answer | Closed) -> list[Event]:
        if isinstance(part, Thinking):
            self._thinking.append(part.text)
            return [part]
        if isinstance(part, Answer):
            self._answer.append(part.text)
            return [part]
        return []


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")
