"""The loop guard: finds where an endless repetition in the thinking or the answer began.

Two detectors run side by side. The exact one finds that the last tokens repeat with one period. The near one
finds that the same few sentences return with small changes or with a number that counts up. Both keep a
bounded window, so a token costs the same at any length. The caller cuts the text and the KV cache.

Some repetition is not a loop, and that shapes the rules. Data repeats (zeros, rules, dumps): a cycle without
letters must be longer. Code and tables repeat: cycles must be longer there, and sentences do not count. A
refrain returns, a draft is written twice: new sentences in between lower the count, and a sentence counts in
full from its third time on. Cases are tried one by one: what varies counts by steps, not by words.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

_NGRAM = 8  # tokens that must recur before a period is considered
_HASH_BASE = 0x9E3779B97F4A7C15
_HASH_MASK = (1 << 64) - 1
_MAX_PERIODS = 8  # candidate periods followed at once
_MAX_SENTENCE = 400  # characters; a longer one is taken in slices
_MIN_WORDS = 4  # a shorter sentence ("Hmm.", "01 s 0") proves nothing
_REMEMBERED = 1024  # distinct sentences
_TEMPLATES = 48  # sentences that others are compared with
_ALIKE = 0.6  # shared words over all words of two sentences
_ENUMERATION_REACH = 8  # sentences after something new that belong to its step
_ENUMERATED = 0.15  # weight of words that merely accompany something new
_LINE_WEIGHT = 0.25  # of a list item and of a line that ends like no sentence, as in code
_NOVELTY = 2.0  # how many stale words a new one makes good
_WEAR = 0.03  # how many a character of code, tables and scraps makes good: loops are dense

_WORD = re.compile(r"[^\W\d_\u3040-\u9fff]+|[\u3040-\u9fff]|\d+")
_LETTER = re.compile(r"[^\W\d_]")
_BREAK = re.compile(r"\n|[。！？]|[.!?…][\"')*_`]{0,3}(?=\s)")
_FINISHED = re.compile(r"[.!?…。！？][\"')*_`]{0,3}\s*\Z")
_FENCE = re.compile(r"\s*(?:```|~~~)")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\(?\d+[.):])\s")


@dataclass(frozen=True, slots=True)
class Loop:
    """A repetition: cut the text back to its first `start` tokens, which keep the material once.

    `start` counts tokens from the first one fed. It lies where the second occurrence begins, moved to the
    nearest beginning of a sentence when the cycle holds one. `period` is in tokens, for sentences
    the latest distance between two alike.
    """

    start: int
    period: int
    kind: Literal["cycle", "sentence"]


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How much repetition is too much, in tokens and words; the defaults are for the thinking.

    A cycle fires once it spans `short_repeats` periods or `short_tokens`, whichever is less, but at least
    `long_repeats` periods and `min_tokens` (`min_symbol_tokens` when no letter is in it); in code and tables
    `code_factor` times that. Sentences fire at `stale_words` words that say nothing new, or when one
    sentence has varied `steps` times; both net of what was new in between.
    """

    max_period: int = 1500
    min_tokens: int = 640
    min_symbol_tokens: int = 1500
    short_repeats: int = 8
    short_tokens: int = 2000
    long_repeats: int = 3
    code_factor: int = 2
    stale_words: int = 450
    steps: int = 160

    @classmethod
    def thinking(cls) -> LoopSettings:
        """Settings for the thinking: a loop there costs minutes, a false alarm only an early answer."""
        return cls()

    @classmethod
    def answer(cls) -> LoopSettings:
        """Settings for the answer, where tables, code and lists live and an alarm ends the turn."""
        return cls(
            min_tokens=1200,
            min_symbol_tokens=3000,
            short_repeats=12,
            short_tokens=3000,
            long_repeats=4,
            code_factor=3,
            stale_words=900,
            steps=400,
        )

    def required_tokens(self, period: int, has_letters: bool, in_code: bool) -> int:
        """How many tokens a cycle of `period` tokens must span to be a loop."""
        floor = self.min_tokens if has_letters else self.min_symbol_tokens
        by_period = max(self.long_repeats * period, min(self.short_repeats * period, self.short_tokens))
        return max(floor, by_period) * (self.code_factor if in_code else 1)


