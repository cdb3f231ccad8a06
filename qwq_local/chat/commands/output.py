"""/think, /copy and /save: what was said, to read, to the clipboard or to a file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwq_local.chat.commands.command import Command
from qwq_local.chat.commands.history import search_thoughts
from qwq_local.chat.completion import complete_file, complete_name, complete_word, last_word
from qwq_local.chat.events import ChatEvent, Completion, Copy, Page, ThinkView, ViewChanged, say
from qwq_local.chat.files import mode_of, resolved, split_arguments
from qwq_local.chat.session import Session
from qwq_local.errors import UsageError
from qwq_local.history.export import exported, format_of, save_text
from qwq_local.history.labels import thought_line
from qwq_local.history.records import TurnRecord
from qwq_local.text import plural

_ANYWAY = "!"


def _think(session: Session, arguments: str) -> Iterator[ChatEvent]:
    word, _, rest = arguments.strip().partition(" ")
    if word == "grep":
        yield from search_thoughts(session, rest.strip())
    elif word in list(ThinkView):
        yield ViewChanged(ThinkView(word))
    else:
        turn = _turn(session, word)
        if not turn.thinking.strip():
            raise UsageError(f"thought {turn.number} is empty.")
        yield Page(thought_line(turn), turn.thinking, turn.steered)


def _complete_think(_session: Session, rest: str) -> Iterator[Completion]:
    views = [(str(view), "how thinking is shown") for view in ThinkView]
    yield from complete_word(
        [("last", "open the last thought"), ("grep", "search all thoughts"), *views], rest
    )


def _turn(session: Session, which: str) -> TurnRecord:
    """The turn of a thought's number, the last one for "last" and for nothing. Raises UsageError."""
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


def _copy(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Put the last answer, thought or a code block of the answer on the clipboard."""
    what, _, which = arguments.strip().partition(" ")
    turn = _turn(session, "last")
    match what:
        case "" | "answer":
            yield _copied(turn.answer, f"answer {turn.number}")
        case "thought":
            yield _copied(turn.thinking, f"thought {turn.number}")
        case "code":
            yield _copied_code(turn, which.strip())
        case _:
            raise UsageError(f"/copy {what[:40]}: give answer, thought, or code and a number.")


def _copied(text: str, what: str) -> Copy:
    if not text.strip():
        raise UsageError(f"{what} is empty.")
    return Copy(text, what)


def _copied_code(turn: TurnRecord, which: str) -> Copy:
    blocks = code_blocks(turn.answer)
    if not blocks:
        raise UsageError(f"answer {turn.number} has no code block.")
    number = int(which) if re.fullmatch(r"[0-9]{1,9}", which) else 0 if which else len(blocks)
    if not 1 <= number <= len(blocks):
        raise UsageError(
            f"/copy code {which[:40]}: answer {turn.number} has {len(blocks)}, give 1 to {len(blocks)}."
        )
    return _copied(blocks[number - 1], f"code block {number} of answer {turn.number}")


def code_blocks(markdown: str) -> list[str]:
    """The contents of the fenced code blocks of a text, in order."""
    from markdown_it import MarkdownIt

    return [token.content for token in MarkdownIt().parse(markdown) if token.type == "fence"]


def _save(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Write the conversation to a file; without a name to the file it was last written to."""
    words = split_arguments(arguments)
    names = [word for word in words if word != _ANYWAY]
    if len(names) > 1:
        names = [arguments.strip().removesuffix(_ANYWAY).rstrip()]
    if not names and not session.conversation.saved:
        raise UsageError("/save FILE: give a name that ends in .md, .json or .html.")
    path = resolved(names[0], session.setup.cwd) if names else session.conversation.saved[-1]
    shown = names[0] if names else str(path)
    kind = format_of(shown)
    record = session.conversation.record
    if record is None or not session.conversation.turns:
        raise UsageError("there is nothing to save yet: nothing was asked.")
    replaces = path in session.conversation.saved or len(names) < len(words)
    if mode_of(path) and not replaces:
        raise UsageError(f"{shown} is there already: /save {shown} {_ANYWAY} replaces it.")
    turns = session.archive.path(record.id)  # with all token ids, which the session does not hold
    save_text(path, exported(kind, record, turns), replaces=replaces)
    if path not in session.conversation.saved:
        session.conversation.saved.append(path)
    yield say(f"saved {plural(len(session.conversation.turns), 'turn')} to {path}")


COMMANDS = (
    Command(
        "think",
        "[N|last|grep WORDS|VIEW]",
        "open a thought, search all, or set how it shows",
        _think,
        details=(
            "/think 3 opens the third thought, /think or /think last the last one.",
            "/think grep WORDS searches the thoughts of all conversations.",
            "/think off, excerpt, tail or full sets how thinking is shown while it streams.",
        ),
        complete=_complete_think,
    ),
    Command(
        "copy",
        "[answer|thought|code [N]]",
        "put the last answer on the clipboard",
        _copy,
        details=("/copy code takes the last code block of the answer, /copy code 1 the first.",),
        complete=lambda _session, rest: complete_name(("answer", "thought", "code"), rest),
    ),
    Command(
        "save",
        "FILE.md|.json|.html",
        "write the conversation to a file",
        _save,
        details=(
            "A file that is there is overwritten only if this chat saved it, or if ! follows the name.",
        ),
        complete=lambda session, rest: complete_file(session.setup.cwd, last_word(rest)),
    ),
)
