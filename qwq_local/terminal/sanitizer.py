"""Model text made safe for a terminal.

The sanitizer removes control sequences, control characters, and the Unicode characters that reorder or
hide text. Text may arrive in pieces that are cut anywhere: the result does not depend on the cuts, and
visible text is never held back. Uses the standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from enum import Enum, auto

SEQUENCE_LIMIT = 256
"""Characters that an unfinished CSI or ESC sequence may swallow."""

STRING_LIMIT = 4096
"""Characters that an unfinished OSC, DCS, APC, PM or SOS string may swallow."""

_ESC, _BEL, _CSI, _ST = "\x1b", "\x07", "\x9b", "\x9c"
_STRING_OPENERS = frozenset("\x90\x98\x9d\x9e\x9f")  # DCS, SOS, OSC, PM, APC as single characters
_NEWLINES = frozenset("\r\x0b\x0c\x85\u2028\u2029")

# Bidirectional marks, embeddings and isolates; zero-width characters but the joiners that emoji and some
# scripts need; deprecated and interlinear format characters; tags, which carry invisible text.
_HIDDEN = (
    r"\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    r"\U000e0000-\U000e007f"
)
_SPECIAL = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff" + _HIDDEN
_PLAIN_RUN = re.compile(f"[^{_SPECIAL}]+")
_SPECIAL_CHARACTER = re.compile(f"[{_SPECIAL}]")


class _EscapeState(Enum):
    TEXT = auto()
    ESCAPE = auto()
    ESCAPE_INTERMEDIATE = auto()
    CSI = auto()
    STRING = auto()
    STRING_ESCAPE = auto()


class Sanitizer:
    """Strips one text that arrives in pieces; keeps a state and no text between them."""

    def __init__(self) -> None:
        self._state = _EscapeState.TEXT
        self._swallowed = 0
        self._after_cr = False

    def feed(self, text: str) -> str:
        """What may be shown of the next piece."""
        shown: list[str] = []
        position = 0
        while position < len(text):
            character = text[position]
            if self._state is not _EscapeState.TEXT:
                position += self._swallow(character)
            elif self._after_cr and character == "\n":
                self._after_cr = False
                position += 1
            elif run := _PLAIN_RUN.match(text, position):
                self._after_cr = False
                shown.append(run.group())
                position = run.end()
            else:
                shown.append(self._special(character))
                position += 1
        return "".join(shown)

    def _special(self, character: str) -> str:
        """What stands for a special character; may begin a sequence."""
        self._after_cr = character == "\r"
        if character in _NEWLINES:
            return "\n"
        if character == _ESC:
            self._enter(_EscapeState.ESCAPE)
        elif character == _CSI:
            self._enter(_EscapeState.CSI)
        elif character in _STRING_OPENERS:
            self._enter(_EscapeState.STRING)
        return "\ufffd" if "\ud800" <= character <= "\udfff" else ""

    def _enter(self, state: _EscapeState) -> None:
        self._state = state
        self._swallowed = 0

    def _swallow(self, character: str) -> bool:
        """Take one character of a sequence; False when it ends the sequence and belongs to the text."""
        self._swallowed += 1
        match self._state:
            case _EscapeState.ESCAPE:
                return self._after_escape(character)
            case _EscapeState.CSI | _EscapeState.ESCAPE_INTERMEDIATE:
                return self._within_sequence(character)
            case _EscapeState.STRING:
                return self._within_string(character)
            case _:
                if character == "\\":
                    self._enter(_EscapeState.TEXT)
                    return True
                self._enter(_EscapeState.ESCAPE)
                return False

    def _after_escape(self, character: str) -> bool:
        if character == "[":
            self._enter(_EscapeState.CSI)
        elif character in "]PX^_":
            self._enter(_EscapeState.STRING)
        elif " " <= character <= "/":
            self._enter(_EscapeState.ESCAPE_INTERMEDIATE)
        elif character != _ESC:
            self._enter(_EscapeState.TEXT)
            return "0" <= character <= "~"
        return True

    def _within_sequence(self, character: str) -> bool:
        last_parameter = "?" if self._state is _EscapeState.CSI else "/"
        if character == _ESC:
            self._enter(_EscapeState.ESCAPE)
        elif not " " <= character <= last_parameter:
            self._enter(_EscapeState.TEXT)
            return " " <= character <= "~"
        elif self._swallowed >= SEQUENCE_LIMIT:
            self._enter(_EscapeState.TEXT)
        return True

    def _within_string(self, character: str) -> bool:
        if character == _ESC:
            self._enter(_EscapeState.STRING_ESCAPE)
        elif character == "\n" or character in _NEWLINES:
            self._enter(_EscapeState.TEXT)
            return False
        elif character in (_BEL, _ST, "\x18", "\x1a") or self._swallowed >= STRING_LIMIT:
            self._enter(_EscapeState.TEXT)
        return True


def sanitize(text: str) -> str:
    """What may be shown of a whole text."""
    return Sanitizer().feed(text)


def drop_special(text: str) -> str:
    """The text without any special character: the last gate before a terminal, for text already parsed."""
    return _SPECIAL_CHARACTER.sub("", text)


def one_line(text: str, width: int) -> str:
    """The text on one line of at most `width` cells: white space becomes one space, the rest is cut with …"""
    line = " ".join(sanitize(text).split())
    if cell_width(line) <= width:
        return line
    cells = 0
    for end, character in enumerate(line):
        cells += cell_width(character)
        if cells > width - 1:
            return line[:end] + "…" if width > 0 else ""
    return line


def cell_width(text: str) -> int:
    """Terminal cells that the text takes, each character by itself: never too few for joined emoji."""
    if text.isascii():
        return len(text)
    return sum(
        2
        if unicodedata.east_asian_width(character) in "WF"
        else not (unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"))
        for character in text
    )


def aligned_lines(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Rows of cells as sanitized lines in columns; `right` are the columns aligned to the right."""
    cells = [[sanitize(cell) for cell in row] for row in rows]
    widths = [max(map(cell_width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (width - cell_width(cell))
            padded.append(padding + cell if number in right else cell + padding)
        yield "  ".join(padded).rstrip()
