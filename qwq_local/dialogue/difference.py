"""Two runs of one turn compared: the texts of both in, the first place where they part out."""

from __future__ import annotations

from dataclasses import dataclass

AROUND = 40
"""Characters that are shown on either side."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs part: in `thinking` or `answer`, at a character, from 0, and what stands around it."""

    part: str
    position: int
    recorded: str
    rerun: str


@dataclass(frozen=True, slots=True)
class Texts:
    """What a turn said; `is_whole` unless it was stopped, and the texts end where it was."""

    thinking: str
    answer: str
    is_whole: bool = True


def first_difference(recorded: Texts, rerun: Texts) -> Difference | None:
    """The first place where the rerun is not as recorded; what was no longer recorded counts as the same."""
    if (found := _in_part("thinking", recorded.thinking, rerun.thinking)) is not None:
        # A thinking that was stopped goes on in the rerun.
        if recorded.is_whole or recorded.answer or found.position < len(recorded.thinking):
            return found
        return None
    found = _in_part("answer", recorded.answer, rerun.answer)
    if found is not None and not recorded.is_whole and found.position == len(recorded.answer):
        return None
    return found


def common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common, found in steps that halve."""
    if first == second:
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def _in_part(part: str, recorded: str, rerun: str) -> Difference | None:
    if recorded == rerun:
        return None
    at = common_length(recorded, rerun)
    begin = max(0, at - AROUND)
    return Difference(part, at, recorded[begin : at + AROUND], rerun[begin : at + AROUND])
