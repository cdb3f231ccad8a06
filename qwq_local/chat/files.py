"""The files that a path, a directory, a glob or an `@path` in a question means, and their texts.

Directories and globs are walked within limits. Hidden files, version control and links to directories are
left out. A file that is not text is refused by name and byte.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from qwq_local.dialogue.conversation import Attachment
from qwq_local.errors import UsageError
from qwq_local.utf8 import read_text

MAX_BYTES = 8 << 20
"""Of all files together: far more than the largest window holds, and counted in a second or two."""

MAX_FILES = 100

MAX_LOOKED_AT = 20_000
_MAX_DEPTH = 40
_SNIFFED_BYTES = 8192
_GLOB = re.compile(r"[*?[]")
_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|\\[ "']|\S)+""")
_PIECE = re.compile(r""""([^"]*)"|'([^']*)'|\\([ "'])""")
# A name in a question: at its start, after a space or an opening bracket, so never inside an e-mail address.
_MENTION = re.compile(r'(?<![^\s(\[])@(?:"([^"\n]+)"|([^\s"]+))')
_AFTER_A_NAME = ".,;:!?)]}'"
_MAX_MENTIONS = 2000  # most of them are no files: a pasted source has many @
_NOT_OURS = frozenset({"CVS", "_darcs", "__pycache__", "node_modules"})


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file and the name it is shown under; `was_named` when the user named it by itself."""

    name: str
    path: Path
    was_named: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Files in order; `left_out` has a line for each kind of thing that was not taken."""

    files: tuple[FoundFile, ...]
    left_out: tuple[str, ...] = ()


def find_files(given: str, cwd: Path, limit: int) -> Found:
    """The files that a path, a directory or a glob means, at most `limit`. Raises UsageError for none."""
    path = resolved(given, cwd)
    mode = mode_of(path)
    if not mode and _GLOB.search(given):
        return _of_walk(given, *_pattern(given, cwd), limit)
    if not mode:
        raise UsageError(f"there is no file {given}.")
    if stat.S_ISDIR(mode):
        name = given.rstrip("/") or "/"
        return _of_walk(given, path, "" if name == "." else name, ("**", "*"), limit)
    if not stat.S_ISREG(mode):
        raise UsageError(f"{given} is no regular file.")
    return Found((FoundFile(given, path, True),))


def resolved(given: str, cwd: Path) -> Path:
    """The path that a user wrote, `~` expanded. Raises UsageError for a text that is no path."""
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{given}: {error}") from None
    if "\0" in given:
        raise UsageError(f"{given!r} is no file name.")
    return path if path.is_absolute() else cwd / path


def is_file(given: str, cwd: Path) -> bool:
    """Whether it names an existing regular file."""
    try:
        return stat.S_ISREG(mode_of(resolved(given, cwd)))
    except UsageError:
        return False


def mentioned_files(question: str, cwd: Path) -> list[Attachment]:
    """The files that a question names with @, in order. Raises UsageError for one that is not text."""
    found: dict[str, Attachment] = {}
    words = dict.fromkeys((match[1], match[2]) for match in _MENTION.finditer(question))
    for quoted, word in list(words)[:_MAX_MENTIONS]:
        # A sentence may continue after a name, with a comma or a bracket.
        name = quoted or (word if is_file(word, cwd) else word.rstrip(_AFTER_A_NAME))
        if name and name not in found and is_file(name, cwd):
            found[name] = read_attachment(FoundFile(name, resolved(name, cwd), True))
        if len(found) > MAX_FILES:
            raise UsageError(f"the question names more than {MAX_FILES} files: attach fewer.")
    return list(found.values())


def read_attachment(file: FoundFile) -> Attachment:
    """The text of a file. Raises UsageError for one that is too large or not text."""
    with suppress(OSError):  # read_text says why
        if file.path.stat().st_size > MAX_BYTES:
            raise UsageError(
                f"{file.name} is larger than {MAX_BYTES >> 20} MiB: no context holds it. "
                "qwq ask --split reads such a file in parts."
            )
    return Attachment(file.name, read_text(file.path, MAX_BYTES, name=file.name))


