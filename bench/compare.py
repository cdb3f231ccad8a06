"""Two contestants in alternating pairs: the ratio of each pair, their median and their spread."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from pathlib import Path


def pair_ratios(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> list[float]:
    """Ours divided by theirs for each pair. Ours goes first in every other pair."""
    ratios = []
    for number in range(pairs):
        if number % 2:
            other, own = theirs(), ours()
        else:
            own, other = ours(), theirs()
        ratios.append(own / other)
    return ratios


def summary(what: str, ratios: list[float], bound: str) -> str:
    """One line: median, spread, number of pairs and the bound."""
    middle = statistics.median(ratios)
    spread = f"spread {min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs"
    return f"{what}: median {middle:.3f}, {spread} ({bound})"


def machine() -> str:
    """The processor, its cores and the system, for the record."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        cores = sum(line.startswith("processor") for line in lines)
    except (OSError, StopIteration):
        return f"{name}, Python {platform.python_version()}"
    return f"{name}, {cores} cores, {platform.system()}, Python {platform.python_version()}"
