"""Records a turn in a thread of its own: an answer never waits for the history, nor fails because of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from qwq_local.errors import QwqError
from qwq_local.events import Answer, Finished, Planned, Prefill, Thinking
from qwq_local.history.archive import Archive
from qwq_local.history.recorder import TurnRecorder
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
        self._find_origin = origin
        self._origin = TurnOrigin("")
        self._items: queue.SimpleQueue[TurnEvent | Prefill | TurnOrigin | None] = queue.SimpleQueue()
        self._notices: list[str] = []
        self._thread: threading.Thread | None = None

    def feed(self, event: object) -> None:
        """Take the next event; returns at once. What is no event of a turn is ignored."""
        if not isinstance(event, TurnEvent | Prefill):
            return
        if self._thread is None:
            self._origin = self._find_origin()
            self._thread = threading.Thread(target=self._run, name="background history", daemon=True)
            self._thread.start()
            self._items.put(self._origin)
        if isinstance(event, Planned):
            self._origin = replace(
                self._origin, seed=event.seed, yarn_factor=event.yarn_factor, kv_type=event.kv_type
            )
            self._items.put(self._origin)
        if isinstance(event, Prefill) and not self._origin.cached_tokens:
            self._origin = replace(self._origin, cached_tokens=event.cached)
            self._items.put(self._origin)
        self._items.put(event)

    def close(self) -> list[str]:
        """Wait until the turn is written; what the user should know, one line each. Harmless twice."""
        if self._thread is None:
            return []
        self._items.put(None)
        self._thread.join(_WAIT_AT_END_S)
        if self._thread.is_alive():
            return ["this turn is not being kept: the history takes too long to write."]
        notices, self._notices = self._notices, []
        return notices

    def _run(self) -> None:
        try:
            with self._open_archive() as archive:
                self._notices += archive.notices
                self._record(archive)
        except QwqError as error:
            self._notices.append(f"this turn is not being kept: {error}")

    def _record(self, archive: Archive) -> None:
        asked = self.asked
        model, profile = self._origin.model, self._origin.profile
        conversation = asked.conversation
        if conversation is None:
            conversation = archive.begin(model, profile, asked.system, command=asked.command)
        elif archive.conversation(conversation).system != asked.system:
            archive.set_system(conversation, asked.system)
        start = TurnStart(
            conversation,
            asked.parent,
            asked.question,
            asked.content,
            asked.files,
            profile,
        )
        recorder = archive.begin_turn(start)
        if self._feed(recorder):
            recorder.close()
            self._notices += filter(None, [recorder.problem])
        elif asked.conversation is None:
            recorder.close()
            archive.remove(conversation)
        else:
            recorder.close()
            archive.set_head(conversation, asked.parent)

    def _feed(self, recorder: TurnRecorder) -> bool:
        """Pass on all that comes; whether any text or an end came, so that the turn is worth keeping."""
        has_grown = False
        while (item := self._items.get()) is not None:
            if isinstance(item, TurnOrigin):
                recorder.set_origin(item)
                continue
            has_grown = has_grown or isinstance(item, Thinking | Answer | Finished)
            recorder.feed(item)
        return has_grown
