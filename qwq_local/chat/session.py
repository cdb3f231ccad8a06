"""The state of a chat between two lines: its model, its conversation, waiting files, the running turn."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from qwq_local.backend.api import Backend
from qwq_local.chat.conversation import Conversation
from qwq_local.chat.events import ChatStatus
from qwq_local.chat.model import ChatModel, ChatSetup
from qwq_local.dialogue.control import ReplyControl
from qwq_local.dialogue.conversation import Attachment, Framing
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnRecord


class LiveTurn:
    """The turn that runs now, if any, for any thread. Without a turn only `stop` matters: it stops the next
    turn of the line.
    """

    def __init__(self) -> None:
        # A signal handler may come in between on the thread that holds it.
        self._lock = threading.RLock()
        self._backend: Backend | None = None
        self._control = ReplyControl()  # that of the turn, or one that nothing reads
        self._is_stopped = False

    def begin_line(self) -> None:
        """A new line begins; an earlier stop does not concern it."""
        self._is_stopped = False

    def begin(self, backend: Backend) -> ReplyControl:
        """Start a turn; returns the control for its question."""
        with self._lock:
            self._backend, self._control = backend, ReplyControl()
            return self._control

    def end(self) -> None:
        """The turn is over."""
        with self._lock:
            self._backend, self._control = None, ReplyControl()

    def began(self) -> None:
        """The first event is there. A backend may forget a stop that came before it, so it is repeated."""
        with self._lock:
            if self._is_stopped and self._backend is not None:
                self._backend.stop()

    def stop(self) -> None:
        """End the turn, or the one that this line is about to begin."""
        with self._lock:
            self._is_stopped = True
            if self._backend is not None:
                self._backend.stop()

    def answer_now(self) -> None:
        """End the thinking and answer; ends a pause too."""
        self._control.answer_now()
        self._control.resume()

    def steer(self, text: str) -> None:
        """Put a sentence into the thinking; ends a pause too."""
        if text.strip():
            self._control.steer(text)
        self._control.resume()

    def pause(self) -> None:
        """Let the turn wait."""
        self._control.pause()

    def go_on(self) -> None:
        """End the pause."""
        self._control.resume()


@dataclass(frozen=True, slots=True)
class WaitingFile:
    """A file that waits for the next question; `tokens` is None where the backend does not count them."""

    attachment: Attachment
    tokens: int | None


class Session:
    """Everything that lasts from one line to the next.

    `edited_turn` is the turn whose question is being edited. `notices` are said after the turn. `offered` is
    the conversation that /continue opens while nothing was asked yet.
    """

    def __init__(self, setup: ChatSetup) -> None:
        """Raises ProfileError, ModelNotFound, UsageError."""
        self.setup = setup
        self.model = ChatModel(setup)
        self.conversation = Conversation(setup.archive)
        self.archive = setup.archive
        self.running = LiveTurn()
        self.attached: dict[str, WaitingFile] = {}
        self.edited_turn: TurnRecord | None = None
        self.offered: int | None = None
        self.notices: list[str] = []

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The files that wait for the next question."""
        return tuple(waiting.attachment for waiting in self.attached.values())

    def content(self, question: str, attachments: Sequence[Attachment] = ()) -> str:
        """The whole user message: files, question, the profile's suffix. Raises UsageError if it is empty."""
        framing = Framing("", tuple(attachments), self.model.profile.question_suffix)
        return framing.messages(question)[-1].content

    def move_to_memory(self) -> None:
        """Keep everything from here on in memory alone, because the archive cannot be written."""
        memory, model = Archive.private(), self.model
        self.conversation.move_to(memory, model.name, model.chosen.profile or "", model.profile.system)
        self.archive = memory

    def close(self) -> None:
        """Free the model; who opened the archive of the setup closes it."""
        self.model.backend.close()
        if self.archive is not self.setup.archive:
            self.archive.close()

    def status(self) -> ChatStatus:
        """What the status line shows now: of the context, what the next question finds in use."""
        last, planned = self.conversation.last, self.model.planned
        used = last.stats.prompt_tokens + last.stats.answer_tokens if last is not None else 0
        return ChatStatus(
            model=planned.model if planned is not None else self.model.name,
            n_ctx=planned.n_ctx if planned is not None else 0,
            used_tokens=used,
            yarn_factor=planned.yarn_factor if planned is not None else 1.0,
            conversation="not kept" if self.archive.is_private else self.conversation.name,
            attached=len(self.attached),
        )


def thought_numbers(turns: Sequence[TurnRecord]) -> str:
    """The numbers of some turns' thoughts: `thought 3`, `thoughts 1-4`, `thoughts 1, 3`."""
    numbers = [turn.number for turn in turns]
    if len(numbers) == 1:
        return f"thought {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"thoughts {numbers[0]}-{numbers[-1]}"
    return f"thoughts {', '.join(map(str, numbers))}"
