"""Commands that bring back what was said: a thought to read or to search, a text to copy, a file to save."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwq_local.chat.conversation import called
from qwq_local.chat.conversing import recent_conversations
from qwq_local.chat.events import ChatEvent, Copy, Page, Said, ThinkView, ViewChanged
from qwq_local.chat.session import Session
from qwq_local.errors import UsageError
from qwq_local.history.labels import NOT_STANDING, thought_line
from qwq_local.history.records import SearchHit, TextKind, TurnRecord

_MAX_HITS = 30


def think_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Open a thought, search all of them, or set how thinking is shown."""
    word, _, rest = arguments.strip().partition(" ")
    if word == "grep":
        yield from _grep(session, rest.strip())
    elif word in list(ThinkView):
        yield ViewChanged(ThinkView(word))
    else:
        yield _page(_thought(session, word))


def _page(turn: TurnRecord) -> Page:
    if not turn.thinking.strip():
        raise UsageError(f"thought {turn.number} is empty.")
    return Page(thought_line(turn), turn.thinking, turn.steered)


def _thought(session: Session, which: str) -> TurnRecord:
    turns = session.conversation.turns
    if not turns:
        raise UsageError("there is no thought in this conversation yet.")
    if which in ("", "last"):
        return turns[-1]
    if which.isdecimal() and len(which) < 10 and 1 <= int(which) <= len(turns):
        return turns[int(which) - 1]
    views = ", ".join(ThinkView)
    raise UsageError(
        f"/think {which[:40]}: give a number from 1 to {len(turns)}, last, grep WORDS, or one of {views}."
    )


def _grep(session: Session, words: str) -> Iterator[ChatEvent]:
    if not words:
        raise UsageError("/think grep WORDS: give the words to look for.")
    if thoughts := session.archive.search(words, _MAX_HITS + 1, TextKind.THINKING):
        yield Said(tuple(_hit_lines(session, thoughts)))
    elif session.archive.search(words, 1):
        yield Said((f"no thought has {words!r}, but questions or answers do: /history {words}",))
    else:
        yield Said((f"nothing has {words!r}.",))


def history_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """List the latest conversations, or search all of them."""
    words = arguments.strip()
    if not words:
        yield from recent_conversations(session)
        return
    hits = session.archive.search(words, _MAX_HITS + 1)
    yield Said(tuple(_hit_lines(session, hits)) if hits else (f"nothing has {words!r}.",))


def _hit_lines(session: Session, hits: list[SearchHit]) -> Iterator[str]:
    """A line for each hit: where it is, and the text around it."""
    found = {hit.conversation.id for hit in hits}
    standing = frozenset[int]().union(*map(session.archive.standing, found))
    for hit in hits[:_MAX_HITS]:
        here = hit.conversation.id == session.conversation.id
        where = "this one" if here else f"{hit.conversation.id} {called(hit.conversation)}"
        part = "thought" if hit.part is TextKind.THINKING else hit.part
        gone = "" if hit.turn in standing else f" ({NOT_STANDING})"
        yield f"{where} · {part} {hit.number}{gone}: {hit.excerpt}"
    if any(hit.turn not in standing for hit in hits[:_MAX_HITS]):
        yield f"`qwq history show ID --all` prints what was {NOT_STANDING}, too."
    if len(hits) > _MAX_HITS:
        yield f"and more; the first {_MAX_HITS} are shown. More words narrow it down."
    elif any(hit.conversation.id != session.conversation.id for hit in hits):
        yield "/resume ID opens a conversation, /think N then its thought."


def copy_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Put the last answer, thought or a code block of the answer on the clipboard."""
    what, _, which = arguments.strip().partition(" ")
    turn = _thought(session, "last")
    match what:
        case "" | "answer":
            yield _copy(turn.answer, f"answer {turn.number}")
        case "thought":
            yield _copy(turn.thinking, f"thought {turn.number}")
        case "code":
            yield _code(turn, which.strip())
        case _:
            raise UsageError(f"/copy {what[:40]}: give answer, thought, or code and a number.")


def _copy(text: str, what: str) -> Copy:
    if not text.strip():
        raise UsageError(f"{what} is empty.")
    return Copy(text, what)


def _code(turn: TurnRecord, which: str) -> Copy:
    blocks = code_blocks(turn.answer)
    if not blocks:
        raise UsageError(f"answer {turn.number} has no code block.")
    number = int(which) if re.fullmatch(r"[0-9]{1,9}", which) else 0 if which else len(blocks)
    if not 1 <= number <= len(blocks):
        raise UsageError(
            f"/copy code {which[:40]}: answer {turn.number} has {len(blocks)}, give 1 to {len(blocks)}."
        )
    return _copy(blocks[number - 1], f"code block {number} of answer {turn.number}")


def code_blocks(markdown: str) -> list[str]:
    """The contents of the fenced code blocks of a text, in order."""
    from markdown_it import MarkdownIt

    return [token.content for token in MarkdownIt().parse(markdown) if token.type == "fence"]
