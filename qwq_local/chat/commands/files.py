"""/file: attach files to the next question, with their tokens and what they change in the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

from qwq_local.chat.commands.command import Command
from qwq_local.chat.commands.context import next_question, price, token_sum, token_table
from qwq_local.chat.completion import complete_file, last_word
from qwq_local.chat.events import ChatEvent, Completion, Said, Shown, say
from qwq_local.chat.files import (
    MAX_BYTES,
    MAX_FILES,
    Found,
    find_files,
    is_file,
    read_attachment,
    split_arguments,
)
from qwq_local.chat.session import Session, WaitingFile
from qwq_local.dialogue.conversation import fence
from qwq_local.errors import UsageError

_NAMED_FILES = 8


def _file(session: Session, arguments: str) -> Iterator[ChatEvent]:
    words = split_arguments(arguments)
    if not words:
        yield from _waiting(session, "no file waits for the next question: /file PATH attaches one.")
    elif words[0] == "drop":
        yield from _drop(session, words[1:])
    else:
        if len(words) > 1 and is_file(arguments.strip(), session.setup.cwd):
            words = [arguments.strip()]
        yield from _attach(session, words)


def _complete_file(session: Session, rest: str) -> Iterator[Completion]:
    if " " not in rest and rest and "drop".startswith(rest):
        yield Completion("drop", len(rest), "take files back")
    yield from complete_file(session.setup.cwd, last_word(rest))


def _attach(session: Session, words: Sequence[str]) -> Iterator[Shown]:
    notes: list[str] = []
    problems: list[str] = []
    added: list[str] = []
    for word in words:
        try:
            found = find_files(word, session.setup.cwd, MAX_FILES - len(session.attached))
            notes += found.left_out
            added += _add(session, found, problems, notes)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        yield Said(tuple(problems), is_error=True)
    if added:
        yield from _with_tokens(session, added)
    if notes:
        yield say(*notes)
    if added:
        yield from price(session, next_question(session))


def _add(session: Session, found: Found, problems: list[str], notes: list[str]) -> list[str]:
    """Attach files and return their names. `problems` and `notes` get the reasons why others are left out."""
    added = []
    room = MAX_BYTES - sum(len(waiting.attachment.text) for waiting in session.attached.values())
    for file in found.files:
        if len(session.attached) >= MAX_FILES and file.name not in session.attached:
            problems.append(
                f"{file.name} is left out: {MAX_FILES} files wait already, /file drop takes them back."
            )
            break
        try:
            attachment = read_attachment(file)
        except UsageError as error:
            (problems if file.was_named else notes).append(f"{'' if file.was_named else 'left out: '}{error}")
            continue
        room -= len(attachment.text)
        if room < 0:
            problems.append(
                f"{file.name} is left out: with it the files have more than {MAX_BYTES >> 20} MiB."
            )
            break
        tokens = session.model.count_tokens(fence(attachment))
        session.attached[file.name] = WaitingFile(attachment, tokens)
        added.append(file.name)
    return added


def _drop(session: Session, names: Sequence[str]) -> Iterator[Shown]:
    if not session.attached:
        yield say("no file waits for the next question.")
        return
    gone = list(session.attached) if not names else []
    for name in names:
        found = [known for known in session.attached if _is_called(known, name)]
        if not found:
            raise UsageError(f"no file {name} waits; there are {_first_names(list(session.attached))}.")
        gone += found
    gone = list(dict.fromkeys(gone))
    for known in gone:
        del session.attached[known]
    yield say(f"taken back: {_first_names(gone)}")
    yield from _waiting(session, "no file waits any more.")


def _waiting(session: Session, none: str) -> Iterator[Shown]:
    """The files that wait; `none` is said if there are none."""
    if session.attached:
        yield from _with_tokens(session, list(session.attached))
    else:
        yield say(none)


def _with_tokens(session: Session, names: Sequence[str]) -> Iterator[Shown]:
    """The tokens of each of these files and of all that wait."""
    yield from token_table([(name, session.attached[name].tokens) for name in names])
    count, total = len(session.attached), token_sum(each.tokens for each in session.attached.values())
    files = "1 file waits" if count == 1 else f"{count} files wait"
    size = f": {total:,} tokens in front of it." if total is not None else "."
    yield say(f"{files} for the next question{size}")


def _first_names(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - _NAMED_FILES
    return ", ".join(names[:_NAMED_FILES]) + (f" and {rest} more" if rest > 0 else "")


def _is_called(known: str, name: str) -> bool:
    return known == name or PurePath(known).name == name or fnmatchcase(known, name)


COMMANDS = (
    Command(
        "file",
        "PATH|GLOB…",
        "attach files to the next question",
        _file,
        details=(
            "A directory stands for the text files below it; ** in a glob for any folders.",
            "Hidden files are left out.",
            "/file alone lists what waits; /file drop [NAME] takes all or one back.",
            "The tokens of each file are shown, and what they do to the plan.",
        ),
        complete=_complete_file,
    ),
)