class LoopGuard:
    """Watches one stretch of text, the thinking or the answer, for repetition without end.

    After a Loop was returned, cut the text and `reset`; feeding on finds the same loop again, later.
    """

    def __init__(self, settings: LoopSettings | None = None) -> None:
        self._settings = settings or LoopSettings.thinking()
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next token is number 0 again."""
        self._count = 0
        self._splitter = _Splitter()
        self._cycles = _Cycles(self._settings)
        self._sentences = _Sentences(self._settings)

    def feed(self, token: int, piece: str) -> Loop | None:
        """The loop that this token, whose text is `piece`, completes, or None."""
        index = self._count
        self._count += 1
        loop: Loop | None = None
        for sentence in self._splitter.feed(index, piece):
            loop = self._sentences.feed(sentence) or loop
        cycle = self._cycles.feed(index, token, _LETTER.search(piece) is not None, self._splitter.in_code)
        if cycle is None:
            return loop
        start, period = cycle
        return Loop(self._splitter.nearest_start(start, period), period, "cycle")


@dataclass(frozen=True, slots=True)
class _Sentence:
    """A sentence or a line, the number of its first token, and the characters up to its end."""

    start: int
    text: str
    n_chars: int


class _Splitter:
    """Pieces in, finished sentences and lines of prose out; remembers where the latest ones began."""

    def __init__(self) -> None:
        self._text = ""
        self._start = 0
        self._n_chars = 0
        self._line_begins = True
        self._is_slice = False  # the sentence was too long, and this is the rest of it
        self._in_fence = False
        self._in_table = False
        self._starts: deque[int] = deque([0], maxlen=_REMEMBERED)

    @property
    def in_code(self) -> bool:
        """Whether the latest whole sentence stands in a fenced block or a table."""
        return self._in_fence or self._in_table

    def nearest_start(self, at: int, period: int) -> int:
        """The beginning of a sentence next to token `at`, within the period after or half of it before.

        The match of a cycle begins a little early when the text before ends like it, and a little late when
        its first word was another token the first time, after a newline instead of a space.
        """
        near = [start for start in self._starts if at - period // 2 <= start < at + period]
        return min(near, key=lambda start: (abs(start - at), start < at), default=at)

    def feed(self, index: int, piece: str) -> list[_Sentence]:
        """The sentences that end in this piece; a point in a number or after a bare marker ends none."""
        look_from = max(0, len(self._text) - 4)
        self._text += piece
        done: list[_Sentence] = []
        while match := _BREAK.search(self._text, look_from):
            end = look_from = match.end()
            if self._text[end - 1] == "\n" or _LETTER.search(self._text, 0, end):
                done += self._cut(end, index)
                look_from = 0
        if len(self._text) > _MAX_SENTENCE:
            self._cut(len(self._text), index, is_slice=True)
        return done

    def _cut(self, end: int, index: int, is_slice: bool = False) -> list[_Sentence]:
        """The first `end` characters as a sentence, or nothing when they are code or part of one."""
        text, self._text = self._text[:end], self._text[end:]
        self._n_chars += end
        is_fence = False
        if self._line_begins:
            is_fence = _FENCE.match(text) is not None
            self._in_table = text.lstrip().startswith("|")
        is_prose = not (is_fence or self.in_code or is_slice or self._is_slice)
        sentences = [_Sentence(self._start, text, self._n_chars)] if is_prose else []
        self._in_fence ^= is_fence
        self._is_slice = is_slice
        self._line_begins = text.endswith("\n")
        # A token that only begins with the break carries the whole next sentence.
        self._start = index if self._text.strip() else index + 1
        if self._starts[-1] != self._start and not is_slice:
            self._starts.append(self._start)
        return sentences


@dataclass(slots=True)
class _Template:
    """The words of a sentence that others resemble: where the latest began, and how far they count up."""

    words: frozenset[str]
    latest: int
    steps: float = 0.0
    counts_from: int = 0
    novelties: int = 0

    def step(self, weight: float, start: int, novelties: int) -> float:
        """How many steps it has come, this one counted, less the new sentences in between."""
        self.steps = max(0.0, self.steps - (novelties - self.novelties))
        if not self.steps:
            self.counts_from = start
        self.novelties = novelties
        self.steps += weight
        return self.steps


@dataclass(slots=True)
class _Seen:
    """How often a sentence came, and what it resembles."""

    times: int = 0
    template: _Template | None = None


class _Sentences:
    """Near repetition: counts words that say nothing new and sentences that only count up."""

    def __init__(self, settings: LoopSettings) -> None:
        self._settings = settings
        self._seen: dict[str, _Seen] = {}  # latest last
        self._templates: deque[_Template] = deque(maxlen=_TEMPLATES)
        self._number = 0
        self._new_at = 0  # the sentence that last brought a step of an enumeration
        self._novelties = 0
        self._n_chars = 0
        self._stale_words = 0.0
        self._stale_from = 0

    def feed(self, sentence: _Sentence) -> Loop | None:
        """The loop that the sentence completes, or None."""
        self._number += 1
        item = _LIST_ITEM.match(sentence.text)
        words = _WORD.findall(sentence.text.casefold(), item.end() if item else 0)
        n_words = sum(not word.isdecimal() for word in words)
        seen = self._recall(" ".join(words))
        own_chars = len(sentence.text) if n_words >= _MIN_WORDS else 0
        self._wear_off(_WEAR * (sentence.n_chars - self._n_chars - own_chars))
        self._n_chars = sentence.n_chars
        if not own_chars:
            if words and seen.times == 1:
                self._new_at = self._number
                self._wear_off(_NOVELTY * n_words)
            return None
        weight = _LINE_WEIGHT if item or not _FINISHED.search(sentence.text) else 1.0
        if seen.template:
            template, fires = seen.template, self._repeated(seen.times, weight * n_words, sentence.start)
        else:
            template, known = self._template_of(words, sentence.start)
            seen.template = template
            fires = known and self._varied(template, n_words, weight, sentence.start)
            if not known:
                self._novel(n_words)
        period, template.latest = sentence.start - template.latest, sentence.start
        if not fires:
            return None
        counts_from = self._stale_from if self._is_stale() else template.counts_from
        self._stale_words = template.steps = 0.0
        return Loop(counts_from, period, "sentence")

    def _recall(self, key: str) -> _Seen:
        """What is known of a sentence, this time counted in; the longest unseen one is forgotten."""
        seen = self._seen.pop(key, None) or _Seen()
        seen.times += 1
        self._seen[key] = seen
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return seen

    def _template_of(self, words: list[str], start: int) -> tuple[_Template, bool]:
        """The latest template that shares most words, and True; else these words as one, and False."""
        shape = frozenset("0" if word.isdecimal() else word for word in words)
        for template in reversed(self._templates):
            shared = len(shape & template.words)
            if shared >= _ALIKE * (len(shape) + len(template.words) - shared):
                return template, True
        self._templates.append(_Template(shape, start))
        return self._templates[-1], False

    def _novel(self, n_words: int) -> None:
        self._novelties += 1
        self._wear_off(_NOVELTY * n_words)

    def _wear_off(self, n_words: float) -> None:
        self._stale_words = max(0.0, self._stale_words - n_words)

    def _varied(self, template: _Template, n_words: int, weight: float, start: int) -> bool:
        """Count a sentence like an earlier one; True when it is one too many."""
        self._new_at = self._number
        self._add_stale(_ENUMERATED * n_words, start)
        return template.step(weight, start, self._novelties) >= self._settings.steps or self._is_stale()

    def _repeated(self, times: int, n_words: float, start: int) -> bool:
        """Count a sentence that was said word for word before; True when it is one too many."""
        in_enumeration = self._new_at and self._number - self._new_at <= _ENUMERATION_REACH
        self._add_stale(_ENUMERATED * n_words if times == 2 or in_enumeration else n_words, start)
        return self._is_stale()

    def _add_stale(self, n_words: float, start: int) -> None:
        if not self._stale_words:
            self._stale_from = start
        self._stale_words += n_words

    def _is_stale(self) -> bool:
        return self._stale_words >= self._settings.stale_words


class _Cycles:
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
