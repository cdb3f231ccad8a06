"""The turn that runs, as other threads see it: they may stop it, end its thinking, steer it, let it wait."""

from __future__ import annotations

import threading

from qwq_local.backend.question import Backend
from qwq_local.dialogue.control import TurnControl


class Running:
    """Who runs a turn at this moment, if anyone. For any thread; where no turn runs, nothing happens."""

    def __init__(self) -> None:
        # A signal handler may come in between on the thread that holds it.
        self._lock = threading.RLock()
        self._backend: Backend | None = None
        self._control = TurnControl()
        self._is_stopped = False

    def begin(self, backend: Backend) -> TurnControl:
        """A turn begins; the control that goes with its question."""
        with self._lock:
            self._backend, self._control, self._is_stopped = backend, TurnControl(), False
            return self._control

    def end(self) -> None:
        """The turn is over."""
        with self._lock:
            self._backend = None

    def began(self) -> None:
        """The first event of the turn is there: a stop that came before it, and may be lost, is repeated."""
        with self._lock:
            if self._is_stopped and self._backend is not None:
                self._backend.stop()

    def stop(self) -> None:
        """End the turn."""
        with self._lock:
            if self._backend is not None:
                self._is_stopped = True
                self._backend.stop()

    def answer_now(self) -> None:
        """End the thinking and answer; a pause ends too."""
        if (control := self._running()) is not None:
            control.answer_now()
            control.go_on()

    def steer(self, text: str) -> None:
        """Put a sentence into the thinking; a pause ends too."""
        if (control := self._running()) is not None:
            if text.strip():
                control.steer(text)
            control.go_on()

    def pause(self) -> None:
        """Let the turn wait."""
        if (control := self._running()) is not None:
            control.pause()

    def go_on(self) -> None:
        """End the pause."""
        if (control := self._running()) is not None:
            control.go_on()

    def _running(self) -> TurnControl | None:
        with self._lock:
            return self._control if self._backend is not None else None
