"""One turn of a chat: a question is sent, its events come out as they come, and the archive keeps them.

A question that fails before anything comes is not kept, and leaves the conversation as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from qwq_local.backend.api import ReplyRequest
from qwq_local.chat.conversation import history_messages
from qwq_local.chat.events import Asking, ChatEvent, Said, Shown, say
from qwq_local.chat.model import ChatModel
from qwq_local.chat.session import Session, thought_numbers
from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.errors import HistoryError, QwqError
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Loading,
    Notice,
    Planned,
    Thinking,
    ThinkingClosed,
)
from qwq_local.history.database import HistoryBusy
from qwq_local.history.recorder import TurnRecorder
from qwq_local.history.records import TurnRecord, TurnStart
from qwq_local.planning.window import Window


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """A question to send after the turns `before` it.

    `question` is what the user typed and `content` the whole message. `files` are the names of the files in
    the message, `file_texts` those files as they stand there. The files called `waiting` wait no longer once
    it is sent.
    """

    question: str
    content: str
    before: tuple[TurnRecord, ...]
    files: tuple[str, ...] = ()
    file_texts: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    seed: int | None = None


def reply_request(session: Session, asked: ChatQuestion) -> ReplyRequest:
    """What the backend is asked: the question after the turns that are sent, without their thinking."""
    profile = session.model.profile
    sent = session.conversation.sent_of(asked.before)
    return ReplyRequest(
        [*history_messages(profile.system, sent), Message(Role.USER, asked.content)],
        seed=asked.seed if asked.seed is not None else profile.seed,
        files=asked.file_texts,
        dropped_thinking=sum(turn.stats.thinking_tokens for turn in sent),
        wants_tokens=True,
    )


def ask(
    session: Session,
    asked: ChatQuestion,
    price_of: Callable[[ReplyRequest], Iterable[Shown]] = lambda _: (),
) -> Iterator[ChatEvent]:
    """Ask the model and keep the turn. Raises QwqError, and Aborted when stopped while the model loads.

    The `price_of` the question is shown below it, before it is sent.
    """
    request = reply_request(session, asked)
    can_continue = session.model.can_continue()
    yield Asking(asked.question, len(asked.before) + 1, can_continue=can_continue)
    yield from price_of(request)
    for turn in session.conversation.newly_unsent(asked.before):
        yield say(
            f"{thought_numbers([turn])} had no answer: its question is left out of what the model sees; "
            f"/retry-from {turn.number} asks it again."
        )
    yield from _run(session, request, lambda: _begin(session, asked))


def continue_turn(session: Session, turn: TurnRecord) -> Iterator[ChatEvent]:
    """Continue a turn after its last token. Raises what `ask` raises."""
    seed = turn.origin.seed if turn.origin is not None else None
    asked = ChatQuestion(turn.question, turn.content, session.conversation.turns[:-1], seed=seed)
    opening = Opening(turn.prompt, turn.generated, turn.steered)
    request = replace(reply_request(session, asked), opening=opening)
    yield Asking(
        turn.question,
        turn.number,
        continued=True,
        thinking=turn.thinking,
        answer=turn.answer,
        steered=turn.steered,
        thinking_s=turn.thinking_s,
    )
    yield from _run(session, request, lambda: session.archive.resume_turn(turn.id))


def _begin(session: Session, asked: ChatQuestion) -> TurnRecorder:
    """The turn in the archive, or in memory when the archive cannot be written: the user wants to talk."""
    try:
        return _begin_in_archive(session, asked)
    except HistoryBusy:
        raise
    except HistoryError as error:
        session.move_to_memory()
        session.notices.append(f"{error} This conversation goes on in memory alone: /save keeps it.")
        before = session.conversation.turns[: len(asked.before)]
        return _begin_in_archive(session, replace(asked, before=before))


def _begin_in_archive(session: Session, asked: ChatQuestion) -> TurnRecorder:
    model = session.model
    profile = model.chosen.profile or ""
    start = TurnStart(
        session.conversation.begin(model.name, profile, model.profile.system),
        parent=asked.before[-1].id if asked.before else None,
        question=asked.question,
        content=asked.content,
        files=asked.files,
        origin=model.origin(asked.seed),
    )
    recorder = session.archive.begin_turn(start)
    for name in asked.waiting:
        session.attached.pop(name, None)
    return recorder


def _run(session: Session, request: ReplyRequest, begin: Callable[[], TurnRecorder]) -> Iterator[ChatEvent]:
    """The events of a turn, and after it what the user can do about its end."""
    model, running = session.model, session.running
    before = model.planned
    recording = _Recording(session, begin)
    turn: TurnRecord | None = None
    failure: QwqError | None = None
    control = running.begin(model.backend)
    try:
        is_first = True
        for event in model.backend.reply(replace(request, control=control)):
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
        if turn is None or not recording.has_text:
            raise failure
        kept = "what came is kept" + (": /continue goes on." if model.can_continue() else ".")
        yield Said((f"{failure}", kept), is_error=True)
        return
    if turn is None:
        return
    lines = [*session.notices, *recording.problems]
    lines += _end_lines(model, recording, before)
    session.notices.clear()
    if lines:
        yield say(*lines)
    if recording.reason is not FinishReason.INTERRUPTED:
        yield from model.keep()


class _Recording:
    """Writes the events of a turn to the archive and the turn itself to the conversation.

    `has_text` once text came. `closed` and `reason` say why the thinking and the turn ended, once they did.
    """

    def __init__(self, session: Session, begin: Callable[[], TurnRecorder]) -> None:
        self._session = session
        self._begin = begin
        self._recorder: TurnRecorder | None = None
        self.has_text = False
        self.closed: CloseReason | None = None
        self.reason: FinishReason | None = None

    def take(self, event: Event) -> None:
        """Write the next event; the first that is the turn's own begins it. Raises HistoryError."""
        model = self._session.model
        if isinstance(event, Planned):
            model.planned = event
        if self._recorder is None and not isinstance(event, Loading | Notice):
            self._recorder = self._begin()
        if self._recorder is None:
            return
        self._recorder.feed(event)
        match event:
            case Thinking() | Answer():
                self.has_text = True
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
        """The turn as it was written; None when it failed before anything came."""
        if self._recorder is None:
            return None
        self._recorder.close()
        conversation = self._session.conversation
        turn = self._session.archive.turn(self._recorder.turn_id)
        if not (self.reason or turn.thinking or turn.answer):
            conversation.back_to(conversation.last)
            return None
        conversation.add(turn)
        return turn


