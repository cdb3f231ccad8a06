"""Commands about the conversation: go on, answer anew, take back, edit, branch, resume another, begin anew.

Turns are never deleted: what is undone or answered anew stays in the archive beside what replaces it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from qwq_local.chat.answering import settings_of
from qwq_local.chat.attaching import mentioned, price_of_named
from qwq_local.chat.conversation import called
from qwq_local.chat.events import ChatEvent, Edit, Recalled, Said, Shown, TextTable
from qwq_local.chat.files import split_arguments
from qwq_local.chat.session import Session, fences, thoughts
from qwq_local.chat.setting import seeded, take_over
from qwq_local.chat.turns import Asked, ask, go_on
from qwq_local.dialogue.conversation import Attachment
from qwq_local.errors import HistoryError, UsageError
from qwq_local.events import FinishReason
from qwq_local.history.labels import minute_of
from qwq_local.history.records import ConversationRecord, TurnOrigin, TurnRecord, TurnState
from qwq_local.profiles.keys import MAX_SEED
from qwq_local.text import plural

_LISTED = 20
_RECALLED = 3


def new_question(session: Session, question: str) -> Iterator[ChatEvent]:
    """Ask what the person typed, with the files that wait and those it names."""
    yield from _parted(session)
    attachments = {attachment.name: attachment for attachment in session.attachments}
    named = mentioned(session, question)
    attachments |= {attachment.name: attachment for attachment in named}
    files = tuple(attachments.values())
    asked = Asked(
        question,
        session.content(question, files),
        session.conversation.turns,
        files=tuple(attachments),
        file_texts=fences(files),
        waiting=tuple(session.attached),
    )
    yield from _asked(session, asked, named)


def edited_question(session: Session, turn: TurnRecord, question: str) -> Iterator[ChatEvent]:
    """Ask an edited question in place of a turn; its files stay, and those that the question names join."""
    kept = _files_part(session, turn)
    added = [each for each in mentioned(session, question) if not kept or each.name not in turn.files]
    asked = Asked(
        question,
        kept + session.content(question, added),
        _before(session, turn),
        files=(*(turn.files if kept else ()), *(each.name for each in added)),
        file_texts=(*filter(None, [kept]), *fences(added)),
    )
    yield from _asked(session, asked, added)


def _parted(session: Session) -> Iterator[ChatEvent]:
    """Say that another chat has gone on with the conversation, and go on beside it."""
    try:
        other = session.conversation.part()
    except HistoryError:  # what cannot be copied cannot be written either, and the turn itself says why
        return
    if other is not None:
        yield Said(
            (
                f"conversation {other} was gone on with elsewhere: this goes on beside it, as conversation "
                f"{session.conversation.id}.",
            )
        )


def _asked(session: Session, asked: Asked, named: Sequence[Attachment]) -> Iterator[ChatEvent]:
    """Ask, and before it is sent say what the files cost that the question names."""
    yield from ask(session, asked, lambda question: price_of_named(session, named, question))


def continue_command(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Go on with the last answer or thought, which was stopped, cut or lost."""
    if session.conversation.id is None:
        if session.offered is None:
            raise UsageError("nothing was asked in this conversation yet: /resume lists the ones before.")
        yield from resumed(session, session.archive.conversation(session.offered), goes_on=True)
        session.offered = None
    yield from _parted(session)
    turn = session.archive.turn(_last(session).id)
    if turn.state is TurnState.RUNNING:
        raise UsageError(f"thought {turn.number} is being answered by another process.")
    if turn.state is TurnState.DONE and turn.reason in (FinishReason.STOP, None):
        raise UsageError(
            f"thought {turn.number} came to its end, there is nothing to continue: /regen asks again."
        )
    if not turn.prompt or turn.origin is None or not turn.origin.identity:
        raise UsageError(
            f"thought {turn.number} ended before it began, there is nothing to go on from: /regen."
        )
    identity = session.answering.backend.identity()
    if not _is_same(turn.origin, identity, session.answering.chosen.model):
        raise UsageError(
            f"thought {turn.number} is by {turn.origin.model} ({turn.origin.identity[:20]}), which is not "
            f"{session.answering.chosen.model} ({identity[:20]}): /model {turn.origin.model} goes back, "
            "/regen asks again."
        )
    yield from go_on(session, turn)


def _is_same(origin: TurnOrigin, identity: str, model: str) -> bool:
    """Whether the same weights answer; by the model's name where only one side knows its checksum yet."""
    kind, same_kind = identity.partition(":")[0], origin.identity.partition(":")[0]
    return origin.identity == identity if kind == same_kind else origin.model == model


def regen_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Ask the last question again, with another seed or settings for this turn alone."""
    yield from _parted(session)
    turn = _last(session)
    seed, words = seeded(split_arguments(arguments))
    yield from _again(session, turn, seed, settings_of(words))


def retry_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Go back to before a turn and ask its question again."""
    yield from _parted(session)
    number, _, rest = arguments.strip().partition(" ")
    turn = _numbered(session, number, "/retry-from")
    seed, words = seeded(split_arguments(rest))
    yield from _again(session, turn, seed, settings_of(words))


