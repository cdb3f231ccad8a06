"""How a turn runs: a question in, the backend's events out as they come, everything written to the archive.

A question that fails before it is planned is not written, and leaves the conversation as it was. Knows no
command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from qwq_local.backend.question import Question
from qwq_local.chat.conversation import history_messages
from qwq_local.chat.events import Asking, ChatEvent, Said, Shown
from qwq_local.chat.mending import mends
from qwq_local.chat.recording import Recording
from qwq_local.chat.session import Session, thoughts
from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.errors import HistoryError, QwqError
from qwq_local.events import FinishReason
from qwq_local.history.database import HistoryBusy
from qwq_local.history.recorder import TurnRecorder
from qwq_local.history.records import TurnRecord, TurnStart


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it is to be sent, after the turns `before` it.

    `question` is what the person typed and `content` the whole message; `files` are the names of the files
    in it and `file_texts` those as they stand there; `waiting` names those that wait no more once it is sent.
    """

    question: str
    content: str
    before: tuple[TurnRecord, ...]
    files: tuple[str, ...] = ()
    file_texts: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    seed: int | None = None


def question_of(session: Session, asked: Asked) -> Question:
    """The question for the backend: the turns before it that are sent, without their thinking."""
    sent = session.conversation.sent_of(asked.before)
    messages = history_messages(session.answering.profile.system, sent)
    return Question(
        [*messages, Message(Role.USER, asked.content)],
        seed=asked.seed,
        files=asked.file_texts,
        spared=sum(turn.stats.thinking_tokens for turn in sent),
        wants_tokens=True,
    )


def ask(
    session: Session, asked: Asked, price_of: Callable[[Question], Iterable[Shown]] = lambda _: ()
) -> Iterator[ChatEvent]:
    """Ask the model and write down the turn. Raises QwqError, and Aborted when stopped while it loads.

    The `price_of` the question is shown below it, before it is sent.
    """
    question = question_of(session, asked)
    yield Asking(asked.question, len(asked.before) + 1)
    yield from price_of(question)
    for silent in session.conversation.newly_left_out(asked.before):
        yield Said(
            (
                f"{thoughts([silent])} had no answer: its question is left out of what the model sees; "
                f"/retry-from {silent.number} asks it again.",
            )
        )
    yield from _answered(session, question, lambda: _begun(session, asked))


def go_on(session: Session, turn: TurnRecord) -> Iterator[ChatEvent]:
    """Go on with a turn from its last token. Raises what `ask` raises."""
    seed = turn.origin.seed if turn.origin is not None else None
    asked = Asked(turn.question, turn.content, session.conversation.turns[:-1], seed=seed)
    opening = Opening(turn.prompt, turn.generated, turn.steered)
    question = replace(question_of(session, asked), opening=opening)
    told = (turn.thinking, turn.answer, turn.steered, turn.thinking_s)
    yield Asking(turn.question, turn.number, True, *told)
    yield from _answered(session, question, lambda: session.archive.resume_turn(turn.id), turn)


def _begun(session: Session, asked: Asked) -> TurnRecorder:
    """The turn in the archive; in memory when that cannot be written, since the person wants to talk."""
    try:
        return _written(session, asked)
    except HistoryBusy:
        raise
    except HistoryError as error:
        session.go_on_in_memory()
        session.notices.append(f"{error} This conversation goes on in memory alone: /save keeps it.")
        upto = len(asked.before)
        return _written(session, replace(asked, before=session.conversation.turns[:upto]))


def _written(session: Session, asked: Asked) -> TurnRecorder:
    answering, conversation = session.answering, session.conversation
    profile = answering.chosen.profile or ""
    start = TurnStart(
        conversation.begin(answering.chosen.model, profile, answering.profile.system),
        parent=asked.before[-1].id if asked.before else None,
        question=asked.question,
        content=asked.content,
        files=asked.files,
        profile=profile,
        settings=answering.settings,
    )
    recorder = session.archive.begin_turn(start)
    for name in asked.waiting:
        session.attached.pop(name, None)
    return recorder


def _answered(
    session: Session, question: Question, begin: Callable[[], TurnRecorder], resumed: TurnRecord | None = None
) -> Iterator[ChatEvent]:
    """The events of a turn, what can be done about its end, and what keeping its prefill says.

    A turn that goes on is `resumed` as it stood.
    """
    answering, running = session.answering, session.running
    backend, before = answering.backend, answering.planned
    recording = Recording(session, begin, resumed)
    turn: TurnRecord | None = None
    failure: QwqError | None = None
    control = running.begin(backend)
    try:
        is_first = True
        for event in backend.reply(replace(question, control=control)):
            if is_first:
                running.began()
                is_first = False
            recording.take(event)
            yield event
    except QwqError as error:
        failure = error
    finally:
        running.end()
        turn = recording.close()
    if failure is not None:
        if turn is None or not recording.has_grown:
            raise failure
        yield Said((f"{failure}", "what came is kept: /continue goes on."), is_error=True)
        return
    if turn is None or answering.planned is None:
        return
    lines = [
        *session.notices,
        *recording.problems,
        *mends(recording.closed, recording.reason, (before, answering.planned), answering.profile),
    ]
    session.notices.clear()
    if lines:
        yield Said(tuple(lines))
    if recording.reason is not FinishReason.INTERRUPTED:
        yield from backend.keep()
