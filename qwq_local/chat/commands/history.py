"""/resume and /history: earlier conversations, to continue, to list and to search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwq_local.chat.commands.command import Command
from qwq_local.chat.conversation import short_title
from qwq_local.chat.events import ChatEvent, Completion, Recalled, Shown, TextTable, say
from qwq_local.chat.session import Session, thought_numbers
from qwq_local.errors import UsageError
from qwq_local.history.labels import NOT_STANDING, minute_of
from qwq_local.history.records import ConversationRecord, TurnRecord
from qwq_local.history.search import SearchHit, TextKind
from qwq_local.text import plural

_LISTED = 20
_OFFERED = 200
_MAX_HITS = 30
_RECALLED = 3


def _resume(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Continue a conversation of the history; without a name list the latest."""
    if not arguments.strip():
        yield from _recent(session)
        return
    yield from resume(session, session.archive.find(arguments.strip()))


def _complete_resume(session: Session, rest: str) -> Iterator[Completion]:
    for record in session.archive.conversations(_OFFERED):
        if record.name and record.name.lower().startswith(rest.lower()):
            yield Completion(record.name, len(rest), f"{record.n_turns} turns")
        elif str(record.id).startswith(rest):
            yield Completion(str(record.id), len(rest), short_title(record))


def resume(
    session: Session, record: ConversationRecord, *, takes_system: bool = True, continues: bool = False
) -> Iterator[ChatEvent]:
    """Open a conversation of the archive and show its last turns.

    `takes_system` uses its system prompt. Unless its last turn `continues` right away, a line says that it
    can.
    """
    session.conversation.open(record.id)
    for turn in session.conversation.turns[-_RECALLED:]:
        yield recalled(turn)
    lines = [f"conversation {record.id}, {short_title(record)!r}: {plural(record.n_turns, 'turn')}."]
    if takes_system:
        if record.system != session.model.profile.system:
            session.model.change({"system": record.system})
        if record.model != session.model.name:
            lines.append(
                f"it was answered by {record.model}, {session.model.name} answers now: "
                f"/model {record.model} goes back."
            )
    last = session.conversation.last
    if last is not None and last.can_go_on and session.model.can_continue() and not continues:
        lines.append(f"{thought_numbers([last])} did not come to its end: /continue goes on.")
    yield say(*lines)


def recalled(turn: TurnRecord) -> Recalled:
    """A turn as it is shown again."""
    return Recalled(turn.question, turn.number, turn.stats.thinking_tokens, turn.thinking_s, turn.answer)


def _history(session: Session, arguments: str) -> Iterator[ChatEvent]:
    words = arguments.strip()
    if not words:
        yield from _recent(session)
        return
    hits = session.archive.search(words, _MAX_HITS + 1)
    yield say(*_hit_lines(session, hits)) if hits else say(f"nothing has {words!r}.")


def _recent(session: Session) -> Iterator[Shown]:
    """The latest conversations, a row for each."""
    records = [record for record in session.archive.conversations(_LISTED) if record.n_turns]
    if not records:
        yield say("the history is empty.")
        return
    rows = []
    for record in records:
        here = " · this one" if record.id == session.conversation.id else ""
        asked = " · ask" if record.command == "ask" else ""
        title = f"{short_title(record)} · {plural(record.n_turns, 'turn')}{asked}{here}"
        rows.append((str(record.id), minute_of(record.changed_at), title))
    yield TextTable(tuple(rows), right=(0,))
    yield say("/resume NAME or ID goes on with one.")


def search_thoughts(session: Session, words: str) -> Iterator[Shown]:
    """The thoughts of all conversations that have these words. Raises UsageError for no words."""
    if not words:
        raise UsageError("/think grep WORDS: give the words to look for.")
    if thoughts := session.archive.search(words, _MAX_HITS + 1, TextKind.THINKING):
        yield say(*_hit_lines(session, thoughts))
    elif session.archive.search(words, 1):
        yield say(f"no thought has {words!r}, but questions or answers do: /history {words}")
    else:
        yield say(f"nothing has {words!r}.")


def _hit_lines(session: Session, hits: Sequence[SearchHit]) -> Iterator[str]:
    """A line for each hit: where it is, and the text around it."""
    found = {hit.conversation.id for hit in hits}
    standing = frozenset[int]().union(*map(session.archive.standing, found))
    for hit in hits[:_MAX_HITS]:
        here = hit.conversation.id == session.conversation.id
        where = "this one" if here else f"{hit.conversation.id} {short_title(hit.conversation)}"
        part = "thought" if hit.part is TextKind.THINKING else hit.part
        gone = "" if hit.turn in standing else f" ({NOT_STANDING})"
        yield f"{where} · {part} {hit.number}{gone}: {hit.excerpt}"
    if any(hit.turn not in standing for hit in hits[:_MAX_HITS]):
        yield f"`qwq history show ID --all` prints what was {NOT_STANDING}, too."
    if len(hits) > _MAX_HITS:
        yield f"and more; the first {_MAX_HITS} are shown. More words narrow it down."
    elif any(hit.conversation.id != session.conversation.id for hit in hits):
        yield "/resume ID opens a conversation, /think N then its thought."


COMMANDS = (
    Command(
        "resume",
        "[NAME|ID]",
        "go on with an earlier conversation",
        _resume,
        complete=_complete_resume,
    ),
    Command("history", "[WORDS]", "list or search all conversations", _history),
)
