"""Completions of words, values and file names at the cursor.

Each completion looks into one folder at most, and never below it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from qwq_local.chat.events import Completion
from qwq_local.chat.files import mode_of, resolved

MAX_ITEMS = 200
# The @ of a name at the end of the text; the quote of a name may be open.
MENTION_START = re.compile(r'(?<![^\s(\[])@(?=(?:"[^"]*|[^ \t"]*)\Z)')
_MAX_ENTRIES = 5000


def complete_word(names: Iterable[tuple[str, str]], start: str) -> Iterator[Completion]:
    """The names that begin with `start`, in any case; each comes with its meaning."""
    for name, meaning in names:
        if name.lower().startswith(start.lower()):
            yield Completion(name, len(start), meaning)


def complete_name(names: Iterable[str], start: str) -> Iterator[Completion]:
    """The names that begin with `start`, in any case, without a meaning."""
    yield from complete_word(((name, "") for name in names), start)


def last_word(text: str) -> str:
    """The word that is being written: after the last space, or from an open quote on."""
    for quote in "\"'":
        if text.count(quote) % 2:
            return text[text.rfind(quote) :]
    at = len(text)
    while at and (text[at - 1] not in " \t" or text[at - 2 : at - 1] == "\\"):
        at -= 1
    return text[at:]


def complete_file(cwd: Path, word: str, mark: str = "") -> Iterator[Completion]:
    """File names for a word that may begin with a quote; `mark` comes before it and is replaced too."""
    quote = word[0] if word[:1] in ('"', "'") else ""
    written = word[len(quote) :].replace("\\ ", " ")
    slash = max(written.rfind("/"), written.rfind(os.sep))
    folder, start = written[: slash + 1], written[slash + 1 :]
    for name, is_folder in _entries(resolved(folder or ".", cwd), start):
        text = f"{folder}{name}{'/' if is_folder else ''}"
        needs_quotes = quote or set(text) & set(" \t\"'")
        mark_of_quote = quote or ('"' if '"' not in text else "'")
        # A folder's quote stays open, for what is in it.
        shown = f"{mark_of_quote}{text}{'' if is_folder else mark_of_quote}" if needs_quotes else text
        yield Completion(mark + shown, len(mark) + len(word), "folder" if is_folder else "")


def _entries(folder: Path, start: str) -> list[tuple[str, bool]]:
    """Names in a folder that begin with `start`, and whether each is a folder; sorted."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MAX_ENTRIES):
                if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
                    found.append((entry.name, stat.S_ISDIR(mode_of(Path(entry.path)))))
    except OSError:
        return []
    return sorted(found)[:MAX_ITEMS]
