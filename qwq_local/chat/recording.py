"""What a turn writes down while it runs: its events in, rows of the archive and the session's turns out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qwq_local.chat.session import Session
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Planned,
    Prefill,
    Thinking,
    ThinkingClosed,
)
from qwq_local.history.recorder import TurnRecorder
from qwq_local.history.records import TurnOrigin, TurnRecord


class Recording:
    """What a turn leaves in the archive and the session, from its plan on.

    `has_grown` once text came, `closed` and `reason` say how thinking and turn ended, so far as they did.
    """

    def __init__(
        self, session: Session, begin: Callable[[], TurnRecorder], resumed: TurnRecord | None = None
    ) -> None:
        """A turn that is `resumed` keeps the origin that it has."""
        self._session = session
        self._begin = begin
        self._resumed = resumed
        self._recorder: TurnRecorder | None = None
        self._needs_origin = True
        self.has_grown = False
        self.closed: CloseReason | None = None
        self.reason: FinishReason | None = None

    def take(self, event: Event) -> None:
        """Write the next event down; the first plan begins the turn in the archive. Raises HistoryError."""
        answering = self._session.answering
        if isinstance(event, Planned):
            answering.planned = event
            if self._recorder is None:
                self._recorder = self._begin()
            if self._needs_origin:
                self._recorder.set_origin(self._origin(event, 0))
        if self._recorder is None:
            return
        if isinstance(event, Prefill) and self._needs_origin and answering.planned is not None:
            # Only the first one tells what was cached before it began.
            self._needs_origin = False
            self._recorder.set_origin(self._origin(answering.planned, event.cached))
        self._recorder.feed(event)
        match event:
            case Thinking() | Answer():
                self.has_grown = True
            case ThinkingClosed():
                self.closed = event.reason
            case Finished():
                self.reason = event.reason
            case _:
                pass

    @property
    def problems(self) -> list[str]:
        """Why the turn could not be written, if so."""
        problem = self._recorder.problem if self._recorder is not None else None
        return [problem] if problem else []

    def close(self) -> TurnRecord | None:
        """The turn as it was written; None when it failed before anything came of it."""
        if self._recorder is None:
            return None
        self._recorder.close()
        conversation = self._session.conversation
        turn = self._session.archive.turn(self._recorder.turn_id)
        if not (self.reason or turn.thinking or turn.answer):
            conversation.back_to(conversation.last)
            return None
        conversation.take(turn)
        return turn

    def _origin(self, planned: Planned, cached_tokens: int) -> TurnOrigin:
        """What the turn comes from; a continued turn keeps what it began with."""
        if self._resumed is not None and self._resumed.origin is not None:
            return replace(self._resumed.origin, is_continued=True)
        return self._session.answering.origin(planned, cached_tokens)
