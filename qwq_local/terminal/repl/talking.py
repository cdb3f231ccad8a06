"""The conversation in a thread of its own: lines in, events out, so that typing never waits for a token.

Comes in: a Talk and the lines for it, one after the other. Goes out: a queue of events that the screen
empties when it is about to draw, each line's followed by Ended or Failed. The screen is woken once, however
many events come before it looks. Knows no screen.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwq_local.chat.events import ChatEvent, Talk


@dataclass(frozen=True, slots=True)
class Ended:
    """A line was done."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The conversation broke; no more lines are taken."""

    error: BaseException


class Talking:
    """Runs a Talk in a thread; `wake` is called from there."""

    def __init__(self, talk: Talk, wake: Callable[[], None]) -> None:
        self.events: deque[ChatEvent | Ended | Failed] = deque()
        self._talk = talk
        self._wake = wake
        self._is_awake = False
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="talk", daemon=True)

    def begin(self) -> None:
        """Say what is to be said before the first line."""
        self._thread.start()

    def submit(self, line: str) -> None:
        """Do a line, after those before it."""
        self._lines.put(line)

    def looked(self) -> None:
        """The screen looks at the events now: wake it for the next one."""
        self._is_awake = False

    @property
    def is_done(self) -> bool:
        """Whether the line was done, although not all of it was looked at yet."""
        return bool(self.events) and isinstance(self.events[-1], Ended)

    def finish(self) -> None:
        """Take no more lines and wait for the running one."""
        self._lines.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._tell(self._talk.start())
            while (line := self._lines.get()) is not None:
                self._tell(self._talk.submit(line))
        except BaseException as error:  # every error belongs to the thread that can show it
            self._add(Failed(error))

    def _tell(self, events: Iterator[ChatEvent]) -> None:
        for event in events:
            self._add(event)
        self._add(Ended())

    def _add(self, event: ChatEvent | Ended | Failed) -> None:
        self.events.append(event)
        if not self._is_awake:
            self._is_awake = True
            self._wake()
