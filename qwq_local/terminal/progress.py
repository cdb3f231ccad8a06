"""Progress of long work: one line that is drawn over itself, with a bar, a rate and the time left.

Pipes get nothing. A terminal that cannot draw over a line gets the label once, and a log file gets a plain
line every half minute. Uses the standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import cell_width, one_line
from qwq_local.text import time_left

Clock = Callable[[], float]
"""Seconds from any start, never backwards; time.monotonic in the program."""

APPEARS_AFTER_S = 0.3
REDRAW_S = 0.1
BAR_CELLS = 24
MIN_BAR_CELLS = 8
PLAIN_EVERY_S = 30.0
RATE_OVER_S = 20.0
"""The rate of a WorkLine is that of the last seconds: tensors of different types take different times."""


@dataclass(frozen=True, slots=True)
class Unit:
    """How amounts are written: one amount, the name after two of them, and an amount per second."""

    name: str
    amount: Callable[[float], str]
    rate: Callable[[float], str]


TOKENS = Unit("tokens", lambda amount: f"{amount:,.0f}", lambda rate: f"{rate:,.0f} tok/s")


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
        """Whether it is time to draw: at most ten times a second, and not in the first moments."""
        return self._output.is_terminal and self._clock() >= self._next_draw

    def draw(self, text: str) -> None:
        """Show the text, cut to the window. A dumb terminal gets only the first one, on a line of its own."""
        line = one_line(text, self._output.size()[0] - 1)
        self._next_draw = self._clock() + REDRAW_S
        # Set first: an interrupt may come during the write, and then the line must be erased.
        before, self._drawn = self._drawn, line
        if self._output.is_dumb:
            self._output.write("" if before else line + "\n")
        elif line != before:
            self._output.write(f"\r{line}\x1b[K")

    def erase(self) -> None:
        """Erase the line. `draw` draws it again."""
        if self._drawn and self._output.is_live:
            self._output.write("\r\x1b[K")
            self._drawn = ""


class Progress:
    """Progress to `total` as text: a bar and percents, or with a unit amounts, rate and time left."""

    def __init__(self, label: str, total: float, clock: Clock, unit: Unit | None = None) -> None:
        self._label = label
        self._total = total
        self._clock = clock
        self._unit = unit
        self._started_at = clock()
        self._started_with: float | None = None
        self._done = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._started_at

    def update(self, done: float) -> None:
        """Set how much is done in all. The amount of the first call counts as done before the start."""
        if self._started_with is None:
            self._started_with, self._started_at = done, self._clock()
        self._done = min(max(done, 0.0), self._total)

    def counts(self, unit: Unit) -> bool:
        """Whether amounts of this unit are shown."""
        return self._unit is unit

    def text(self, columns: int, has_bar: bool = True) -> str:
        """The line for a window of this width. Amounts are never cut; the bar shrinks."""
        if self._unit is None:
            return self._percents(columns, has_bar)
        return f"{self._label} {self._amounts(self._unit)}"

    def text_with_bar(self, columns: int) -> str:
        """The line with a bar before the amounts; where these do not fit, a word and percents."""
        amounts = self._amounts(self._unit) if self._unit else f"{int(self._share * 100)}%"
        room = columns - cell_width(self._label) - cell_width(amounts) - 2
        if room < -1:
            return f"{self._label.partition(' ')[0]} {int(self._share * 100)}%"
        return " ".join(filter(None, [self._label, self._bar(min(BAR_CELLS, room)), amounts]))

    def _bar(self, cells: int) -> str:
        """A bar of this many cells; empty if they are too few to read."""
        full = int(self._share * cells)
        return f"{'█' * full}{'░' * (cells - full)}" if cells >= MIN_BAR_CELLS else ""

    @property
    def _share(self) -> float:
        return self._done / self._total if self._total > 0 else 1.0

    def _percents(self, columns: int, has_bar: bool) -> str:
        # Rounded down: 100 % is shown only when everything is there.
        percents = f"{int(self._share * 100):3d}%"
        room = columns - cell_width(self._label) - len(percents) - 5
        bar = self._bar(min(BAR_CELLS, room)) if has_bar else ""
        if not bar:
            return f"{one_line(self._label, room + 2) if room < 0 else self._label} {percents}"
        return f"{self._label} {bar} {percents}"

    def _amounts(self, unit: Unit) -> str:
        parts = [f"{unit.amount(self._done)} / {unit.amount(self._total)} {unit.name}"]
        computed = self._done - (self._started_with or 0.0)
        if self.elapsed_s > 0 and computed > 0:
            rate = computed / self.elapsed_s
            parts.append(unit.rate(rate))
            parts.append(f"{time_left((self._total - self._done) / rate)} left")
        return " · ".join(parts)


class ProgressBar:
    """Progress on a line of its own."""

    def __init__(
        self, output: Output, label: str, total: float, clock: Clock, unit: Unit | None = None
    ) -> None:
        self._line = StatusLine(output, clock)
        self._output = output
        self._progress = Progress(label, total, clock, unit)

    def update(self, done: float) -> None:
        """Set how much is done in all. The amount of the first call counts as done before the start."""
        self._progress.update(done)
        if self._line.is_due:
            self._line.draw(self._progress.text(self._output.size()[0], not self._output.is_dumb))

    def counts(self, unit: Unit) -> bool:
        """Whether the bar shows amounts of this unit."""
        return self._progress.counts(unit)

    def finish(self) -> None:
        """Erase the line."""
        self._line.erase()


class WorkLine:
    """Progress to `total` bytes, of which `done` are there at the start."""

    def __init__(self, output: Output, total: int, clock: Clock, done: int = 0) -> None:
        self._output = output
        self._line = StatusLine(output, clock)
        self._clock = clock
        self._total = max(1, total)
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)])
        self._next_plain = clock() + PLAIN_EVERY_S

    def update(self, label: str, done: int) -> None:
        """Set what is being worked on and how many bytes are done in all."""
        now = self._clock()
        if now - self._marks[-1][0] >= 0.5:
            self._marks.append((now, done))
            while now - self._marks[0][0] > RATE_OVER_S and len(self._marks) > 2:
                self._marks.popleft()
        if self._output.is_live:
            if self._line.is_due:
                self._line.draw(self._drawn(label, done))
        elif now >= self._next_plain:
            self._next_plain = now + PLAIN_EVERY_S
            self._output.write(one_line(f"{label} · {self._amounts(done)}", 500) + "\n")

    def erase(self) -> None:
        """Erase the line, to write something in its place. The next update draws it again."""
        self._line.erase()

    def _drawn(self, label: str, done: int) -> str:
        amounts = self._amounts(done)
        room = self._output.size()[0] - 1 - cell_width(amounts) - 3
        cells = min(BAR_CELLS, room - cell_width(label) - 1)
        if cells < MIN_BAR_CELLS:
            return amounts if room < MIN_BAR_CELLS else f"{one_line(label, room)} · {amounts}"
        full = int(done / self._total * cells)
        return f"{label} {'█' * full}{'░' * (cells - full)} · {amounts}"

    def _amounts(self, done: int) -> str:
        # Rounded down: 100 % is shown only when everything is there.
        parts = [f"{int(min(done, self._total) / self._total * 100)} %"]
        start, done_then = self._marks[0]
        elapsed = self._clock() - start
        if elapsed > 0 and done > done_then:
            rate = (done - done_then) / elapsed
            parts += [f"{rate / 1e6:,.1f} MB/s", f"{time_left((self._total - done) / rate)} left"]
        return " · ".join(parts)