def _again(
    session: Session, turn: TurnRecord, seed: int | None, settings: Mapping[str, str]
) -> Iterator[ChatEvent]:
    if seed is None and "seed" not in settings and session.answering.profile.seed is not None:
        # A fixed seed would only say the same again.
        seed = random.SystemRandom().randrange(MAX_SEED + 1)
    kept = _files_part(session, turn)
    asked = Asked(
        turn.question,
        turn.content,
        _before(session, turn),
        files=turn.files,
        file_texts=(kept,) if kept else (),
        seed=seed,
    )
    with session.answering.under(settings):
        yield from ask(session, asked)


def undo_command(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Take the last turn back."""
    yield from _parted(session)
    turn = _last(session)
    before = _before(session, turn)
    session.conversation.back_to(before[-1] if before else None)
    yield Said((f"{thoughts([turn])} is undone; the history keeps it.",))
    if before:
        yield recalled(before[-1])
    else:
        yield Said(("the conversation stands before its first question.",))


def edit_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Give the last question out to be edited; what comes back takes its place, or a text given here."""
    yield from _parted(session)
    if arguments.strip():
        yield from edited_question(session, _last(session), arguments.strip())
        return
    session.replacing = _last(session)
    yield Edit(session.replacing.question)


def fork_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Go on in a copy of the conversation that ends with a turn."""
    turn = _numbered(session, arguments.strip() or str(_last(session).number), "/fork")
    assert session.conversation.id is not None
    copy = session.archive.fork(session.conversation.id, turn.number)
    session.conversation.open(copy)
    yield Said((f"conversation {copy} goes on after {thoughts([turn])}; the one before stays as it is.",))


def clear_command(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Begin a new conversation; the old one stays in the history."""
    before = session.conversation.record
    session.conversation.clear()
    session.attached.clear()
    session.offered = None
    kept = f" /resume {before.id} comes back to {called(before)!r}." if before is not None else ""
    yield Said((f"a new conversation begins with the next question.{kept}",))


def name_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Call the conversation by a name; without one say how it is called."""
    if not arguments.strip():
        name = session.conversation.name
        yield Said(
            (f"this conversation is called {name!r}." if name else "this conversation has no name yet.",)
        )
        return
    session.conversation.rename(arguments.strip())
    yield Said((f"this conversation is called {session.conversation.name!r} now.",))


def resume_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Go on with a conversation of the history; without a name list the latest."""
    if not arguments.strip():
        yield from recent_conversations(session)
        return
    yield from resumed(session, session.archive.find(arguments.strip()))


def resumed(
    session: Session, record: ConversationRecord, *, takes_over: bool = True, goes_on: bool = False
) -> Iterator[ChatEvent]:
    """Hold a conversation of the archive, and show its last turns; it `takes_over` its own system prompt.

    Unless its last turn `goes_on` by itself, what would let it is said.
    """
    session.conversation.open(record.id)
    for turn in session.conversation.turns[-_RECALLED:]:
        yield recalled(turn)
    lines = [f"conversation {record.id}, {called(record)!r}: {plural(record.n_turns, 'turn')}."]
    if takes_over:
        lines += take_over(session, record)
    last = session.conversation.last
    if last is not None and last.can_go_on and not goes_on:
        lines.append(f"{thoughts([last])} did not come to its end: /continue goes on.")
    yield Said(tuple(lines))


def recent_conversations(session: Session) -> Iterator[Shown]:
    """The latest conversations, a row for each."""
    records = [record for record in session.archive.conversations(_LISTED) if record.n_turns]
    if not records:
        yield Said(("the history is empty.",))
        return
    rows = []
    for record in records:
        here = " · this one" if record.id == session.conversation.id else ""
        count = plural(record.n_turns, "turn")
        title = f"{called(record)} · {count}{here}"
        rows.append((str(record.id), minute_of(record.changed_at), title))
    yield TextTable(tuple(rows), right=(0,))
    yield Said(("/resume NAME or ID goes on with one.",))


def recalled(turn: TurnRecord) -> Recalled:
    """A turn as it is shown again."""
    return Recalled(turn.question, turn.number, turn.stats.thinking_tokens, turn.thinking_s, turn.answer)


def _last(session: Session) -> TurnRecord:
    if (turn := session.conversation.last) is None:
        raise UsageError("nothing was asked in this conversation yet.")
    return turn


def _numbered(session: Session, number: str, command: str) -> TurnRecord:
    turns = session.conversation.turns
    if not turns:
        raise UsageError("nothing was asked in this conversation yet.")
    if not (number.isdecimal() and len(number) < 10 and 1 <= int(number) <= len(turns)):
        given = f" {number[:40]}" if number else ""
        raise UsageError(f"{command}{given}: give the number of a thought, 1 to {len(turns)}.")
    return turns[int(number) - 1]


def _before(session: Session, turn: TurnRecord) -> tuple[TurnRecord, ...]:
    """The turns before one of the conversation."""
    turns = session.conversation.turns
    return turns[: next((i for i, known in enumerate(turns) if known.id == turn.id), len(turns))]


def _files_part(session: Session, turn: TurnRecord) -> str:
    """What of a turn's message stands before its question: the files; empty when it cannot be told apart."""
    end = turn.content.rfind(f"`\n\n{turn.question}") if turn.files else -1
    return turn.content[: end + len("`\n\n")] if end >= 0 else ""
