"""Writes the events of a running turn to the history, within a second and at the end.

A thread of its own writes, so that no token waits for a disk. A kill at any moment loses a second at most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from qwq_local.errors import HistoryError
from qwq_local.events import Event, Finished, Generated, Prefill, Steered, Thinking
from qwq_local.history.database import HistoryBusy
from qwq_local.history.records import RunningTurn, TurnEvent, TurnRecord

# With the quarter of a second that token ids may come later than their text, less than one second is lost.
WRITE_EVERY_S = 0.7
# How long a write may wait for another process: the next write takes what this one could not.
_WAIT_S = 0.5
_WAIT_AT_END_S = 3.0


class TurnRecorder:
    """Writes one turn. Every method may be called from any thread, and none but `close` waits for long.

    Nothing raises when the history cannot be written: the turn goes on. `problem` then says so in one line,
    until a later write succeeds. Meanwhile the archive that made this recorder reads the turn from here,
    whole. After the process has ended the turn is LOST, with what was written.
    """

    def __init__(
        self,
        begun: TurnRecord,
        append: Callable[[int, Sequence[Event], float, float], None],
        end: Callable[[TurnRecord, float], None],
    ) -> None:
        self.turn_id = begun.id
        self._append = append
        self._end = end
        self._turn = RunningTurn(begun)
        self._seen_at: float | None = None  # when the last of the thinking came
        self._unwritten: list[TurnEvent] = []
        self._reports_tokens = False
        self.is_written = False
        """Whether the turn has ended and is in the history whole."""
        self.problem: str | None = None
        """Why a part of the turn is not in the history."""
        self._lock = threading.RLock()  # what came
        self._writes = threading.Lock()  # one write at a time
        self._is_closed = False
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def record(self) -> TurnRecord:
        """The turn as it stands, written or not."""
        with self._lock:
            return self._turn.record

    def feed(self, event: Event) -> None:
        """Take the next event; Finished is in the history when this returns, unless `problem` says not."""
        with self._lock:
            if self._turn.has_ended or not isinstance(event, TurnEvent):
                return
            if isinstance(event, Prefill) and self._turn.has_prefilled:
                return  # only the first one says what was cached before
            if isinstance(event, Thinking | Steered):
                now = time.monotonic()
                self._turn.thinking_s += 0.0 if self._seen_at is None else now - self._seen_at
                self._seen_at = now
            self._turn.take(event)
            self._unwritten.append(event)
            self._reports_tokens = self._reports_tokens or isinstance(event, Generated)
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_writing, name="history", daemon=True)
                self._thread.start()
        if isinstance(event, Finished):
            self._write()

    def close(self) -> None:
        """Write what is left; a turn without Finished has been stopped. Closing twice is harmless.

        A write that fails now is tried again every second, until `give_up`.
        """
        with self._lock:
            self._is_closed = True
            if not self._turn.has_ended:
                self._turn.stop()
        self._write()

    def give_up(self) -> None:
        """Try once more to write what is left, and then no more."""
        self._given_up.set()
        self.close()

    def _keep_writing(self) -> None:
        while not self._given_up.wait(WRITE_EVERY_S) and not self.is_written:
            self._write()

    def _write(self) -> None:
        """Write what has come; note why if it cannot be written."""
        with self._writes:
            if self.is_written:
                return
            with self._lock:
                n_events, thinking_s = self._n_writable(), self._turn.thinking_s
                events = self._unwritten[:n_events]
                ended = self._turn.record if self._turn.has_ended else None
            try:
                if ended is not None:
                    self._end(ended, _WAIT_AT_END_S)
                elif events:
                    self._append(self.turn_id, events, thinking_s, _WAIT_S)
            except HistoryError as error:
                if not isinstance(error, HistoryBusy) or self._is_closed:
                    self.problem = f"this turn is not being kept: {error}"
                return
            with self._lock:
                del self._unwritten[:n_events]
            self.is_written = ended is not None
            self.problem = None

    def _n_writable(self) -> int:
        """How many of the unwritten events may be written now.

        Texts come before the ids of their tokens. They wait for these, if ids come at all: a turn is
        continued from its ids, and its text shall end where they end.
        """
        n_unwritten = len(self._unwritten)
        if not self._reports_tokens or self._turn.has_ended:
            return n_unwritten
        return next(
            (n for n in range(n_unwritten, 0, -1) if isinstance(self._unwritten[n - 1], Generated)), 0
        )
