"""Splits the text of a reply into thinking and answer, however the text is cut into pieces.

QwQ's prompt ends with `<think>\\n`, so the text starts inside the thinking and only `</think>` arrives. The
rules:

- thinking: `<think>` is swallowed (a package whose prompt lacks it, or a model that says it twice), the
  first `</think>` closes; leading whitespace goes;
- after the close, until the first visible character: whitespace and another `</think>` are swallowed, and
  `<think>` opens the thinking again;
- answer: everything is text, except a `</think>` that nothing opened and no code quotes: that is a leak,
  not a word, and it goes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwq_local.events import Answer, Thinking

OPEN = "<think>"
CLOSE = "</think>"
_TAG = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Closed:
    """The thinking ended exactly here."""


Part = Thinking | Answer | Closed


@dataclass(slots=True)
class CodeTracker:
    """Whether the text read so far ends inside Markdown code: a fenced block or an inline span.

    One pass, a few words of memory. An inline span that never closes ends at the next blank line.
    """

    _fence: str = ""  # the character that the block was opened with, and how often
    _fence_length: int = 0
    _on_opening_line: bool = False
    _closing: bool = False  # a closing fence came, and only blanks after it
    _ticks: int = 0  # length of the run that opened the inline span
    _blank: bool = True  # nothing but whitespace on this line yet
    _run: str = ""  # the backtick or tilde being read, how often, whether first on its line
    _run_length: int = 0
    _run_leads: bool = False

    def inside(self) -> bool:
        """Whether anything but a further backtick or tilde would be code here."""
        self._settle()
        return bool(self._ticks or (self._fence and not self._closing))

    def feed(self, text: str) -> None:
        """Read on."""
        for char in text:
            if char == self._run:
                self._run_length += 1
                continue
            if self._run:
                self._settle()
            if char in "`~":
                self._run, self._run_length, self._run_leads = char, 1, self._blank
                self._blank = self._closing = False
            elif char == "\n":
                self._end_line()
            elif not char.isspace():
                self._blank = self._closing = False

    def _settle(self) -> None:
        char, length = self._run, self._run_length
        self._run = ""
        if not char:
            return
        if self._fence and not self._on_opening_line:
            self._closing = self._run_leads and char == self._fence and length >= self._fence_length
        elif self._fence:
            # No backtick may follow a backtick fence on its line: it was an inline span after all.
            if char == self._fence == "`":
                self._ticks = 0 if length == self._fence_length else self._fence_length
                self._fence = ""
        elif self._run_leads and length >= 3:
            self._fence, self._fence_length = char, length
            self._on_opening_line, self._ticks = True, 0
        elif char == "`" and not self._ticks:
            self._ticks = length
        elif char == "`" and length == self._ticks:
            self._ticks = 0

    def _end_line(self) -> None:
        if self._closing:
            self._fence = ""
        if self._blank:
            self._ticks = 0
        self._on_opening_line = self._closing = False
        self._blank = True


class ThinkingParser:
    """Splits a reply that arrives in pieces into thinking and answer.

    Parts of one kind, joined, and the places of the Closed markers are the same for every way of cutting
    the same text. At most seven characters are held back, so the work is linear. `is_thinking` is true until
    `</think>` came; still true after `flush` when it never did.
    """

    def __init__(self, *, is_thinking: bool = True) -> None:
        self.is_thinking = is_thinking
        self._at_start = True  # nothing visible yet in this part
        self._held = ""  # what may be the beginning of a tag
        self._code = CodeTracker()
        self._open_tags = 0  # `<think>` written as text in the answer

    @property
    def is_holding(self) -> bool:
        """Whether something is held back that may become a tag."""
        return bool(self._held)

    def feed(self, text: str) -> list[Part]:
        """What is certain after these further characters, in order; no part is empty."""
        parts: list[Part] = []
        if not self._held and "<" not in text:
            self._take_text(text, parts)
            return parts
        text = self._held + text
        end = 0
        for match in _TAG.finditer(text):
            self._take_text(text[end : match.start()], parts)
            self._take_tag(match.group(), parts)
            end = match.end()
        keep = _tag_start(text, end)
        self._held = text[keep:]
        self._take_text(text[end:keep], parts)
        return parts

    def flush(self) -> list[Part]:
        """What was held back, at the end of the text."""
        parts: list[Part] = []
        self._take_text(self._held, parts)
        self._held = ""
        return parts

    def _take_text(self, text: str, parts: list[Part]) -> None:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return
        self._at_start = False
        if self.is_thinking:
            parts.append(Thinking(text))
        else:
            self._code.feed(text)
            parts.append(Answer(text))

    def _take_tag(self, tag: str, parts: list[Part]) -> None:
        if self.is_thinking:
            if tag == CLOSE:
                self.is_thinking, self._at_start = False, True
                parts.append(Closed())
        elif self._at_start:
            if tag == OPEN:
                self.is_thinking = self._at_start = True
        elif self._stays(tag):
            self._take_text(tag, parts)

    def _stays(self, tag: str) -> bool:
        """Whether a tag inside the answer is text: quoted in code, or one of an explained pair."""
        if self._code.inside():
            return True
        if tag == OPEN:
            self._open_tags += 1
            return True
        self._open_tags -= 1
        if self._open_tags >= 0:
            return True
        self._open_tags = 0
        return False


def _tag_start(text: str, begin: int) -> int:
    """Where a tag that the end of `text` cuts off may begin, else the length of `text`."""
    start = text.rfind("<", max(begin, len(text) - len(CLOSE) + 1))
    if start >= 0 and (OPEN.startswith(text[start:]) or CLOSE.startswith(text[start:])):
        return start
    return len(text)
