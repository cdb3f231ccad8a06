"""Byte ranges of a file: the ones that are here, and the ones that are still to be fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """The bytes from `start` up to `end`, without `end` itself."""

    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """The number of bytes."""
        return self.end - self.start

    def touches(self, other: ByteRange) -> bool:
        """Whether both together are one range."""
        return self.start <= other.end and other.start <= self.end


class ByteRanges:
    """A set of bytes, kept as sorted ranges that neither touch nor overlap."""

    def __init__(self, ranges: Iterable[ByteRange] = ()) -> None:
        self._ranges: list[ByteRange] = []
        for each in ranges:
            self.add(each)

    def __iter__(self) -> Iterator[ByteRange]:
        return iter(self._ranges)

    @property
    def n_bytes(self) -> int:
        """The number of bytes in the set."""
        return sum(each.n_bytes for each in self._ranges)

    @property
    def front(self) -> int:
        """The set has every byte before this one."""
        return self._ranges[0].end if self._ranges and self._ranges[0].start == 0 else 0

    def add(self, new: ByteRange) -> None:
        """Add the bytes of a range."""
        if new.n_bytes <= 0:
            return
        apart = [each for each in self._ranges if not each.touches(new)]
        joined = [new, *(each for each in self._ranges if each.touches(new))]
        whole = ByteRange(min(each.start for each in joined), max(each.end for each in joined))
        self._ranges = sorted([*apart, whole])

    def gaps(self, n_bytes: int) -> list[ByteRange]:
        """The ranges that a file of `n_bytes` lacks, in order."""
        edges = [0, *(edge for each in self._ranges for edge in (each.start, each.end)), n_bytes]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [ByteRange(start, end) for start, end in pairs if start < end]


class PendingRanges:
    """The bytes that are still to be fetched, handed out from the front of the file."""

    def __init__(self, ranges: Iterable[ByteRange]) -> None:
        self._ranges = list(ranges)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to hand out."""
        return not self._ranges

    def take(self, max_bytes: int) -> ByteRange:
        """The first range that is left, cut to `max_bytes`. Raises IndexError when none is left."""
        first = self._ranges[0]
        taken = ByteRange(first.start, min(first.end, first.start + max_bytes))
        if taken.end < first.end:
            self._ranges[0] = ByteRange(taken.end, first.end)
        else:
            del self._ranges[0]
        return taken

    def give_back(self, rest: ByteRange) -> None:
        """Put back what was taken and not fetched."""
        if rest.n_bytes > 0:
            self._ranges = sorted([*self._ranges, rest])
