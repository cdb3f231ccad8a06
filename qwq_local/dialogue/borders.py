"""Where a text may be cut: positions in, the best border near them out.

The borders from strongest to weakest: paragraph, line, sentence, word, any character. No position that comes
out is inside a character as a person sees it: not between a letter and its accent, not in a joined emoji or a
flag. The rules are those of Unicode's grapheme clusters (UAX #29), and stricter where that is simpler.
"""

from __future__ import annotations

import re
import unicodedata

_PATTERNS = (
    re.compile(r"\n[ \t\r]*\n+"),
    re.compile(r"\n"),
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？｡]+[”’」』】）]*"),
    re.compile(r"\s+"),
)
_ZWJ = "\u200d"
# What joins its predecessor without being a mark: joiners, skin tones, tags of flags, half-width sound marks.
_JOINING = re.compile("[\u200c\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f\uff9e\uff9f]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")
_JAMO_FIRST = re.compile("[\u1100-\u115f\ua960-\ua97c]")
_JAMO_LATER = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff]")
_HANGUL = re.compile("[\u1100-\u11ff\ua960-\ua97c\uac00-\ud7ff]")
# Signs that join the consonants before and after them, in the scripts of India, and prefixed signs.
_LINKING = re.compile("[\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d]")
_PREFIXED = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd]")
# Code points beyond which a run of marks is no character any more, and halves of flags that are counted.
_LONGEST_CHARACTER = 64
_MOST_FLAGS = 256


def last_border(text: str, low: int, high: int) -> int:
    """The last position of the strongest border in `low < position <= high`; `high` is inside the text.

    Where not even a whole character ends in there, it is `high`.
    """
    for pattern in _PATTERNS:
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        for position in reversed(ends):
            if position > low and not is_inside(text, position):
                return position
    return _before(text, low, high)


def first_border(text: str, low: int, high: int) -> int:
    """The first position of the strongest border in `low <= position <= high`, else `high`."""
    for pattern in _PATTERNS:
        for match in pattern.finditer(text, max(0, low - 1), high):
            if match.end() >= low and not is_inside(text, match.end()):
                return match.end()
    return next((position for position in range(low, high) if not is_inside(text, position)), high)


def is_inside(text: str, at: int) -> bool:
    """Whether the position is inside a character as a person sees it."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if before < "\u0300" and after < "\u0300":
        return before == "\r" and after == "\n"
    if unicodedata.category(before) in ("Cc", "Zl", "Zp"):
        return False
    if after == _ZWJ or before == _ZWJ or _JOINING.match(after) or unicodedata.category(after)[0] == "M":
        return True
    if _FLAG.match(before) and _FLAG.match(after):
        return _flags_before(text, at) % 2 == 1
    if _HANGUL.match(before) and (_JAMO_LATER.match(after) or _JAMO_FIRST.match(before)):
        return _HANGUL.match(after) is not None
    return bool(_PREFIXED.match(before) or (_LINKING.match(before) and after.isalpha()))


def _before(text: str, low: int, high: int) -> int:
    """The last end of a whole character that is not after `high`."""
    for position in range(high, max(low, high - _LONGEST_CHARACTER), -1):
        if not is_inside(text, position):
            return position
    return high


def _flags_before(text: str, at: int) -> int:
    """How many halves of flags stand right before the position."""
    count = 0
    while count < min(at, _MOST_FLAGS) and _FLAG.match(text[at - count - 1]):
        count += 1
    return count
