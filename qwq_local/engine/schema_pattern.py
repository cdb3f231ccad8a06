"""Regular expressions and formats of JSON strings as grammar pieces.

A `pattern` or the name of a `format` in, a piece out: GBNF for the inside of a JSON string and the least
and greatest length it can have. Only what Python's and ECMAScript's regular expressions agree on is
understood: literals, `.`, classes, groups, `|`, `* + ? {m,n}`, and `^` and `$` at the ends. Where the two
dialects differ (\\D, \\W, \\S beyond ASCII, what `.` excludes) the piece has what both accept.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from qwq_local.engine.gbnf import (
    UNICODE,
    Ranges,
    Rules,
    merge_ranges,
    spelled_character,
    without_ranges,
)
from qwq_local.errors import SchemaError

_MAX_NESTING = 50

_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
# Python counts \x1c-\x1f as space, ECMAScript does not: \S has neither those nor anything past ASCII.
_PYTHON_SPACE: Ranges = ((0x09, 0x0D), (0x1C, 0x20))
_ASCII: Ranges = ((0x00, 0x7F),)
_DOT = without_ranges(UNICODE, ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)))
_CLASS_ESCAPES: dict[str, Ranges] = {
    "d": _DIGIT,
    "w": _WORD,
    "s": _SPACE,
    "D": without_ranges(_ASCII, _DIGIT),
    "W": without_ranges(_ASCII, _WORD),
    "S": without_ranges(_ASCII, _PYTHON_SPACE),
}
_CHARACTER_ESCAPES = {"n": 0x0A, "t": 0x09, "r": 0x0D, "f": 0x0C, "v": 0x0B}


@dataclass(frozen=True, slots=True)
class Piece:
    """GBNF for the inside of a string, and the lengths in characters that it can have."""

    text: str
    low: int
    high: int | None


_YEAR = "[12] [0-9]{3}"
_LEAP_YEAR = (
    '([12] [0-9] ([02468] [48] | [2468] "0" | [13579] [26]) | ("12" | "16" | "20" | "24" | "28") "00")'
)
_DATE = (
    f'({_YEAR} "-" (("0" [13578] | "10" | "12") "-" ("0" [1-9] | [12] [0-9] | "3" [01]) | '
    '("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])) | '
    f'{_LEAP_YEAR} "-02-29")'
)
_CLOCK = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_TIME = f'{_CLOCK} ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [-+] {_CLOCK})'
_HEX = "[0-9A-Fa-f]"
_UUID = f'{_HEX}{{8}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{12}}'

FORMATS = {
    "date": Piece(_DATE, 10, 10),
    "time": Piece(_TIME, 9, 21),
    "date-time": Piece(f'{_DATE} "T" {_TIME}', 20, 32),
    "uuid": Piece(_UUID, 36, 36),
}


def pattern_piece(pattern: str, rules: Rules, character: str, path: str) -> Piece:
    """The strings in which `pattern` is found, as JSON spells them.

    `character` is the rule for any character of a JSON string: it fills up what is not anchored. `path`
    leads the message of the SchemaError that anything not understood raises.
    """
    return _Pattern(pattern, rules, character, path).read()


class _Pattern:
    """A recursive-descent reader over one pattern; each method reads one construct at `_at`."""

    def __init__(self, pattern: str, rules: Rules, character: str, path: str) -> None:
        self._pattern = pattern
        self._rules = rules
        self._character = character
        self._path = path
        self._at = 0
        self._nesting = 0

    def read(self) -> Piece:
        branches = [self._anchored_branch()]
        while self._take("|"):
            branches.append(self._anchored_branch())
        if self._at < len(self._pattern):
            raise self._refusal(f"`{self._pattern[self._at]}` at {self._at} closes or anchors nothing")
        return _either(branches)

    def _anchored_branch(self) -> Piece:
        anything = Piece(f"{self._character}*", 0, None)
        start = [] if self._take("^") else [anything]
        middle = self._sequence()
        end = [] if self._take("$") else [anything]
        return _joined([*start, middle, *end])

    def _alternatives(self) -> Piece:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return _either(branches)

    def _sequence(self) -> Piece:
        pieces: list[Piece] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)$":
            pieces.append(self._repeated(self._atom()))
        return _joined(pieces)

    def _atom(self) -> Piece:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return self._one_of(self._class())
        if character == ".":
            return self._one_of(_DOT)
        if character == "\\":
            return self._one_of(self._escape())
        if character in "^*+?{}]":
            raise self._refusal(f"`{character}` at {self._at - 1} has no meaning there that can be enforced")
        return self._one_of(((ord(character), ord(character)),))

    def _group(self) -> Piece:
        if self._take("?") and not self._take(":"):
            raise self._refusal("of the groups with `(?` only `(?:` can be enforced")
        self._nesting += 1
        if self._nesting > _MAX_NESTING:
            raise self._refusal(f"groups nest deeper than {_MAX_NESTING}")
        inside = self._alternatives()
        if not self._take(")"):
            raise self._refusal("a group is not closed, or an anchor stands inside one")
        self._nesting -= 1
        return inside

    def _repeated(self, atom: Piece) -> Piece:
        low, high = 1, 1
        if self._take("*"):
            low, high = 0, -1
        elif self._take("+"):
            low, high = 1, -1
        elif self._take("?"):
            low, high = 0, 1
        elif self._take("{"):
            low, high = self._counts()
        else:
            return atom
        self._take("?")  # lazy or not, the same strings match
        most = None if high < 0 else high
        if atom.low == 0 and most != 1:
            raise self._refusal("something that may be empty is repeated")
        item = self._rules.add(atom.text)
        text = self._rules.repeat(item, low, most, self._path, self._path)
        longest = None if most is None or atom.high is None else most * atom.high
        return Piece(text, low * atom.low, longest)

    def _counts(self) -> tuple[int, int]:
        low = self._digits()
        high = low
        if self._take(","):
            high = -1 if self._pattern.startswith("}", self._at) else self._digits()
        if not self._take("}") or -1 < high < low:
            raise self._refusal(f"the repetition before {self._at} is not {{m}}, {{m,}} or {{m,n}}")
        return low, high

    def _digits(self) -> int:
        start = self._at
        while self._at < len(self._pattern) and self._pattern[self._at] in string.digits:
            self._at += 1
        digits = self._pattern[start : self._at]
        if not 1 <= len(digits) <= 9:
            raise self._refusal(f"a count of 1 to 9 digits is missing at {start}")
        return int(digits)

    def _class(self) -> Ranges:
        start = self._at
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            first = self._class_member()
            if self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
                self._at += 1
                first = self._class_range(first, self._class_member())
            ranges += first
        if not ranges:
            raise self._refusal("an empty class means different things to different readers")
        if not negated:
            return merge_ranges(ranges)
        inside = self._pattern[start : self._at]
        if any(f"\\{letter}" in inside for letter in "DWS"):
            raise self._refusal("\\D, \\W or \\S in a negated class")
        # Python's \d, \w and \s go beyond ASCII: what they might hold must not be let in either.
        if any(f"\\{letter}" in inside for letter in "dws"):
            ranges += [(0x1C, 0x1F), (0x80, 0x10FFFF)]
        return without_ranges(UNICODE, merge_ranges(ranges))

    def _class_member(self) -> Ranges:
        character = self._next()
        if character == "\\":
            return self._escape()
        if character == "[":
            raise self._refusal("`[` inside a class must be written \\[")
        return ((ord(character), ord(character)),)

    def _class_range(self, first: Ranges, last: Ranges) -> Ranges:
        low, high = first[0][0], last[-1][1]
        if first != ((low, low),) or last != ((high, high),) or low > high:
            raise self._refusal(
                f"the range that ends at {self._at} is not one from a character to a later one"
            )
        return ((low, high),)

    def _escape(self) -> Ranges:
        letter = self._next()
        if letter in _CLASS_ESCAPES:
            return _CLASS_ESCAPES[letter]
        if letter in "xu":
            digits = self._pattern[self._at : self._at + (2 if letter == "x" else 4)]
            if len(digits) != (2 if letter == "x" else 4) or set(digits) - set(string.hexdigits):
                raise self._refusal(f"\\{letter} at {self._at - 2} lacks its hexadecimal digits")
            self._at += len(digits)
            code = int(digits, 16)
        elif letter in _CHARACTER_ESCAPES:
            code = _CHARACTER_ESCAPES[letter]
        elif letter.isascii() and not letter.isalnum():
            code = ord(letter)
        else:
            raise self._refusal(f"\\{letter} cannot be enforced")
        return ((code, code),)

    def _one_of(self, ranges: Ranges) -> Piece:
        spelled = spelled_character(ranges)
        if spelled is None:
            raise self._refusal("it asks for a control character that JSON cannot spell shortly")
        return Piece(f"({spelled})" if " | " in spelled else spelled, 1, 1)

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise self._refusal("it ends in the middle")
        self._at += 1
        return self._pattern[self._at - 1]

    def _take(self, expected: str) -> bool:
        if not self._pattern.startswith(expected, self._at):
            return False
        self._at += len(expected)
        return True

    def _refusal(self, why: str) -> SchemaError:
        return SchemaError(f"{self._path}: this pattern cannot be enforced: {why}. Write a simpler one.")


def _joined(pieces: list[Piece]) -> Piece:
    """The pieces one after another."""
    lows = sum(piece.low for piece in pieces)
    highs = [piece.high for piece in pieces if piece.high is not None]
    return Piece(
        " ".join(piece.text for piece in pieces) or '""',
        lows,
        sum(highs) if len(highs) == len(pieces) else None,
    )


def _either(pieces: list[Piece]) -> Piece:
    """Any one of the pieces."""
    if len(pieces) == 1:
        return pieces[0]
    highs = [piece.high for piece in pieces if piece.high is not None]
    return Piece(
        f"({' | '.join(piece.text for piece in pieces)})",
        min(piece.low for piece in pieces),
        max(highs) if len(highs) == len(pieces) else None,
    )
