"""The conversation as the screen sees it: lines in, events out. Implements events.Talk; knows no terminal.

`submit` runs in one thread at a time; what stops, steers or completes is for any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from qwq_local.chat import conversing
from qwq_local.chat.commands import find_command, parse
from qwq_local.chat.completing import completions
from qwq_local.chat.conversation import called
from qwq_local.chat.events import Asking, Changed, ChatEvent, Completion, Said
from qwq_local.chat.session import Session
from qwq_local.chat.setup import ChatSetup
from qwq_local.chat.weighing import what_can_go
from qwq_local.engine.api import Aborted
from qwq_local.errors import PromptTooLong, QwqError, UsageError
from qwq_local.history.records import TurnRecord, TurnState

_OFFERED = 3
_REMEMBERED_S = 30.0


class Chat:
    """A chat over an archive and the backends that it makes; free them with `close`."""

    def __init__(self, opened: ChatSetup) -> None:
        """Raises ProfileError, ModelNotFound or UsageError for what was asked for. No weights are loaded."""
        # Listing the models reads many headers, and completion asks with every key.
        self._session = Session.of(replace(opened, model_names=_remembered(opened.model_names)))
        self._told: Changed | None = None
        self._doing: Generator[ChatEvent] | None = None

    def start(self) -> Iterator[ChatEvent]:
        """What is to be shown before the first line: a resumed conversation, notices, an offer to go on."""
        return self._done_guarded(self._started())

    def submit(self, line: str) -> Iterator[ChatEvent]:
        """Do what the person entered: ask the model, or a /command. Errors come out as Said."""
        return self._done_guarded(self._done(line))

    def stop(self) -> None:
        """End the running turn; what came stays."""
        self._session.running.stop()

    def answer_now(self) -> None:
        """End the thinking and answer."""
        self._session.running.answer_now()

    def steer(self, text: str) -> None:
        """Put a sentence into the thinking and go on."""
        self._session.running.steer(text)

    def pause(self) -> None:
        """Let the running turn wait."""
        self._session.running.pause()

    def go_on(self) -> None:
        """End the pause."""
        self._session.running.go_on()

    def complete(self, before_cursor: str) -> Sequence[Completion]:
        """What may stand at the cursor, the likeliest first; quick."""
        return completions(self._session.setup, self._session.archive, before_cursor)

    def close(self) -> None:
        """Write the turn whose events were not all taken, and free the model; the archive is its opener's."""
        try:
            if self._doing is not None:
                self._doing.close()
        finally:
            self._session.close()

    def _started(self) -> Iterator[ChatEvent]:
        session = self._session
        setup = session.setup
        notices = [*setup.archive.notices, *session.answering.chosen.resolved.notices]
        if notices:
            yield Said(tuple(notices))
        lost = {turn.id: turn for turn in setup.archive.lost()}
        # One that another program noticed first.
        if (latest := setup.archive.latest()) is not None:
            last = setup.archive.path(latest.id, with_tokens=False)[-1:]
            lost |= {turn.id: turn for turn in last if turn.state is TurnState.LOST}
        if setup.resume is not None:
            yield from conversing.resumed(
                session, setup.archive.conversation(setup.resume), takes_over=setup.system is None
            )
        offers = [turn for turn in lost.values() if turn.conversation != session.conversation.id]
        if offers:
            if len(offers) == 1 and session.conversation.id is None:
                session.offered = offers[0].conversation
            yield Said(tuple(self._offer(turn) for turn in offers[:_OFFERED]))
        for line in setup.entered:
            yield from self._done(line)

    def _offer(self, turn: TurnRecord) -> str:
        record = self._session.archive.conversation(turn.conversation)
        resume = f"/resume {record.id}"
        goes_on = (
            f"/continue goes on, {resume} opens it" if self._session.offered else f"{resume}, then /continue"
        )
        return f"thought {turn.number} of {called(record)!r} was cut off when its process ended: {goes_on}."

    def _done(self, line: str) -> Iterator[ChatEvent]:
        _check_unicode(line)
        session = self._session
        replacing, session.replacing = session.replacing, None
        command = parse(line)
        if command is not None:
            name, arguments = command
            yield from find_command(name).handler(session, arguments)
        elif line.strip():
            if replacing is not None:
                yield from conversing.edited_question(session, replacing, line.strip())
            else:
                yield from conversing.new_question(session, line.strip())
        elif session.attached:
            yield Said(("the attached files wait for a question.",))

    def _done_guarded(self, events: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
        self._doing = self._guarded(events)
        return self._doing

    def _guarded(self, events: Iterator[ChatEvent]) -> Generator[ChatEvent]:
        """The events, an error as a line, and at their end what the status line shows, if that changed."""
        is_turn = False
        try:
            for event in events:
                is_turn = is_turn or isinstance(event, Asking)
                yield event
        except Aborted:
            yield Said(("stopped.",))
        except PromptTooLong as error:
            yield Said((str(error), *what_can_go(self._session)), is_error=True)
        except QwqError as error:
            yield Said((str(error),), is_error=True)
        # A status line is not worth an error.
        with suppress(QwqError):
            changed = self._session.changed()
            # After a turn the screen has counted by itself.
            if is_turn or changed != self._told:
                self._told = changed
                yield changed


def _check_unicode(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start + 1:,} is half a surrogate pair: give valid Unicode text."
        ) from None


def _remembered(names: Callable[[], Sequence[str]]) -> Callable[[], Sequence[str]]:
    """The same names for a while, so that they are not looked for with every call."""
    found: tuple[float, Sequence[str]] | None = None

    def remembered() -> Sequence[str]:
        nonlocal found
        now = time.monotonic()
        if found is None or now - found[0] > _REMEMBERED_S:
            found = (now, names())
        return found[1]

    return remembered
