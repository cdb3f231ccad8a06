"""Long work, told of while it runs: one line drawn over itself, or a plain line now and then.

Comes in: what is being worked on and how many bytes are done. Goes out: bar, rate and time left on a
terminal; elsewhere, such as in a log file, a plain line every half a minute. Standard library only.
"""

from __future__ import annotations

from collections import deque

from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock, StatusLine, duration_left
from qwq_local.terminal.sanitize import cell_width, one_line

PLAIN_EVERY_S = 30.0
# The rate is that of the last seconds: tensors of different types take different times.
RATE_OVER_S = 20.0
BAR_CELLS = 24


def size_text(n_bytes: int) -> str:
    """A size for a person, with three or four figures: `2.80 MiB`, `18.48 GiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:,.2f} {unit}"
    return f"{n_bytes:,} bytes"


class WorkLine:
    """Progress to `total` bytes, counted from what is there already."""

    def __init__(self, output: Output, total: int, clock: Clock, done: int = 0) -> None:
        self._output = output
        self._line = StatusLine(output, clock)
        self._clock = clock
        self._total = max(1, total)
        self._marks: deque[tuple[float, int]] = deque([(clock(), done)])
        self._next_plain = clock() + PLAIN_EVERY_S

    def update(self, label: str, done: int) -> None:
        """Say what is worked on and how many bytes are done in all."""
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
        """Take the line away, to write something in its place; the next update brings it back."""
        self._line.erase()

    def _drawn(self, label: str, done: int) -> str:
        amounts = self._amounts(done)
        room = self._output.size()[0] - 1 - cell_width(amounts) - 3
        cells = min(BAR_CELLS, room - cell_width(label) - 1)
        if cells < 8:
            return amounts if room < 8 else f"{one_line(label, room)} · {amounts}"
        full = int(done / self._total * cells)
        return f"{label} {'█' * full}{'░' * (cells - full)} · {amounts}"

    def _amounts(self, done: int) -> str:
        # Rounded down: 100 % is shown only when everything is there.
        parts = [f"{int(min(done, self._total) / self._total * 100)} %"]
        start, done_then = self._marks[0]
        elapsed = self._clock() - start
        if elapsed > 0 and done > done_then:
            rate = (done - done_then) / elapsed
            parts += [f"{rate / 1e6:,.1f} MB/s", f"{duration_left((self._total - done) / rate)} left"]
        return " · ".join(parts)
