"""A stop that ends the reply it is meant for and no other, from any thread or signal handler."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing

from qwq_local.engine.api import Aborted, AbortFlag
from qwq_local.events import Event, Finished, FinishReason


class Stopping:
    """Joins `stop` to the abort flag of an engine while a reply runs.

    Whoever holds the flag itself may set it at any time: it then counts for the reply that hears it.
    """

    def __init__(self, abort: AbortFlag) -> None:
        self._abort = abort
        # A signal handler may come in between on the thread that holds it.
        self._lock = threading.RLock()
        self._is_running = False
        self._is_asked = False

    def stop(self) -> None:
        """End the running reply; nothing when none runs."""
        with self._lock:
            if self._is_running:
                self._is_asked = True
                self._abort.set()

    def listening(self, events: Generator[Event, None, None]) -> Iterator[Event]:
        """The events of a reply, which may be stopped as long as they come."""
        with self._lock:
            self._is_running = True
        was_heard = False
        try:
            with closing(events):
                for event in events:
                    if isinstance(event, Finished):
                        was_heard = event.reason is FinishReason.INTERRUPTED
                    yield event
        except Aborted:
            was_heard = True
            raise
        finally:
            with self._lock:
                self._is_running = False
                if self._is_asked or was_heard:
                    self._abort.clear()
                self._is_asked = False
