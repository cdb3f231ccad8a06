"""A conversation line by line, for pipes, files and terminals that cannot draw.

Answers go to stdout, everything else to stderr, as with one question. An entry that begins with three quotes
continues until a line ends with three quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from qwq_local.chat.events import (
    Asking,
    ChatEvent,
    ChatStatus,
    Copy,
    Edit,
    Leave,
    Page,
    Recalled,
    Said,
    Shown,
    Talk,
    ThinkView,
    ViewChanged,
)
from qwq_local.events import Finished, FinishReason
from qwq_local.terminal.ask_screen import AskScreen, Think
from qwq_local.terminal.chat_lines import lines_of
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.sanitizer import sanitize

QUOTES = '"""'
PROMPT, MORE = ">>> ", "... "

ReadLine = Callable[[str], str | None]
"""Returns the next line without its line end, or None at the end; its argument is the prompt."""


class PlainChat:
    """Runs a Talk over two streams. A signal handler calls `interrupt`."""

    def __init__(
        self, talk: Talk, read_line: ReadLine, out: Output, err: Output, clock: Clock, view: ThinkView | None
    ) -> None:
        """`view` None shows the thinking where stderr is a terminal."""
        self._talk = talk
        self._read_line = read_line
        self._out = out
        self._err = err
        self._clock = clock
        self._view = view
        self._is_busy = self._is_stopping = self._leaves = False
        self._has_failed = self._unedited = False
        self._can_continue = True

    def run(self) -> bool:
        """Run every line. Returns whether all of them succeeded."""
        with closing(self._talk):
            self._show(self._talk.start())
            while not self._leaves and (entry := self._next_entry()) is not None:
                if entry.strip():
                    self._show(self._talk.submit(entry))
                if self._unedited:
                    # Without an editor nothing was changed: the next question is a new one.
                    self._unedited = False
                    self._show(self._talk.submit(""))
        return not self._has_failed

    def interrupt(self) -> None:
        """Ctrl-C: stop the running line. Raises KeyboardInterrupt the second time, or when nothing runs."""
        if not self._is_busy or self._is_stopping:
            raise KeyboardInterrupt
        self._is_stopping = True
        self._talk.stop()

    def _next_entry(self) -> str | None:
        """The next question or command. The first Ctrl-C at the prompt only warns."""
        is_warned = False
        while True:
            try:
                return read_entry(self._read_line)
            except KeyboardInterrupt:
                if self._err.is_terminal:
                    self._err.write("\n")
                if is_warned or not self._err.is_terminal:
                    raise
                is_warned = True
                self._err.write("Ctrl-C again leaves.\n")

    def _show(self, events: Iterator[ChatEvent]) -> None:
        self._is_busy, self._is_stopping = True, False
        think: Think | None = "hide" if self._view is ThinkView.OFF else "show"
        try:
            screen = AskScreen(self._out, self._err, self._clock, think if self._view else None)
            with closing(screen):
                for event in events:
                    self._show_one(event, screen)
        finally:
            self._is_busy = False

    def _show_one(self, event: ChatEvent, screen: AskScreen) -> None:
        match event:
            case _ if isinstance(event, Shown):
                self._has_failed |= isinstance(event, Said) and event.is_error
                self._lines(screen, lines_of(event))
            case Page(title, text):
                self._lines(screen, (title, *text.split("\n")))
            case Recalled(question, thought, _, _, answer):
                self._lines(screen, (f"{PROMPT}{question}", f"▸ thought {thought}", *answer.split("\n")))
            case Copy() | Edit():
                self._has_failed = True
                self._unedited = isinstance(event, Edit)
                self._lines(screen, ("that needs a terminal that can draw.",))
            case Finished(FinishReason.INTERRUPTED):
                screen.show(event)
                self._lines(screen, (f"■ stopped{' · /continue goes on' if self._can_continue else ''}",))
            case ViewChanged(view):
                self._view = view
            case Leave():
                self._leaves = True
            case Asking():
                self._can_continue = event.can_continue
                screen.number(event.thought)
            case ChatStatus():
                pass
            case _:
                screen.show(event)

    def _lines(self, screen: AskScreen, lines: Sequence[str]) -> None:
        screen.close()
        self._err.write("".join(f"{sanitize(line)}\n" for line in lines))


def read_entry(read_line: ReadLine) -> str | None:
    """The next line, or the text between three quotes, closed or not; None at the end."""
    first = read_line(PROMPT)
    if first is None or not first.lstrip().startswith(QUOTES):
        return first
    lines: list[str] = []
    line: str | None = first.lstrip()[len(QUOTES) :]
    while line is not None:
        if line.rstrip().endswith(QUOTES):
            lines.append(line.rstrip()[: -len(QUOTES)])
            break
        lines.append(line)
        line = read_line(MORE)
    return "\n".join(lines).strip("\n")
