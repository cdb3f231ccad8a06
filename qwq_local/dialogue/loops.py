"""Tokens and their text in, the place where an endless repetition began out.

Two detectors run side by side. Exact: the last tokens repeat with one period. Near: the same few sentences
come back with small changes or a number that counts up. Both keep a bounded window, so a token costs the same
at any length. Knows no engine: whoever feeds it cuts the text and the KV cache.

What must not be taken for a loop shapes the rules. Data repeats (zeros, rules, dumps): a cycle without
letters needs more. Code and tables repeat: cycles need more there, sentences do not count at all. A refrain
comes back, a draft is written twice: new sentences in between wear the suspicion off, and a sentence is
stale from its third time on. Cases are gone through one by one: what varies counts by steps, not by words.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from qwq_local.dialogue.cycles import Cycles
from qwq_local.dialogue.repetition import Loop, LoopSettings

__all__ = ["Loop", "LoopGuard", "LoopSettings"]

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
        self._cycles = Cycles(self._settings)
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
