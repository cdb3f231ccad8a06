"""/file and `@path`: files in, attachments for the next question out, with their tokens and what they cost.

What is not text is refused by name and byte. Nothing is sent here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePath

from qwq_local.backend.question import Question
from qwq_local.chat.events import ChatEvent, Said, Shown, TextTable
from qwq_local.chat.files import (
    MAX_BYTES,
    Found,
    FoundFile,
    find_files,
    is_file,
    is_larger,
    resolved,
    split_arguments,
)
from qwq_local.chat.session import Attached, Session
from qwq_local.chat.weighing import next_question, price_lines
from qwq_local.dialogue.conversation import Attachment, fence
from qwq_local.errors import UsageError
from qwq_local.reading import read_text

MAX_FILES = 100
_MAX_MENTIONS = 2000  # of which most are no files: a pasted source has many @
_SHOWN_FILES = 20
_NAMED_FILES = 8
# A name in a question: at its start, after a space or an opening bracket, so never inside an e-mail address.
_MENTION = re.compile(r'(?<![^\s(\[])@(?:"([^"\n]+)"|([^\s"]+))')
_AFTER_A_NAME = ".,;:!?)]}'"


def file_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Attach files to the next question, list those that wait, or take them back."""
    words = split_arguments(arguments)
    if not words:
        yield from _waiting(session, "no file waits for the next question: /file PATH attaches one.")
    elif words[0] == "drop":
        yield from _dropped(session, words[1:])
    else:
        if len(words) > 1 and is_file(arguments.strip(), session.setup.cwd):
            words = [arguments.strip()]
        yield from _attach(session, words)


def mentioned(session: Session, question: str) -> list[Attachment]:
    """The files that a question names with @, in order. Raises UsageError for one that is not text."""
    found: dict[str, Attachment] = {}
    words = dict.fromkeys((match[1], match[2]) for match in _MENTION.finditer(question))
    for quoted, word in list(words)[:_MAX_MENTIONS]:
        name = quoted or _named(word, session)
        if name and name not in found and is_file(name, session.setup.cwd):
            found[name] = _read(FoundFile(name, resolved(name, session.setup.cwd), True))
        if len(found) > MAX_FILES:
            raise UsageError(f"the question names more than {MAX_FILES} files: attach fewer.")
    return list(found.values())


def _named(word: str, session: Session) -> str:
    """The name in a word that a sentence may go on after."""
    return word if is_file(word, session.setup.cwd) else word.rstrip(_AFTER_A_NAME)


def _attach(session: Session, words: Sequence[str]) -> Iterator[ChatEvent]:
    notes: list[str] = []
    problems: list[str] = []
    added: list[str] = []
    for word in words:
        try:
            found = find_files(word, session.setup.cwd, MAX_FILES - len(session.attached))
            notes += found.left_out
            added += _take(session, found, problems, notes)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        yield Said(tuple(problems), is_error=True)
    if not added:
        yield from (Said(tuple(notes)),) if notes else ()
        return
    yield from _shown_tokens(session, added)
    if notes:
        yield Said(tuple(notes))
    yield Said(tuple(price_lines(session, next_question(session))))


def _take(session: Session, found: Found, problems: list[str], notes: list[str]) -> list[str]:
    """The names of the files that were attached; problems and notes tell of the others."""
    added = []
    room = MAX_BYTES - sum(len(waiting.attachment.text) for waiting in session.attached.values())
    for file in found.files:
        if len(session.attached) >= MAX_FILES and file.name not in session.attached:
            problems.append(
                f"{file.name} is left out: {MAX_FILES} files wait already, /file drop takes them back."
            )
            break
        try:
            attachment = _read(file)
        except UsageError as error:
            (problems if file.was_named else notes).append(f"{'' if file.was_named else 'left out: '}{error}")
            continue
        room -= len(attachment.text)
        if room < 0:
            problems.append(
                f"{file.name} is left out: with it the files have more than {MAX_BYTES >> 20} MiB."
            )
            break
        tokens = session.answering.backend.count_tokens(fence(attachment))
        session.attached[file.name] = Attached(attachment, tokens)
        added.append(file.name)
    return added


def _read(file: FoundFile) -> Attachment:
    if is_larger(file.path, MAX_BYTES):
        raise UsageError(
            f"{file.name} is larger than {MAX_BYTES >> 20} MiB: no context holds it. "
            "qwq ask --split reads such a file in parts."
        )
    return Attachment(file.name, read_text(file.path, MAX_BYTES, name=file.name))


def _shown_tokens(session: Session, names: Sequence[str]) -> Iterator[Shown]:
    """The tokens of each file and of all that wait."""
    yield from _token_table([(name, session.attached[name].tokens) for name in names])
    count, total = len(session.attached), sum(each.tokens for each in session.attached.values())
    files = "1 file waits" if count == 1 else f"{count} files wait"
    yield Said((f"{files} for the next question: {total:,} tokens in front of it.",))


def _token_table(counts: Sequence[tuple[str, int]]) -> Iterator[Shown]:
    """A row for each of the first files, a line for the rest."""
    shown, rest = counts[:_SHOWN_FILES], counts[_SHOWN_FILES:]
    yield TextTable(tuple((name, f"{tokens:,} tokens") for name, tokens in shown), right=(1,))
    if rest:
        yield Said((f"and {len(rest)} more files, {sum(tokens for _, tokens in rest):,} tokens",))


def price_of_named(session: Session, named: Sequence[Attachment], question: Question) -> Iterator[Shown]:
    """The tokens of files that a question names, and what they do to its plan. Raises PromptTooLong."""
    count = session.answering.backend.count_tokens
    if named:
        yield from _token_table([(attachment.name, count(fence(attachment))) for attachment in named])
        yield Said(tuple(price_lines(session, question)))


def _waiting(session: Session, none: str) -> Iterator[Shown]:
    if session.attached:
        yield from _shown_tokens(session, list(session.attached))
    else:
        yield Said((none,))


def _dropped(session: Session, names: Sequence[str]) -> Iterator[Shown]:
    if not session.attached:
        yield Said(("no file waits for the next question.",))
        return
    gone = list(session.attached) if not names else []
    for name in names:
        found = [known for known in session.attached if _is_called(known, name)]
        if not found:
            raise UsageError(f"no file {name} waits; there are {_named_files(list(session.attached))}.")
        gone += found
    for known in dict.fromkeys(gone):
        del session.attached[known]
    yield Said((f"taken back: {_named_files(list(dict.fromkeys(gone)))}",))
    yield from _waiting(session, "no file waits any more.")


def _named_files(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - _NAMED_FILES
    return ", ".join(names[:_NAMED_FILES]) + (f" and {rest} more" if rest > 0 else "")


def _is_called(known: str, name: str) -> bool:
    return known == name or PurePath(known).name == name or fnmatchcase(known, name)
