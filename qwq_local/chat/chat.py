"""A chat as a front end sees it: it takes lines and returns events. It implements events.Talk.

`submit` runs in one thread at a time; methods that stop, steer or complete may be called from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from qwq_local.backend.api import Backend
from qwq_local.chat.commands.context import droppable_lines
from qwq_local.chat.commands.conversation import edited_question, new_question
from qwq_local.chat.commands.history import resume
from qwq_local.chat.commands.registry import completions, find_command, parse
from qwq_local.chat.conversation import short_title
from qwq_local.chat.events import Asking, ChatEvent, ChatStatus, Completion, Said, say
from qwq_local.chat.model import ChatSetup
from qwq_local.chat.session import Session
from qwq_local.errors import Aborted, PromptTooLong, QwqError, UsageError
from qwq_local.history.records import TurnRecord, TurnState

_OFFERED = 3
_REMEMBERED_S = 30.0


class Chat:
    """A chat over an archive and the backends that it makes; free them with `close`."""

    def __init__(self, opened: ChatSetup) -> None:
        """Loads no weights. Raises ProfileError, ModelNotFound, UsageError."""
        # Listing the models reads many headers, and completion asks with every key.
        self._session = Session(replace(opened, model_names=_remembered(opened.model_names)))
        self._last_status: ChatStatus | None = None
        self._running: Generator[ChatEvent] | None = None
        turn = self._session.running
        self.stop, self.answer_now, self.steer = turn.stop, turn.answer_now, turn.steer
        self.pause, self.go_on = turn.pause, turn.go_on

    @property
    def backend(self) -> Backend:
        """The backend that answers now."""
        return self._session.model.backend

    def start(self) -> Iterator[ChatEvent]:
        """What to show before the first line: a resumed conversation, notices, an offer to continue."""
        return self._run(self._started())

    def submit(self, line: str) -> Iterator[ChatEvent]:
        """Run a line: ask the model, or run a /command. Errors come out as Said. `stop` is now for it."""
        self._session.running.begin_line()
        return self._run(self._events(line))

    def complete(self, before_cursor: str) -> Sequence[Completion]:
        """What may be put at the cursor, the likeliest first; quick."""
        return completions(self._session, before_cursor)

    def close(self) -> None:
        """Write a turn whose events were not all read, and free the model; the archive stays open."""
        try:
            if self._running is not None:
                self._running.close()
        finally:
            self._session.close()

    def _started(self) -> Iterator[ChatEvent]:
        session = self._session
        setup = session.setup
        notices = [*setup.archive.notices, *session.model.chosen.resolved.notices]
        if notices:
            yield say(*notices)
        lost = {turn.id: turn for turn in setup.archive.lost()}
        # Another program may have noticed the lost turn first.
        if (latest := setup.archive.latest()) is not None:
            last = setup.archive.path(latest.id, with_tokens=False)[-1:]
            lost |= {turn.id: turn for turn in last if turn.state is TurnState.LOST}
        if setup.resume is not None:
            yield from resume(
                session,
                setup.archive.conversation(setup.resume),
                takes_system="system" not in session.model.chosen.settings,
            )
        offers = [turn for turn in lost.values() if turn.conversation != session.conversation.id]
        if offers and session.model.can_continue():
            if len(offers) == 1 and session.conversation.id is None:
                session.offered = offers[0].conversation
            yield say(*map(self._offer, offers[:_OFFERED]))
        for line in setup.entered:
            yield from self._events(line)

    def _offer(self, turn: TurnRecord) -> str:
        record = self._session.archive.conversation(turn.conversation)
        resume = f"/resume {record.id}"
        goes_on = (
            f"/continue goes on, {resume} opens it" if self._session.offered else f"{resume}, then /continue"
        )
        return (
            f"thought {turn.number} of {short_title(record)!r} was cut off when its process ended: {goes_on}."
        )

    def _events(self, line: str) -> Iterator[ChatEvent]:
        _check_unicode(line)
        session = self._session
        edited, session.edited_turn = session.edited_turn, None
        if (command := parse(line)) is not None:
            name, arguments = command
            yield from find_command(session, name).handler(session, arguments)
        elif line.strip() and edited is not None:
            yield from edited_question(session, edited, line.strip())
        elif line.strip():
            yield from new_question(session, line.strip())
        elif session.attached:
            yield say("the attached files wait for a question.")

    def _run(self, events: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
        self._running = self._guarded(events)
        return self._running

    def _guarded(self, events: Iterator[ChatEvent]) -> Generator[ChatEvent]:
        """The events, an error as a line, and at the end what the status line shows, if that changed."""
        is_turn = False
        try:
            for event in events:
                is_turn = is_turn or isinstance(event, Asking)
                yield event
        except Aborted:
            yield say("stopped.")
        except PromptTooLong as error:
            yield Said((str(error), *droppable_lines(self._session)), is_error=True)
        except QwqError as error:
            yield Said((str(error),), is_error=True)
        # A status line is not worth an error.
        with suppress(QwqError):
            status = self._session.status()
            # After a turn the screen shows its own count.
            if is_turn or status != self._last_status:
                self._last_status = status
                yield status


def _check_unicode(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start + 1:,} is half a surrogate pair: give valid Unicode text."
        ) from None


def _remembered(names: Callable[[], Sequence[str]]) -> Callable[[], Sequence[str]]:
    """The names, looked up again only after a while."""
    found: tuple[float, Sequence[str]] | None = None

    def remembered() -> Sequence[str]:
        nonlocal found
        now = time.monotonic()
        if found is None or now - found[0] > _REMEMBERED_S:
            found = (now, names())
        return found[1]

    return remembered
