"""Texts of any length and origin as short single lines: names, first questions, excerpts.

Standard library only. What reaches a terminal is sanitised once more, where it is printed.
"""

from __future__ import annotations

import re
import unicodedata

# ECMA-48 control sequences and strings, which without their first character would read as rubbish.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*"
)
NAME_CELLS = 100
QUESTION_CHARS = 200


def squeezed(text: str, max_chars: int) -> str:
    """The text on one line, printable, at most so many characters; what is cut off is shown as …"""
    # A line of words needs not more than the start of a long text.
    line = " ".join(_printable(text[: 4 * max_chars + 1]).split())
    if len(line) <= max_chars and len(text) <= 4 * max_chars:
        return line
    return line[: max_chars - 1].rstrip() + "…"


def clean_name(text: str) -> str:
    """The text as a name: one printable line of at most NAME_CELLS terminal cells."""
    line = squeezed(text, 2 * NAME_CELLS)
    cells = 0
    for end, character in enumerate(line):
        cells += _cells(character)
        if cells > NAME_CELLS:
            return line[:end].rstrip()
    return line


def _printable(text: str) -> str:
    shown = _SEQUENCE.sub("", text)
    return "".join(character if character.isprintable() else " " for character in shown)


def _cells(character: str) -> int:
    if unicodedata.east_asian_width(character) in "WF":
        return 2
    return 0 if unicodedata.category(character) in ("Mn", "Me", "Cf") else 1
