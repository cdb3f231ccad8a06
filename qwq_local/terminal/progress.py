"""One line of progress on a terminal: loading, prefill, and any other work that can be counted.

Comes in: how much is done. Goes out: a line drawn over itself, gone when the work is finished. Where nobody
looks nothing is written, and a terminal that cannot draw over gets the label once. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitize import cell_width, one_line

Clock = Callable[[], float]
"""Seconds from any start, never backwards; time.monotonic in the program."""

APPEARS_AFTER_S = 0.3
REDRAW_S = 0.1
BAR_CELLS = 24


@dataclass(frozen=True, slots=True)
class Unit:
    """How amounts are written: one amount, the name after two of them, and an amount per second."""

    name: str
    amount: Callable[[float], str]
    rate: Callable[[float], str]


TOKENS = Unit("tokens", lambda amount: f"{amount:,.0f}", lambda rate: f"{rate:,.0f} tok/s")


def duration(seconds: float) -> str:
    """Seconds for a person: 0.4 s is `0s`, 72 is `1m12s`, 7,320 is `2h02m`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class StatusLine:
    """A line at the cursor that is drawn over itself and can be erased."""

    def __init__(self, output: Output, clock: Clock) -> None:
        self._output = output
        self._clock = clock
        self._appears_at = clock() + APPEARS_AFTER_S
        self._next_draw = self._appears_at
        self._drawn = ""

    @property
    def is_due(self) -> bool:
        """Whether a draw now would be seen: at most ten a second, and none before it should appear."""
        return self._output.is_terminal and self._clock() >= self._next_draw

    def draw(self, text: str) -> None:
        """Show the text, cut to the window; a dumb terminal gets only the first one, as a line of its own."""
        line = one_line(text, self._output.size()[0] - 1)
        self._next_draw = self._clock() + REDRAW_S
        if self._output.is_dumb:
            self._output.write("" if self._drawn else line + "\n")
        elif line != self._drawn:
            self._output.write(f"\r{line}\x1b[K")
        self._drawn = line

    def erase(self) -> None:
        """Take the line away; drawing again brings it back."""
        if self._drawn and self._output.is_live:
            self._output.write("\r\x1b[K")
            self._drawn = ""


class ProgressBar:
    """Progress to `total`: a bar with percents, or with a unit `done / total unit · rate · time left`."""

    def __init__(
        self, output: Output, label: str, total: float, clock: Clock, unit: Unit | None = None
    ) -> None:
        self._line = StatusLine(output, clock)
        self._output = output
        self._label = label
        self._total = total
        self._clock = clock
        self._unit = unit
        self._started_at = clock()
        self._started_with: float | None = None

    def update(self, done: float) -> None:
        """Say how much is done in all; what the first call says counts as there before the start."""
        if self._started_with is None:
            self._started_with, self._started_at = done, self._clock()
        if self._line.is_due:
            done = min(max(done, 0.0), self._total)
            self._line.draw(self._percents(done) if self._unit is None else self._amounts(done, self._unit))

    def counts(self, unit: Unit) -> bool:
        """Whether the bar shows amounts of this unit."""
        return self._unit is unit

    def finish(self) -> None:
        """Erase the line."""
        self._line.erase()

    def _percents(self, done: float) -> str:
        share = done / self._total if self._total > 0 else 1.0
        # Rounded down: 100 % is shown only when everything is there.
        percents = f"{int(share * 100):3d}%"
        room = self._output.size()[0] - cell_width(self._label) - len(percents) - 5
        cells = min(BAR_CELLS, room)
        if self._output.is_dumb or cells < 8:
            return f"{one_line(self._label, room + 2) if cells < 0 else self._label} {percents}"
        full = int(share * cells)
        return f"{self._label} {'█' * full}{'░' * (cells - full)} {percents}"

    def _amounts(self, done: float, unit: Unit) -> str:
        parts = [f"{self._label} {unit.amount(done)} / {unit.amount(self._total)} {unit.name}"]
        elapsed = self._clock() - self._started_at
        computed = done - (self._started_with or 0.0)
        if elapsed > 0 and computed > 0:
            rate = computed / elapsed
            parts.append(unit.rate(rate))
            parts.append(f"{duration_left((self._total - done) / rate)} left")
        return " · ".join(parts)


def duration_left(seconds: float) -> str:
    """A time still to wait: `22 s`, and from a minute on as `duration` writes it."""
    return f"{int(seconds + 0.5)} s" if seconds < 59.5 else duration(seconds)
