"""Byte ranges of a file: which are there, which are under way, which are still to be fetched.

Arithmetic only. A span is half open, [start, end).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Bytes `start` up to, not including, `end`."""

    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """How many bytes."""
        return self.end - self.start


class Spans:
    """A set of bytes as sorted spans that neither touch nor overlap."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._spans: list[Span] = []
        for span in spans:
            self.add(span)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._spans)

    @property
    def n_bytes(self) -> int:
        """How many bytes are in the set."""
        return sum(span.n_bytes for span in self._spans)

    @property
    def front(self) -> int:
        """Up to where the set has every byte from 0 on."""
        return self._spans[0].end if self._spans and self._spans[0].start == 0 else 0

    def add(self, span: Span) -> None:
        """Put the bytes of a span into the set."""
        if span.n_bytes <= 0:
            return
        apart = [other for other in self._spans if other.end < span.start or other.start > span.end]
        joined = [other for other in self._spans if not (other.end < span.start or other.start > span.end)]
        start = min([span.start, *(other.start for other in joined)])
        end = max([span.end, *(other.end for other in joined)])
        self._spans = sorted([*apart, Span(start, end)])

    def gaps(self, n_bytes: int) -> list[Span]:
        """What a file of `n_bytes` lacks, in order."""
        edges = [0, *(edge for span in self._spans for edge in (span.start, span.end)), n_bytes]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [Span(start, end) for start, end in pairs if start < end]


class Schedule:
    """The bytes still to be fetched, handed out from the front in spans of a bounded length."""

    def __init__(self, todo: Iterable[Span]) -> None:
        self._todo = list(todo)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to hand out."""
        return not self._todo

    def take(self, most_bytes: int) -> Span:
        """The first `most_bytes` or fewer that are left; IndexError when none are."""
        first = self._todo[0]
        taken = Span(first.start, min(first.end, first.start + most_bytes))
        if taken.end < first.end:
            self._todo[0] = Span(taken.end, first.end)
        else:
            del self._todo[0]
        return taken

    def give_back(self, span: Span) -> None:
        """Put a span that was taken and not fetched back in its place."""
        if span.n_bytes > 0:
            self._todo = sorted([*self._todo, span])
