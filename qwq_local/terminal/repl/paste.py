"""Large pastes. Each is one character of the input, shown as `[pasted 214 lines]` and sent in full.

The characters are from a private area of Unicode and are removed from everything that is typed or pasted.
So a marker is deleted, moved over and undone as one character, and a marker that somebody types is only
text.
"""

from __future__ import annotations

import re

MAX_LINES = 20
"""A paste of fewer lines is shown as it is."""

MAX_CHARACTERS = 4000
"""A longer paste is shown as a marker."""

MAX_INPUT = 16_000
"""In an input longer than this, every paste is shown as a marker."""

_FIRST, _LAST = 0xF0000, 0xFFFFD
_MARKER = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_NOT_TEXT = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}\ud800-\udfff]")


class Pastes:
    """The large pastes of one session."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def take_in(self, pasted: str, length_before: int) -> str:
        """The text to insert for a paste, into an input that has `length_before` characters."""
        text = incoming(pasted)
        is_large = text.count("\n") >= MAX_LINES or len(text) > MAX_CHARACTERS
        if is_large or (len(text) > 1 and length_before + len(text) > MAX_INPUT):
            return self.marker(text)
        return text

    def marker(self, text: str) -> str:
        """A character that stands for the text; the text itself when there are too many."""
        if _FIRST + len(self._texts) > _LAST:
            return text
        self._texts.append(text)
        return chr(_FIRST + len(self._texts) - 1)

    def expand(self, text: str) -> str:
        """The text in full."""
        return _MARKER.sub(lambda match: self._text(match.group()), text)

    def shown(self, text: str) -> str:
        """The text with its markers written out."""
        return _MARKER.sub(lambda match: self.label(match.group()), text)

    def label(self, marker: str) -> str:
        """The text of a marker, such as `[pasted 214 lines]`."""
        text = self._text(marker)
        lines = text.count("\n") + (not text.endswith("\n"))
        if lines < 2:
            return f"[pasted {len(text):,} characters]"
        return f"[pasted {lines:,} lines]"

    def parts(self, text: str) -> list[str]:
        """Typed text and pasted text in turns, typed text first."""
        parts, end = [], 0
        for match in _MARKER.finditer(text):
            parts += [text[end : match.start()], self._text(match.group())]
            end = match.end()
        return [*parts, text[end:]]

    def joined(self, parts: list[str]) -> str:
        """The input that has these parts."""
        return "".join(
            self.marker(incoming(part)) if index % 2 else incoming(part) for index, part in enumerate(parts)
        )

    def _text(self, marker: str) -> str:
        index = ord(marker) - _FIRST
        return self._texts[index] if index < len(self._texts) else ""


def is_marker(character: str) -> bool:
    """Whether the character stands for a paste."""
    return _FIRST <= ord(character) <= _LAST


def has_marker(text: str) -> bool:
    """Whether a character of the text stands for a paste."""
    return _MARKER.search(text) is not None


def incoming(text: str) -> str:
    """Text from outside with plain line ends, without surrogates and without the characters of pastes."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _NOT_TEXT.sub("\ufffd", text)
