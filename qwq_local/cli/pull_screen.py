"""The events of a download in, what a person should know of them out on stderr.

One line drawn over itself on a terminal, a plain line now and then elsewhere. The amount shown never goes
backwards: where a server makes the download start over, that is said, and the line waits until it is passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qwq_local.hub.download import Hashing, Progress, StartedOver
from qwq_local.hub.pull import FileDone, FileStarted, Freed, Locked, PullEvent
from qwq_local.hub.workers import Wait
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock, WorkLine
from qwq_local.terminal.sanitizer import one_line
from qwq_local.text import GB, decimal_size, time_left

SAY_WAITS_FROM_S = 2.0


class PullScreen:
    """What is drawn for one command."""

    def __init__(self, output: Output, clock: Clock) -> None:
        self._output = output
        self._clock = clock
        self._line: WorkLine | None = None
        self._label = ""
        self._total = 0
        self._shown = 0

    def show(self, event: PullEvent) -> None:
        """Draw or say one event."""
        match event:
            case FileStarted():
                self._start(event)
            case Progress(done):
                self._update(done, "")
            case Hashing(done):
                self._check(done)
            case Wait(reason, seconds) if seconds >= SAY_WAITS_FROM_S:
                self.say(f"{reason}: waiting {time_left(seconds)}.")
            case StartedOver(reason):
                self.say(f"{reason}.")
            case Locked(name):
                self.say(f"another process is downloading {name}: waiting for it.")
            case Freed(n_bytes):
                self.say(f"{decimal_size(n_bytes)} of abandoned downloads were removed.")
            case FileDone(name, _, fetched):
                self.say(f"{name} is whole: sha256 verified." if fetched else f"{name} is here already.")
                self._line, self._shown = None, 0
            case _:
                pass

    def say(self, text: str) -> None:
        """Write a line of its own."""
        self.close()
        self._output.write(f"{one_line(text, 2000)}\n")

    def close(self) -> None:
        """Take the drawn line away."""
        if self._line is not None:
            self._line.erase()

    @contextmanager
    def closed_at_the_end(self) -> Iterator[None]:
        """Take the drawn line away when the block ends, however it does."""
        try:
            yield
        finally:
            self.close()

    def _start(self, event: FileStarted) -> None:
        self._label = event.name.rpartition("/")[2]
        self._total = event.n_bytes
        self._shown = max(self._shown, event.here)
        parts = f" ({event.index + 1} of {event.count})" if event.count > 1 else ""
        here = f", {decimal_size(event.here, 2)} are here already" if event.here else ""
        if self._line is None:
            self.say(f"{event.name}{parts}: {decimal_size(event.n_bytes, 2)}{here}.")
            self._line = WorkLine(self._output, event.n_bytes, self._clock, event.here)

    def _update(self, done: int, note: str) -> None:
        self._shown = max(self._shown, done)
        if self._line is not None:
            amounts = f"{self._shown / GB:.2f} / {self._total / GB:.2f} GB"
            self._line.update(f"{self._label} {note}{amounts}", self._shown)

    def _check(self, done: int) -> None:
        if self._line is not None and self._total:
            self._line.update(f"{self._label} checking, {done / self._total:.0%}", self._shown)
