"""The entries that wait, the one that runs, and the thread in which it runs.

Lines go to the Talk one at a time. Its events come back through a queue, so typing never waits for a token.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwq_local.chat.events import COMMAND, ChatEvent, Said, Talk
from qwq_local.terminal.layout import DIM, Row, RowLayout, RowStyle
from qwq_local.terminal.repl.input_line import block_content
from qwq_local.terminal.repl.paste import Pastes
from qwq_local.terminal.repl.renderer import BottomArea
from qwq_local.terminal.repl.turn_view import TurnView
from qwq_local.terminal.sanitizer import one_line

MAX_ROWS = 3
"""Rows for the entries that wait, at most."""


@dataclass(frozen=True, slots=True)
class LineEnded:
    """A line is done."""


@dataclass(frozen=True, slots=True)
class TalkFailed:
    """The Talk raised an error and takes no more lines."""

    error: BaseException


class TalkThread:
    """Runs the lines of a Talk one after the other, in a thread that calls `wake` when there are new events.

    It calls `wake` once and then not until `is_awake` is reset, however many events come in between.
    """

    def __init__(self, talk: Talk, wake: Callable[[], None]) -> None:
        self.events: deque[ChatEvent | LineEnded | TalkFailed] = deque()
        self.talk = talk
        self.is_awake = False
        self._wake = wake
        self._lines: queue.SimpleQueue[Iterator[ChatEvent] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="talk", daemon=True)

    def begin(self) -> None:
        """Start the thread; it begins with what the Talk says before the first line."""
        self._thread.start()

    def submit(self, line: str) -> None:
        """Run a line after those before it."""
        self._lines.put(self.talk.submit(line))

    @property
    def is_done(self) -> bool:
        """Whether the line is done, even if the screen has not taken all of its events."""
        return bool(self.events) and isinstance(self.events[-1], LineEnded)

    def finish(self) -> None:
        """Wait for the running line and end the thread."""
        self._lines.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            line: Iterator[ChatEvent] | None = self.talk.start()
            while line is not None:
                for event in line:
                    self._add(event)
                self._add(LineEnded())
                line = self._lines.get()
        except BaseException as error:  # every error belongs to the thread that can show it
            self._add(TalkFailed(error))

    def _add(self, event: ChatEvent | LineEnded | TalkFailed) -> None:
        self.events.append(event)
        if not self.is_awake:
            self.is_awake = True
            self._wake()


class EntryQueue:
    """Entries of the input line: one runs, the others wait. For the main thread."""

    def __init__(self, thread: TalkThread, view: TurnView, pastes: Pastes, bottom: BottomArea) -> None:
        self._thread = thread
        self._talk = thread.talk
        self._view = view
        self._pastes = pastes
        self._bottom = bottom
        self.waiting: deque[str] = deque()
        self._command = ""  # of a key that was pressed while a finished turn was being written
        self._is_stopping = self._is_leaving = False
        self._is_silent = False  # the running line has produced no event yet
        self.is_busy = False

    @property
    def can_stop(self) -> bool:
        """Whether Ctrl-C stops something: a turn, or a line that may become one."""
        runs = self._view.is_busy or self._is_silent
        return runs and not self._is_stopping and not self._thread.is_done

    def enter(self, entry: str) -> None:
        """Run an entry now, or after those that wait."""
        text = block_content(entry)
        if self._pastes.expand(text).strip():
            self.waiting.append(text)
            self._run_next()

    def enter_edited(self, text: str) -> None:
        """Run a text from the editor before those that wait; an empty one ends the editing in the Talk."""
        self.waiting.appendleft(block_content(text))
        self._run_next()

    def look_up(self, command: str) -> None:
        """Run the command of a key, unless a turn runs."""
        if self._view.is_busy:
            self._bottom.hint("a turn still runs")
        else:
            self._command = command
            self._run_next()

    def show(self, event: ChatEvent) -> None:
        """Draw an event of the running line."""
        self._is_silent = False
        self._view.show(event)

    def end_line(self) -> None:
        """The running line is done: run the next one."""
        self.is_busy = self._is_stopping = self._is_silent = False
        self._view.end_line()
        self._run_next()

    def stop(self) -> str:
        """Stop the running line. Returns the entries that waited, to stand in the input line again."""
        self._is_stopping = True
        self._talk.stop()
        text = "\n\n".join(self.waiting)
        self.waiting.clear()
        return text

    def answer_now(self) -> None:
        """End the thinking and answer."""
        if self._view.is_thinking:
            self._talk.answer_now()
        else:
            self._bottom.hint("no thought runs")

    def pause(self) -> bool:
        """Pause the thinking for a sentence. Returns whether there is any thinking."""
        if not self._view.is_thinking or self._is_stopping:
            self._bottom.hint("no thought runs")
            return False
        self._talk.pause()
        return True

    def resume(self, sentence: str = "") -> None:
        """End the pause, with a sentence for the thinking or without."""
        if sentence.strip():
            self._talk.steer(sentence.strip())
        self._talk.go_on()

    def leave(self) -> None:
        """Stop the running line and forget the entries that wait."""
        self._is_leaving = True
        self.waiting.clear()
        if self.is_busy:
            self._talk.go_on()
            self._talk.stop()

    def rows(self, columns: int, has_color: bool) -> list[Row]:
        """One row for each of the first entries that wait, and a count of the others."""
        # Only the beginning of a long entry is looked at.
        lines = [f"⋯ waiting: {self._pastes.shown(text[: 4 * columns])}" for text in self.waiting]
        if len(lines) > MAX_ROWS:
            lines[MAX_ROWS - 1 :] = [f"⋯ {len(lines) - MAX_ROWS + 1} more waiting"]
        layout = RowLayout(columns, has_color)
        return [layout.row(one_line(line, columns), RowStyle(DIM)) for line in lines]

    def _run_next(self) -> None:
        if self.is_busy or self._is_leaving:
            return
        if self._command:
            line, self._command = self._command, ""
        elif self.waiting:
            entry = self.waiting.popleft()
            line = self._pastes.expand(entry)
            if COMMAND.fullmatch(entry):
                # A question is shown by the turn that answers it.
                self._view.show(Said(("", f"❯ {self._pastes.shown(entry)}")))
        else:
            return
        self.is_busy = self._is_silent = True
        self._thread.submit(line)
