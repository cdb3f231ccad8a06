"""The text of a reply: tokens become thinking and answer, piece by piece and as a whole.

The transcript is a function of the tokens: sampled and forced tokens give the same text when they are read
again. It also knows how the program ends a thinking: with a sentence and the closing tag.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.prompts.segments import encode_plain
from qwq_local.dialogue.thinking import CLOSE, Closed, ThinkingParser
from qwq_local.engine.api import Vocabulary
from qwq_local.events import Answer, CloseReason, Event, Steered, Thinking

_BLANK_LINE = "\n\n"
_SMALLEST_SHARE = 4  # a continued answer gets at least this part of its reserve again
# The thinking ends with this sentence when the program ends it: the model then answers more readily.
CLOSING_SENTENCES = {
    CloseReason.BUDGET: "I have thought long enough. Time to give the answer.",
    CloseReason.CONTEXT: "There is no room left to think. Time to give the answer.",
    CloseReason.LOOP: "I am repeating myself. Time to give the answer.",
    CloseReason.ASKED: "I am asked to answer now. Time to give the answer.",
    CloseReason.MODEL: "",
}


def closing_text(reason: CloseReason) -> str:
    """What the thinking ends with, before the tag."""
    sentence = CLOSING_SENTENCES[reason]
    return f"\n\n{sentence}\n" if sentence else "\n"


class Closings:
    """The token ids of every closing under one vocabulary, encoded once each."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens: dict[CloseReason, tuple[int, ...]] = {}
        self._longest = 0

    @property
    def longest(self) -> int:
        """The tokens of the longest closing: so much room ends any thinking."""
        if not self._longest:
            self._longest = max(len(self.tokens(reason)) for reason in CLOSING_SENTENCES)
        return self._longest

    def tokens(self, reason: CloseReason) -> tuple[int, ...]:
        """The sentence, the tag, and the blank line after it."""
        if reason not in self._tokens:
            tag = self._vocabulary.special_tokens.get(CLOSE)
            close = self._encode(CLOSE) if tag is None else [tag]
            tokens = (*self._encode(closing_text(reason)), *close, *self._encode(_BLANK_LINE))
            self._tokens[reason] = tokens
        return self._tokens[reason]

    def after(self, tag: Sequence[int]) -> list[int]:
        """The tag as it was written, and the blank line after it."""
        return [*tag, *self._encode(_BLANK_LINE)]

    def tag(self) -> list[int]:
        """The tag in plain tokens, for a thinking that the model ended in the middle of one."""
        return self._encode(CLOSE)

    def found(self, tokens: Sequence[int], at: int) -> CloseReason | None:
        """The closing with a sentence that stands in `tokens` at a position, if any."""
        for reason, sentence in CLOSING_SENTENCES.items():
            if sentence:
                closing = self.tokens(reason)
                if tokens[at] == closing[0] and tuple(tokens[at : at + len(closing)]) == closing:
                    return reason
        return None

    def _encode(self, text: str) -> list[int]:
        return self._vocabulary.encode_text(text)


class Transcript:
    """The reply so far. With `is_exact`, for an answer under a constraint, a tag in the answer is content.

    `thinking_tokens` and `answer_tokens` count what was fed or steered, but not a closing sentence. `stretch`
    counts the tokens that the loop guard watches: those since the thinking or the answer began, or since a
    sentence was put in.
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
        return self._parser.is_thinking

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
        """End the thinking with the sentence for this reason, or as the model would."""
        held = self.flush()
        if not CLOSING_SENTENCES[reason]:
            return [*held, *self._closed_without_words(reason)]
        events, _ = self._parsed(closing_text(reason))
        self.enter_answer()
        return [*held, *events]

    def enter_answer(self) -> None:
        """The answer begins here."""
        self.stretch = 0
        self._parser = ThinkingParser(is_thinking=False)
        self._decoder = _utf8_decoder()

    def paragraph(self, sentence: str) -> tuple[str, str, str]:
        """A sentence, and the newlines before and after it that make it a paragraph of the thinking."""
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
        """Read tokens again that were sampled or forced before; returns how many belong to the thinking.

        `steered` are the sentences among them that the user put in, in order.
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
        """Read the closing or the steered sentence at a position, if there is one; returns its tokens."""
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
        """These tokens look like the model's own, so they count as such: a replay cannot tell either."""
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


def planned_prompt_tokens(
    opening: Opening, vocabulary: Vocabulary, thinking_budget: int, answer_reserve: int
) -> int:
    """The prompt length, in tokens, to plan for when a reply continues: what was generated and the rest fit.

    While the budgets hold it is the length of the prompt itself, so the plan and its rope scaling stay the
    same. The rest of an answer is what its reserve has left, at least a quarter of the reserve.
    """
    transcript = Transcript(vocabulary, Closings(vocabulary), is_exact=False)
    transcript.replay(opening.generated)
    rest = max(answer_reserve - transcript.answer_tokens, answer_reserve // _SMALLEST_SHARE)
    if transcript.is_thinking:
        rest += max(0, thinking_budget - transcript.thinking_tokens)
    excess = len(opening.generated) + rest - thinking_budget - answer_reserve
    return len(opening.prompt) + max(0, excess)
