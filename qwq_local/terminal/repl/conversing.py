"""What runs, what waits, and what a person does about it, between the screen and the conversation's thread.

Comes in: entries of the input line and wishes. Goes out: lines for the Talk, one at a time, and hints. Lives
in the main thread. Knows no keys and no terminal.
"""

from __future__ import annotations

from qwq_local.chat.events import COMMAND, Said, Talk
from qwq_local.terminal.repl import block
from qwq_local.terminal.repl.bottom import Bottom
from qwq_local.terminal.repl.paste import Pastes
from qwq_local.terminal.repl.talking import Talking
from qwq_local.terminal.repl.view import TurnView
from qwq_local.terminal.repl.waiting import Waiting


class Conversing:
    """One line runs, the others wait."""

    def __init__(
        self, talk: Talk, talking: Talking, view: TurnView, waiting: Waiting, pastes: Pastes, bottom: Bottom
    ) -> None:
        self._talk = talk
        self._talking = talking
        self._view = view
        self._waiting = waiting
        self._pastes = pastes
        self._bottom = bottom
        self._is_busy = self._is_stopping = self._is_leaving = False

    @property
    def is_busy(self) -> bool:
        """Whether a line is being done."""
        return self._is_busy

    @property
    def can_stop(self) -> bool:
        """Whether there is something to stop: not what is done and only waits to be shown."""
        return self._is_busy and not self._is_stopping and not self._talking.is_done

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
        text = block.content(entry)
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
        """Do a command that a key stands for; nothing while something runs."""
        if self._is_busy:
            self._bottom.hint("a turn still runs")
        else:
            self._is_busy = True
            self._talking.submit(command)

    def ended(self) -> None:
        """The running line was done: the next one's turn."""
        self._is_busy = self._is_stopping = False
        if self._view.is_busy:
            self._view.abandon()
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
        entry = self._waiting.next()
        if entry is None:
            return
        if COMMAND.fullmatch(entry):
            # A question is shown by the turn that answers it.
            self._view.show(Said(("", f"❯ {self._pastes.shown(entry)}")))
        self._is_busy = True
        self._talking.submit(self._pastes.expand(entry))
