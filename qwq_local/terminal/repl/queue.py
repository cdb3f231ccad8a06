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
"""Rows that the waiting prompts take at most."""


class EntryQueue:
    """The inputs that wait, first come first served."""

    def __init__(self, pastes: Pastes, has_color: bool) -> None:
        self._inputs: deque[str] = deque()
        self._pastes = pastes
        self._has_color = has_color

    def __len__(self) -> int:
        return len(self._inputs)

    def add(self, text: str) -> None:
        """Let an input wait behind the others."""
        self._inputs.append(text)

    def add_first(self, text: str) -> None:
        """Let an input wait before all others."""
        self._inputs.appendleft(text)

    def next(self) -> str | None:
        """The input whose turn it is, if any; it waits no longer."""
        return self._inputs.popleft() if self._inputs else None

    def take_back(self) -> str | None:
        """The input that came last, if any; it waits no longer."""
        return self._inputs.pop() if self._inputs else None

    def take_back_all(self) -> str:
        """All inputs with a blank line between them; none waits any longer."""
        text = "\n\n".join(self._inputs)
        self._inputs.clear()
        return text

    def rows(self, columns: int, most: int = MAX_ROWS) -> list[Row]:
        """One row for each of the first few, and a count of the others."""
        shown = list(self._inputs)
        left_out = 0
        if len(shown) > most:
            left_out = len(shown) - most + 1
            shown = shown[: most - 1]
        # The excerpt is of the start: no more of a long input is looked at.
        lines = [f"⋯ waiting: {self._pastes.shown(text[: 4 * columns])}" for text in shown]
        if left_out:
            lines.append(f"⋯ {left_out} more waiting" if shown else f"⋯ {left_out} waiting")
        paper = RowLayout(columns, self._has_color)
        return [paper.row(one_line(line, columns), RowStyle(DIM)) for line in lines]


@dataclass(frozen=True, slots=True)
class LineEnded:
    """A line was done."""


@dataclass(frozen=True, slots=True)
class TalkFailed:
    """The conversation broke; no more lines are taken."""

    error: BaseException


class TalkThread:
    """Runs a Talk in a thread; `wake` is called from there."""

    def __init__(self, talk: Talk, wake: Callable[[], None]) -> None:
        self.events: deque[ChatEvent | LineEnded | TalkFailed] = deque()
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
        return bool(self.events) and isinstance(self.events[-1], LineEnded)

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
            self._add(TalkFailed(error))

    def _tell(self, events: Iterator[ChatEvent]) -> None:
        for event in events:
            self._add(event)
        self._add(LineEnded())

    def _add(self, event: ChatEvent | LineEnded | TalkFailed) -> None:
        self.events.append(event)
        if not self._is_awake:
            self._is_awake = True
            self._wake()


class EntryRunner:
    """One line runs, the others wait."""

    def __init__(
        self,
        talk: Talk,
        talking: TalkThread,
        view: TurnView,
        waiting: EntryQueue,
        pastes: Pastes,
        bottom: BottomArea,
    ) -> None:
        self._talk = talk
        self._talking = talking
        self._view = view
        self._waiting = waiting
        self._pastes = pastes
        self._bottom = bottom
        self._is_busy = self._is_stopping = self._is_leaving = False
        self._is_silent = False  # nothing came of the running line yet
        self._command = ""  # of a key that was pressed while a finished turn was being written

    @property
    def is_busy(self) -> bool:
        """Whether a line is being done."""
        return self._is_busy

    @property
    def can_stop(self) -> bool:
        """Whether Ctrl-C stops something: a turn, or a line that has not said yet what it is."""
        runs = self._view.is_busy or self._is_silent
        return runs and not self._is_stopping and not self._talking.is_done

    @property
    def has_waiting(self) -> bool:
        """Whether entries wait."""
        return len(self._waiting) > 0

    def begin(self) -> None:
        """Let the Talk say what is to be said first."""
        self._is_busy = True
        self._talking.begin()

    def enter(self, entry: str, is_first: bool = False) -> None:
        """Do an entry of the input line, now or when it is its turn."""
        text = block_content(entry)
        if not self._pastes.expand(text).strip():
            return
        if is_first:
            self._waiting.add_first(text)
        else:
            self._waiting.add(text)
        self._go_on()

    def give_up_edit(self) -> None:
        """Tell the Talk that nothing comes back from the editor: the next question is a new one."""
        self._waiting.add_first("")
        self._go_on()

    def look_up(self, command: str) -> None:
        """Do a command that a key stands for; not while a turn runs."""
        if self._view.is_busy:
            self._bottom.hint("a turn still runs")
        else:
            self._command = command
            self._go_on()

    def show(self, event: ChatEvent) -> None:
        """Draw what the running line says."""
        self._is_silent = False
        self._view.show(event)

    def ended(self) -> None:
        """The running line is done: start the next one."""
        self._is_busy = self._is_stopping = self._is_silent = False
        self._view.end_line()
        self._go_on()

    def stop(self) -> str:
        """End the running line; what waited comes back, to stand in the input line."""
        self._is_stopping = True
        self._talk.stop()
        return self._waiting.take_back_all()

    def take_back(self) -> str | None:
        """The entry that waits last, no longer."""
        return self._waiting.take_back()

    def answer_now(self) -> None:
        """End the thinking and answer."""
        if self._view.is_thinking:
            self._talk.answer_now()
        else:
            self._bottom.hint("no thought runs")

    def pause(self) -> bool:
        """Let the thinking wait for a sentence; whether there is a thought."""
        if not self._view.is_thinking or self._is_stopping:
            self._bottom.hint("no thought runs")
            return False
        self._talk.pause()
        return True

    def go_on(self, sentence: str = "") -> None:
        """End the pause, with a sentence for the thinking or without."""
        if sentence.strip():
            self._talk.steer(sentence.strip())
        self._talk.go_on()

    def leave(self) -> None:
        """Do nothing more: end the running line and forget those that wait."""
        self._is_leaving = True
        self._waiting.take_back_all()
        if self._is_busy:
            self._talk.go_on()
            self._talk.stop()

    def _go_on(self) -> None:
        if self._is_busy or self._is_leaving:
            return
        if self._command:
            command, self._command = self._command, ""
            self._submit(command)
            return
        entry = self._waiting.next()
        if entry is None:
            return
        if COMMAND.fullmatch(entry):
            # A question is shown by the turn that answers it.
            self._view.show(Said(("", f"❯ {self._pastes.shown(entry)}")))
        self._submit(self._pastes.expand(entry))

    def _submit(self, line: str) -> None:
        self._is_busy = self._is_silent = True
        self._talking.submit(line)
