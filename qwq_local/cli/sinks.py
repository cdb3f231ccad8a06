"""Where the events of a turn go: to a person's terminal, or as lines of JSON to a program."""

from __future__ import annotations

from typing import Protocol, TextIO

from qwq_local.events import Event, Planned, Thinking
from qwq_local.wire import event_line, write_line


class Sink(Protocol):
    """Takes the events of turns, one after the other."""

    def show(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Finish what is drawn; closing twice is harmless."""


class Traced:
    """Another sink, and the thinking in a file besides."""

    def __init__(self, sink: Sink, file: TextIO) -> None:
        self._sink = sink
        self._file = file

    def show(self, event: Event) -> None:
        """Pass the event on; write it when it is thinking."""
        self._sink.show(event)
        if isinstance(event, Thinking):
            write_line(self._file, event.text)

    def close(self) -> None:
        """Finish the other sink; the file is its opener's."""
        self._sink.close()


class Remembering:
    """Another sink, and the plan of the turn kept."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.planned: Planned | None = None

    def show(self, event: Event) -> None:
        """Pass the event on; keep it when it is the plan."""
        if isinstance(event, Planned):
            self.planned = event
        self._sink.show(event)

    def close(self) -> None:
        """Finish the other sink."""
        self._sink.close()


class JsonLines:
    """Every event as a line of JSON on a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: Event) -> None:
        """Write the event."""
        write_line(self._stream, event_line(event))

    def close(self) -> None:
        """Nothing is left open."""
