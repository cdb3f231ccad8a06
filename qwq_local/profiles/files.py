"""Profile files: a name in, the layers that it stands for out, lowest first.

A profile is `models/NAME.toml` or `tasks/NAME.toml`, flat keys only. The user's own file overrides the
bundled one of the same name key by key, or starts from another one with `extends = "NAME"`. Knows nothing
of flags and environment.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qwq_local.errors import ProfileError
from qwq_local.profiles.keys import accepted, excerpt, nearest
from qwq_local.profiles.rules import quoted

MAX_FILE_BYTES = 65_536
NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Kind(StrEnum):
    """What a profile is about; the folder it lies in is its plural."""

    MODEL = "model"
    TASK = "task"


@dataclass(frozen=True, slots=True)
class ProfileFolders:
    """Where profiles are looked for; each holds models/ and tasks/. The user's own need not exist."""

    own: Path
    bundled: Path

    def own_file(self, kind: Kind, name: str) -> Path:
        """Where the user's profile of that name is or would be. Raises ProfileError for a malformed name."""
        return self.own / f"{kind}s" / f"{_checked(name)}.toml"

    def bundled_file(self, kind: Kind, name: str) -> Path:
        """Where the bundled profile of that name is or would be. Raises ProfileError likewise."""
        return self.bundled / f"{kind}s" / f"{_checked(name)}.toml"

    def has(self, kind: Kind, name: str) -> bool:
        """Whether there is a profile of that name; a name that is none has no profile."""
        return NAME_FORM.fullmatch(name) is not None and (
            _is_file(self.own_file(kind, name)) or _is_file(self.bundled_file(kind, name))
        )

    def names(self, kind: Kind) -> list[str]:
        """The names of all profiles of that kind, sorted."""
        files = [*(self.own / f"{kind}s").glob("*.toml"), *(self.bundled / f"{kind}s").glob("*.toml")]
        return sorted({file.stem for file in files if NAME_FORM.fullmatch(file.stem) and _is_file(file)})


@dataclass(frozen=True, slots=True)
class Layer:
    """Checked values of some keys, and where they came from; `kind` is None outside of files."""

    origin: str
    values: Mapping[str, object]
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """One line of a listing; `problem` is set when the profile cannot be read."""

    name: str
    kind: Kind
    source: str  # own, bundled, or own over bundled
    description: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    own: bool
    values: Mapping[str, object]
    extends: str | None


def file_layers(kind: Kind, name: str, folders: ProfileFolders) -> list[Layer]:
    """The layers of one profile, lowest first: what it extends or overrides, then itself.

    Raises ProfileError for a profile that does not exist or cannot be read, for an unknown key, a value of
    the wrong type, and for files that extend each other in a circle.
    """
    chain: list[_File] = []
    path: Path | None = _find(kind, name, folders)
    while path is not None:
        if any(file.path == path for file in chain):
            circle = " -> ".join([*(file.path.stem for file in chain), path.stem])
            raise ProfileError(f"{chain[-1].path}: extends goes in a circle: {circle}. Take one of them out.")
        own = path.parent.parent == folders.own
        chain.append(_read(path, own))
        path = _beneath(chain[-1], kind, folders)
    return [Layer(_origin(file, kind), file.values, kind) for file in reversed(chain)]


def list_profiles(folders: ProfileFolders) -> Iterator[ProfileEntry]:
    """Every profile there is, models first; one that cannot be read is listed with its problem."""
    for kind in Kind:
        for name in folders.names(kind):
            has_own = _is_file(folders.own_file(kind, name))
            has_bundled = _is_file(folders.bundled_file(kind, name))
            source = ("own over bundled" if has_bundled else "own") if has_own else "bundled"
            try:
                layers = file_layers(kind, name, folders)
            except ProfileError as error:
                yield ProfileEntry(name, kind, source, description="", problem=str(error))
                continue
            descriptions = [
                str(layer.values["description"]) for layer in layers if "description" in layer.values
            ]
            yield ProfileEntry(name, kind, source, description=descriptions[-1] if descriptions else "")


def _checked(name: str) -> str:
    if not NAME_FORM.fullmatch(name):
        raise ProfileError(
            f"{quoted(name[:70])} is no profile name, allowed: up to 64 letters, digits, dots, dashes and "
            "underscores, the first a letter or a digit."
        )
    return name


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # such as a configuration directory that may not be entered
        raise ProfileError(f"{path}: {error.strerror}.") from error


def _find(kind: Kind, name: str, folders: ProfileFolders, asked_by: str = "") -> Path:
    own, bundled = folders.own_file(kind, name), folders.bundled_file(kind, name)
    if _is_file(own):
        return own
    if _is_file(bundled):
        return bundled
    names = folders.names(kind)
    near = nearest(name, names)
    hint = f"Did you mean {near}?" if near else f"There are {', '.join(names)}."
    raise ProfileError(
        f"{asked_by}there is no {kind} profile {quoted(name)}. {hint} Your own would be {own}."
    )


def _beneath(file: _File, kind: Kind, folders: ProfileFolders) -> Path | None:
    """The file that `file` builds on: what it extends, else the bundled one that it overrides."""
    bundled = folders.bundled_file(kind, file.path.stem)
    overrides = file.path != bundled and file.own and _is_file(bundled)
    if file.extends is None or (file.extends == file.path.stem and overrides):
        return bundled if overrides else None
    return _find(kind, file.extends, folders, asked_by=f"{file.path}: extends: ")


def _origin(file: _File, kind: Kind) -> str:
    return str(file.path) if file.own else f"bundled {kind}s/{file.path.name}"


def _read(path: Path, own: bool) -> _File:
    table = read_table(path)
    extends = table.pop("extends", None)
    if extends is not None and not (isinstance(extends, str) and NAME_FORM.fullmatch(extends)):
        raise ProfileError(f"{path}: extends is {excerpt(extends)}, allowed: the name of a profile.")
    values = {key: accepted(key, value, str(path)) for key, value in table.items()}
    return _File(path, own, values, extends)


def read_table(path: Path, what: str = "profile") -> dict[str, object]:
    """The keys and values of a TOML file that a person wrote. Raises ProfileError naming it."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise ProfileError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes. A {what} is a few short keys.")
    try:
        # Editors on Windows write a byte order mark, which tomllib refuses.
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not UTF-8 text at byte {error.start}. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not TOML: {str(error)[:200]}.") from error