def _end_lines(model: ChatModel, recording: _Recording, before: Planned | None) -> Iterator[str]:
    """What the user can do after a turn that was cut or closed, or that switched YaRN on.

    `before` is the plan of the turn before it.
    """
    planned, profile = model.planned, model.profile
    n_ctx = f" of {planned.n_ctx:,} tokens" if planned is not None else ""
    continues = "/continue goes on" if model.can_continue() else ""
    if recording.reason is not FinishReason.INTERRUPTED:
        match recording.closed:
            case CloseReason.BUDGET:
                budget = f" of {planned.thinking_budget:,} tokens" if planned is not None else ""
                remedy = "/set thinking_budget N, then /regen" if model.can_adopt() else ""
                yield _line(f"the thinking was ended at its budget{budget}", remedy)
            case CloseReason.CONTEXT:
                remedy = "/drop leaves out the oldest turns, then /regen"
                yield _line(f"the thinking was ended, the context{n_ctx} was nearly full", remedy)
            case CloseReason.LOOP:
                yield "the thinking repeated itself and was cut: /regen tries another seed."
            case _:
                pass
    match recording.reason:
        case FinishReason.MAX_TOKENS:
            raises = "/set max_tokens N raises it" if model.can_adopt() else ""
            yield _line(f"the answer was cut at max_tokens, {profile.max_tokens:,}", continues, raises)
        case FinishReason.CONTEXT:
            yield _line(f"the answer was cut, the context{n_ctx} is full", _larger_context(model))
        case FinishReason.LOOP:
            yield "the answer was ended, it repeated itself: /regen tries another seed."
        case FinishReason.NO_ANSWER:
            yield _line("no answer came out of the thinking", continues, "/regen tries another seed")
        case _:
            pass
    factor = before.yarn_factor if before is not None else 1.0
    if planned is not None and planned.yarn_factor > max(factor, 1.0):
        yield (
            f"YaRN {planned.yarn_factor:g} is on from here: /drop leaves out the oldest turns, "
            "/clear begins anew without it."
        )


def _line(what: str, *remedies: str) -> str:
    """What happened, and what the user can do about it as far as this model allows."""
    possible = ", ".join(filter(None, remedies))
    return f"{what}: {possible}." if possible else f"{what}."


def _larger_context(model: ChatModel) -> str:
    """How to get a larger context, or what to leave out where there is none."""
    profile = model.profile
    window = Window(profile.native_window, profile.yarn_factors, profile.yarn)
    if model.can_adopt() and profile.n_ctx is not None and profile.n_ctx < window.largest:
        return "/set n_ctx default, then /continue"
    larger = [factor for factor in sorted(window.factors) if factor > window.allowed_factors[-1]]
    if model.can_adopt() and larger:
        return f"/set yarn {larger[0]:g}, then /continue"
    return "/drop leaves out the oldest turns, then /regen"
