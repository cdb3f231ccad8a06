"""What may stand at the cursor: the text before it in, completions out; within a few milliseconds.

Looks at one folder at most, and never below it. Knows no terminal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwq_local.chat.commands import COMMANDS
from qwq_local.chat.conversation import called
from qwq_local.chat.events import Completion, ThinkView
from qwq_local.chat.files import is_kind, resolved
from qwq_local.chat.setup import ChatSetup
from qwq_local.errors import QwqError
from qwq_local.history.archive import Archive
from qwq_local.profiles.keys import RULES
from qwq_local.profiles.rules import Choice, Number, Rule, Switch

MAX_ITEMS = 200
_MAX_ENTRIES = 5000
_MAX_S = 0.02
_RECENT = 200


@dataclass(frozen=True, slots=True)
class _Around:
    """Where names come from."""

    setup: ChatSetup
    archive: Archive


def completions(setup: ChatSetup, archive: Archive, before_cursor: str) -> Sequence[Completion]:
    """What may stand in place of the end of the text; at most MAX_ITEMS, nothing for an ordinary question."""
    line = before_cursor.rpartition("\n")[2]
    found: list[Completion] = []
    try:
        for completion in _found(_Around(setup, archive), before_cursor, line):
            found.append(completion)
            if len(found) >= MAX_ITEMS:
                break
    except QwqError:
        # A folder or a history that cannot be read has nothing to offer; whoever opens it is told why.
        return found
    return found


def _found(around: _Around, before_cursor: str, line: str) -> Iterator[Completion]:
    if before_cursor.startswith("/"):
        name, space, rest = before_cursor[1:].partition(" ")
        if not space:
            yield from _commands(name)
        elif (complete := _OF_COMMANDS.get(name.lower())) is not None:
            yield from complete(around, rest)
        return
    at = _mention(line)
    if at is not None:
        yield from _files(around.setup.cwd, line[at + 1 :], mark="@")


def _mention(line: str) -> int | None:
    """Where the @ is that the cursor stands behind, if it begins a word and its quotes are open."""
    at = line.rfind("@")
    if at < 0 or (at and not (line[at - 1].isspace() or line[at - 1] in "([")):
        return None
    word = line[at + 1 :]
    is_quoted = word.startswith('"') and word.count('"') == 1
    return at if is_quoted or not (set(word) & {" ", "\t", '"'}) else None


def _commands(start: str) -> Iterator[Completion]:
    for command in COMMANDS:
        for name in (command.name, *command.aliases):
            if name.startswith(start.lower()):
                yield Completion(f"/{name}", len(start) + 1, command.help)


def _words(names: Iterable[tuple[str, str]], start: str) -> Iterator[Completion]:
    """Those names, with what they mean, that begin so, in any case."""
    for name, meaning in names:
        if name.lower().startswith(start.lower()):
            yield Completion(name, len(start), meaning)


def _bare(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((name, "") for name in names)


def _of_file(around: _Around, rest: str) -> Iterator[Completion]:
    if " " not in rest and rest and "drop".startswith(rest):
        yield Completion("drop", len(rest), "take files back")
    yield from _files(around.setup.cwd, _last_word(rest))


def _of_save(around: _Around, rest: str) -> Iterator[Completion]:
    yield from _files(around.setup.cwd, _last_word(rest))


def _of_set(_: _Around, rest: str) -> Iterator[Completion]:
    key, space, start = rest.partition(" ")
    if not space:
        yield from _words(((name, rule.allowed) for name, rule in RULES.items()), key)
    elif key in RULES:
        yield from _words(_bare((*_values(RULES[key]), "default")), start.lstrip())


def _of_regen(_: _Around, rest: str) -> Iterator[Completion]:
    word = rest.rpartition(" ")[2]
    key, equals, start = word.partition("=")
    if equals and key in RULES:
        yield from _words(_bare(_values(RULES[key])), start)
        return
    names = [
        ("--seed", "the seed of this turn"),
        *((f"{name}=", rule.allowed) for name, rule in RULES.items()),
    ]
    yield from _words(names, word)


def _values(rule: Rule) -> Sequence[str]:
    """The values that have a name."""
    match rule:
        case Choice():
            return (*rule.options, *(["auto"] if rule.auto else []))
        case Switch():
            return ("on", "off", *(["auto"] if rule.auto else []))
        case Number():
            return tuple(rule.words)
        case _:
            return ()


def _of_resume(around: _Around, rest: str) -> Iterator[Completion]:
    for record in around.archive.conversations(_RECENT):
        if record.name and record.name.lower().startswith(rest.lower()):
            yield Completion(record.name, len(rest), f"{record.n_turns} turns")
        elif str(record.id).startswith(rest):
            yield Completion(str(record.id), len(rest), called(record))


def _of_think(_: _Around, rest: str) -> Iterator[Completion]:
    views = [(str(view), "how thinking is shown") for view in ThinkView]
    yield from _words([("last", "open the last thought"), ("grep", "search all thoughts"), *views], rest)


def _of_copy(_: _Around, rest: str) -> Iterator[Completion]:
    yield from _words(_bare(("answer", "thought", "code")), rest)


def _of_help(_: _Around, rest: str) -> Iterator[Completion]:
    known = [(command.name, command.help) for command in COMMANDS]
    yield from _words([*known, ("keys", "the keys of a terminal")], rest)


def _of_model(around: _Around, rest: str) -> Iterator[Completion]:
    yield from _words(_bare(around.setup.model_names()), rest)


def _of_profile(around: _Around, rest: str) -> Iterator[Completion]:
    yield from _words(_bare(around.setup.profile_names()), rest)


_OF_COMMANDS: dict[str, Callable[[_Around, str], Iterator[Completion]]] = {
    "file": _of_file,
    "save": _of_save,
    "set": _of_set,
    "regen": _of_regen,
    "retry-from": _of_regen,
    "resume": _of_resume,
    "think": _of_think,
    "copy": _of_copy,
    "help": _of_help,
    "model": _of_model,
    "profile": _of_profile,
}


def _last_word(text: str) -> str:
    """What is being written at the end: after the last space, or from an open quote on."""
    for quote in "\"'":
        if text.count(quote) % 2:
            return text[text.rfind(quote) :]
    at = len(text)
    while at and (text[at - 1] not in " \t" or text[at - 2 : at - 1] == "\\"):
        at -= 1
    return text[at:]


def _files(cwd: Path, word: str, mark: str = "") -> Iterator[Completion]:
    """File names for a word that may begin with a quote; `mark` stands before it and is replaced too."""
    quote = word[0] if word[:1] in ('"', "'") else ""
    written = word[len(quote) :].replace("\\ ", " ")
    slash = max(written.rfind("/"), written.rfind(os.sep))
    folder, start = written[: slash + 1], written[slash + 1 :]
    for name, is_folder in _entries(resolved(folder or ".", cwd), start):
        text = f"{folder}{name}{'/' if is_folder else ''}"
        needs_quotes = quote or set(text) & set(" \t\"'")
        mark_of_quote = quote or ('"' if '"' not in text else "'")
        # A folder's quote stays open: what is in it comes next.
        shown = f"{mark_of_quote}{text}{'' if is_folder else mark_of_quote}" if needs_quotes else text
        yield Completion(mark + shown, len(mark) + len(word), "folder" if is_folder else "")


def _entries(folder: Path, start: str) -> list[tuple[str, bool]]:
    """Names in a folder that begin so, folders marked, in order; as many as there is time for."""
    found = []
    until = time.monotonic() + _MAX_S
    try:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= _MAX_ENTRIES or time.monotonic() > until:
                    break
                if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                    found.append((entry.name, is_kind(entry.is_dir)))
    except OSError:
        return []
    return sorted(found)[:MAX_ITEMS]
