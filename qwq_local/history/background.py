"""Records a turn in a thread of its own: an answer never waits for the history, nor fails because of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from qwq_local.errors import QwqError
from qwq_local.events import Answer, Finished, Thinking
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnEvent, TurnOrigin, TurnStart

# A history that another process writes is waited for, one that hangs is not.
_WAIT_AT_END_S = 15.0


@dataclass(frozen=True, slots=True)
class AskedTurn:
    """A turn to be recorded: in conversation `conversation` after turn `parent`, or in a new conversation.

    `system` is the system prompt of the conversation from now on.
    """

    command: str
    question: str
    content: str
    system: str = ""
    files: tuple[str, ...] = ()
    conversation: int | None = None
    parent: int | None = None


class BackgroundRecorder:
    """Takes the events of one reply; `close` says what became of them.

    `open_archive` is called in the thread, with the first event that belongs to a turn. `origin` is what the
    turn is computed with, as far as it is known before the plan. `asked` may be replaced before that event.
    """

    def __init__(
        self, open_archive: Callable[[], Archive], asked: AskedTurn, origin: Callable[[], TurnOrigin]
    ) -> None:
        self._open_archive = open_archive
        self.asked = asked
        self._origin = origin
        self._events: queue.SimpleQueue[TurnEvent | None] = queue.SimpleQueue()
        self._notices: list[str] = []
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()

    def feed(self, event: object) -> None:
        """Take the next event; returns at once. What is no event of a turn is ignored."""
        if not isinstance(event, TurnEvent):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(self._origin(),), daemon=True)
            self._thread.start()
        self._events.put(event)

    def close(self) -> list[str]:
        """Wait until the turn is written; what the user should know, one line each. Harmless twice."""
        if self._thread is None:
            return []
        self._events.put(None)
        if not self._is_over.wait(_WAIT_AT_END_S):
            return ["this turn is not being kept: the history takes too long to write."]
        notices, self._notices = self._notices, []
        return notices

    def _run(self, origin: TurnOrigin) -> None:
        try:
            with self._open_archive() as archive:
                self._notices += archive.notices
                if self._record(archive, origin):
                    self._is_over.set()  # nobody needs to wait until the file is closed
        except QwqError as error:
            self._notices.append(f"this turn is not being kept: {error}")
        finally:
            self._is_over.set()

    def _record(self, archive: Archive, origin: TurnOrigin) -> bool:
        """Record the turn up to its end; whether all of it is written."""
        asked, conversation = self.asked, self.asked.conversation
        if conversation is None:
            conversation = archive.begin(origin.model, origin.profile, asked.system, command=asked.command)
        elif archive.conversation(conversation).system != asked.system:
            archive.set_system(conversation, asked.system)
        recorder = archive.begin_turn(
            TurnStart(conversation, asked.parent, asked.question, asked.content, asked.files, origin)
        )
        is_worth_keeping = False
        while (event := self._events.get()) is not None:
            is_worth_keeping = is_worth_keeping or isinstance(event, Thinking | Answer | Finished)
            recorder.feed(event)
        recorder.close()
        if is_worth_keeping:
            self._notices += filter(None, [recorder.problem])
        elif asked.conversation is None:
            archive.remove(conversation)
        else:
            archive.set_head(conversation, asked.parent)
        return recorder.is_written
