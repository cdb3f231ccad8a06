"""Exact repetition: token ids in, the start and period of a cycle out, at a constant cost per token."""

from __future__ import annotations

from qwq_local.dialogue.repetition import LoopSettings

_NGRAM = 8  # tokens that must recur before a period is considered
_HASH_BASE = 0x9E3779B97F4A7C15
_HASH_MASK = (1 << 64) - 1
_MAX_PERIODS = 8  # candidate periods followed at once


class Cycles:
    """Follows the few periods at which the latest tokens equal earlier ones."""

    def __init__(self, settings: LoopSettings) -> None:
        self._settings = settings
        longest = settings.required_tokens(settings.max_period, has_letters=False, in_code=True)
        self._size = longest + settings.max_period + _NGRAM
        self._ring = [-1] * self._size
        self._hash = 0
        self._drop = pow(_HASH_BASE, _NGRAM, 1 << 64)
        self._keys = [-1] * settings.max_period  # the hash that each latest position stored
        self._last: dict[int, int] = {}  # hash of an n-gram -> where it last ended
        self._matched_from: dict[int, int] = {}  # period -> first token that equals the one a period before
        self._last_letter = -1

    def feed(self, index: int, token: int, has_letter: bool, in_code: bool) -> tuple[int, int] | None:
        """Start of the second occurrence and period, once the cycle is long enough."""
        ring, size = self._ring, self._size
        ring[index % size] = token
        if has_letter:
            self._last_letter = index
        for period in list(self._matched_from):
            if ring[(index - period) % size] != token:
                del self._matched_from[period]
        self._consider(index, token)
        for period, matched_from in self._matched_from.items():
            required = self._settings.required_tokens(period, index - self._last_letter < period, in_code)
            if index + 1 - matched_from + period >= required:
                start = self._exact_start(index, period)
                self._matched_from[period] = start
                if index + 1 - start + period >= required:
                    self._matched_from.clear()
                    return start, period
        return None

    def _consider(self, index: int, token: int) -> None:
        """Take the distance to the last occurrence of the latest n-gram as a period to follow."""
        leaving = self._ring[(index - _NGRAM) % self._size] if index >= _NGRAM else -1
        self._hash = (self._hash * _HASH_BASE + token + 1 - (leaving + 1) * self._drop) & _HASH_MASK
        if index + 1 < _NGRAM:
            return
        key, slot = self._hash, index % len(self._keys)
        previous = self._last.get(key)
        if self._last.get(self._keys[slot]) == index - len(self._keys):
            del self._last[self._keys[slot]]
        self._keys[slot] = key
        self._last[key] = index
        if previous is not None and len(self._matched_from) < _MAX_PERIODS:
            self._matched_from.setdefault(index - previous, index + 1 - _NGRAM)

    def _exact_start(self, index: int, period: int) -> int:
        """Walk back over tokens that equal the one a period before: hashes may lie, and came in late."""
        start = index + 1
        oldest = max(0, index + 1 - self._size) + period
        while start > oldest and self._at(start - 1) == self._at(start - 1 - period):
            start -= 1
        return start

    def _at(self, index: int) -> int:
        return self._ring[index % self._size]
