"""How a thinking is ended for the model: a sentence of its own and the tag, as text and as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from qwq_local.dialogue.thinking import CLOSE
from qwq_local.engine.api import Vocabulary
from qwq_local.events import CloseReason

AFTER_CLOSE = "\n\n"
# Put into the model's mouth when its thinking is ended for it: the answer follows more readily.
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
            tokens = (*self._encode(closing_text(reason)), *close, *self._encode(AFTER_CLOSE))
            self._tokens[reason] = tokens
        return self._tokens[reason]

    def after(self, tag: Sequence[int]) -> list[int]:
        """The tag as it was written, and the blank line after it."""
        return [*tag, *self._encode(AFTER_CLOSE)]

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
