"""Model text made safe for a terminal.

The sanitizer removes control sequences, control characters, and the Unicode characters that reorder or
hide text. Text may arrive in pieces that are cut anywhere: the result does not depend on the cuts, and
visible text is never held back. Uses the standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

SEQUENCE_LIMIT = 256
"""Characters that an unfinished CSI or ESC sequence may swallow."""

STRING_LIMIT = 4096
"""Characters that an unfinished OSC, DCS, APC, PM or SOS string may swallow."""

# Bidirectional marks, embeddings and isolates; zero-width characters but the joiners that emoji and some
# scripts need; deprecated and interlinear format characters; tags, which carry invisible text.
_HIDDEN = (
    r"\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    r"\U000e0000-\U000e007f"
)
_NEWLINES = r"\r\x0b\x0c\x85\u2028\u2029"
_SPECIAL = rf"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_HIDDEN}"
_SPECIAL_CHARACTER = re.compile(f"[{_SPECIAL}]")

# A group is empty only while the sequence may continue.
_UNIT = re.compile(
    # CSI, and ESC with intermediate characters: parameters, then the last character.
    rf"(?:\x1b\[|\x9b)[ -?]{{0,{SEQUENCE_LIMIT - 1}}}([ -~])?"
    rf"|\x1b[ -/][ -/]{{0,{SEQUENCE_LIMIT - 1}}}([ -~])?"
    # A string (DCS, SOS, OSC, PM, APC) ends with BEL, ST, CAN, SUB, with its line, or where an ESC begins.
    rf"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x1b\n{_NEWLINES}\x07\x9c\x18\x1a]{{0,{STRING_LIMIT - 1}}}"
    rf"([^\x1b\n{_NEWLINES}])?"
    r"|\x1b([0-~])?"
    rf"|(\r\n|[{_NEWLINES}])|([{_SPECIAL}])"
)


class Sanitizer:
    """Strips one text that arrives in pieces."""

    def __init__(self) -> None:
        self._unfinished = ""
        self._after_cr = False

    def feed(self, text: str) -> str:
        """What may be shown of the next piece."""
        if text:
            text = self._unfinished + (text.removeprefix("\n") if self._after_cr else text)
            self._unfinished, self._after_cr = "", text.endswith("\r")
        return _UNIT.sub(self._shown, text)

    def _shown(self, unit: re.Match[str]) -> str:
        if unit.lastindex is None and unit.end() == len(unit.string):
            self._unfinished = unit.group()
        if unit[5]:
            return "\n"
        return "\ufffd" if "\ud800" <= (unit[6] or "") <= "\udfff" else ""


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