def split_arguments(text: str) -> list[str]:
    """The words of a line; quotes hold words with spaces together, and so does a backslash before a space."""
    words = (_PIECE.sub(lambda piece: piece[piece.lastindex or 0], word) for word in _WORD.findall(text))
    return [word for word in words if word]


def mode_of(path: Path) -> int:
    """The mode of what is at a path, 0 when nothing can be found there."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _pattern(given: str, cwd: Path) -> tuple[Path, str, tuple[str, ...]]:
    """Where a glob begins to vary: that folder, its name, and the patterns of what is below it."""
    parts = Path(given).parts
    first = next(i for i, part in enumerate(parts) if _GLOB.search(part))
    shown = str(Path(*parts[:first])) if first else ""
    patterns = parts[first:]
    if patterns[-1] == "**":
        patterns = (*patterns, "*")
    return resolved(shown or ".", cwd), shown, patterns


def _of_walk(given: str, root: Path, shown: str, patterns: tuple[str, ...], limit: int) -> Found:
    files: list[FoundFile] = []
    skipped: list[str] = []
    n_over = n_looked = 0
    for n_looked, (parts, path) in enumerate(_walk(root, patterns), start=1):
        if n_looked > MAX_LOOKED_AT:
            break
        if not _matches(parts, patterns):
            continue
        name = "/".join(filter(None, [shown.rstrip("/") if shown != "/" else "", *parts]))
        # Without the halves of surrogate pairs that stand for bytes which are not UTF-8.
        name = os.fsencode(f"/{name}" if shown == "/" else name).decode("utf-8", "replace")
        if reason := _why_not(path):
            skipped.append(f"{name} ({reason})")
        elif len(files) < limit:
            files.append(FoundFile(name, path, False))
        else:
            n_over += 1
    if not files and not n_over and not skipped:
        raise UsageError(f"no file matches {given}.")
    return Found(tuple(files), tuple(_left_out(skipped, n_over, n_looked)))


def _left_out(skipped: Sequence[str], n_over: int, n_looked: int) -> Iterator[str]:
    if skipped:
        rest = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        yield f"left out: {', '.join(skipped[:3])}{rest}."
    if n_over:
        yield f"left out: {n_over:,} more files, there is a limit to how many are taken at once."
    if n_looked > MAX_LOOKED_AT:
        yield f"stopped after looking at {MAX_LOOKED_AT:,} files: name a smaller folder."


def _walk(root: Path, patterns: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Regular files below a folder in the order of their names, as deep as the patterns go."""
    depth = _MAX_DEPTH if "**" in patterns else len(patterns)
    shows_hidden = any(pattern.startswith(".") for pattern in patterns)

    def is_shown(name: str) -> bool:
        return (shows_hidden or not name.startswith(".")) and name not in _NOT_OURS

    for folder, folders, names in os.walk(root):
        parts = Path(folder).relative_to(root).parts
        folders[:] = sorted(filter(is_shown, folders)) if len(parts) + 1 < depth else []
        for name in sorted(filter(is_shown, names)):
            path = Path(folder, name)
            if stat.S_ISREG(mode_of(path)):
                yield (*parts, name), path


@lru_cache(maxsize=4096)
def _matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a path matches the patterns; `**` stands for any number of folders, also none."""
    if not patterns:
        return not parts
    if patterns[0] == "**" and _matches(parts, patterns[1:]):
        return True
    if not parts:
        return False
    if patterns[0] == "**":
        return _matches(parts[1:], patterns)
    is_shown = parts[0][0] != "." or patterns[0][0] == "."
    return is_shown and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _why_not(path: Path) -> str:
    """Why a file that was found in a folder is not attached; empty when it may be."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return f"larger than {MAX_BYTES >> 20} MiB"
        with path.open("rb") as file:
            return "not text" if b"\0" in file.read(_SNIFFED_BYTES) else ""
    except OSError as error:
        return error.strerror or "cannot be read"
