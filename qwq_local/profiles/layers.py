"""Profiles: model, task, environment and flags make one Profile, each value with its origin.

Layers, lowest first; a later one wins key by key: built-in defaults, the model's profile, the task's profile,
environment variables, `--set` flags. A profile is a file `models/NAME.toml` or `tasks/NAME.toml` of flat
keys. The user's own file overrides the bundled one of the same name key by key, or starts from another one
with `extends = "NAME"`.

A task written for a window of 32k must not break a smaller model, so a model's profile caps what a task may
ask for (`max_thinking_budget`, `max_answer_reserve`). Environment and flags are not capped.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qwq_local.errors import ProfileError
from qwq_local.paths import Directories, bundled
from qwq_local.planning.shape import is_quantized
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import RULES, Profile, accepted, excerpt, nearest
from qwq_local.settings import quoted

MAX_FILE_BYTES = 65_536
NAME_FORM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_ORIGIN = "default"
ENVIRONMENT_PREFIX = "QWQ_"
FLAG = "--set"
SCRIPT = "qwq_local.open"
NOT_KEYS = frozenset({"QWQ_MODEL", "QWQ_PROFILE", "QWQ_CONFIG_DIR", "QWQ_CACHE_DIR", "QWQ_DATA_DIR"})
TYPO_LIKENESS = 0.75  # QWQ_ variables less like a key than this belong to another program
CAPPED = {"thinking_budget": "max_thinking_budget", "answer_reserve": "max_answer_reserve"}


class ProfileKind(StrEnum):
    """What a profile is about. Its folder is the plural."""

    MODEL = "model"
    TASK = "task"


@dataclass(frozen=True, slots=True)
class ProfileFolders:
    """The folders of profiles, each with models/ and tasks/. The user's own need not exist."""

    own: Path
    bundled: Path

    def files(self, kind: ProfileKind, name: str) -> tuple[Path, Path]:
        """The paths of the user's and of the bundled profile. Raises ProfileError for a malformed name."""
        if not NAME_FORM.fullmatch(name):
            raise ProfileError(
                f"{quoted(name[:70])} is no profile name, allowed: up to 64 letters, digits, dots, dashes "
                "and underscores, the first a letter or a digit."
            )
        file = f"{kind}s/{name}.toml"
        return self.own / file, self.bundled / file

    def has(self, kind: ProfileKind, name: str) -> bool:
        """Whether there is a profile of that name; False for a malformed one."""
        return NAME_FORM.fullmatch(name) is not None and any(map(_is_file, self.files(kind, name)))

    def names(self, kind: ProfileKind) -> list[str]:
        """The names of all profiles of that kind, sorted."""
        files = [*(self.own / f"{kind}s").glob("*.toml"), *(self.bundled / f"{kind}s").glob("*.toml")]
        return sorted({file.stem for file in files if NAME_FORM.fullmatch(file.stem) and _is_file(file)})


@dataclass(frozen=True, slots=True)
class Layer:
    """Checked values of some keys, and their origin; `kind` is None if that is no file."""

    origin: str
    values: Mapping[str, object]
    kind: ProfileKind | None = None


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """One line of a listing; `problem` is set when the profile cannot be read."""

    name: str
    kind: ProfileKind
    source: str  # own, bundled, or own over bundled
    description: str
    problem: str = ""


def _file_layers(kind: ProfileKind, name: str, folders: ProfileFolders) -> list[Layer]:
    """The layers of one profile, lowest first: the profiles that it extends or overrides, then itself.

    Raises ProfileError for a profile that does not exist or cannot be read, for an unknown key, a value of
    the wrong type, and for files that extend each other in a circle.
    """
    chain: dict[Path, Layer] = {}
    path: Path | None = _find(kind, name, folders)
    while path is not None:
        if path in chain:
            circle = " -> ".join(file.stem for file in (*chain, path))
            raise ProfileError(
                f"{list(chain)[-1]}: extends goes in a circle: {circle}. Take one of them out."
            )
        table = read_table(path)
        extends = table.pop("extends", None)
        if extends is not None and not (isinstance(extends, str) and NAME_FORM.fullmatch(extends)):
            raise ProfileError(f"{path}: extends is {excerpt(extends)}, allowed: the name of a profile.")
        is_own = path.parent.parent == folders.own
        origin = str(path) if is_own else f"bundled {kind}s/{path.name}"
        values = {key: accepted(key, value, str(path)) for key, value in table.items()}
        chain[path] = Layer(origin, values, kind)
        _, bundled = folders.files(kind, path.stem)
        overridden = bundled if is_own and path != bundled and _is_file(bundled) else None
        if extends is None or (extends == path.stem and overridden):
            path = overridden
        else:
            path = _find(kind, extends, folders, asked_by=f"{path}: extends: ")
    return list(chain.values())[::-1]


def list_profiles(folders: ProfileFolders) -> Iterator[ProfileEntry]:
    """All profiles, models first; one that cannot be read comes with its problem."""
    for kind in ProfileKind:
        for name in folders.names(kind):
            has_own, has_bundled = map(_is_file, folders.files(kind, name))
            source = ("own over bundled" if has_bundled else "own") if has_own else "bundled"
            try:
                values = _merged(_file_layers(kind, name, folders))
            except ProfileError as error:
                yield ProfileEntry(name, kind, source, description="", problem=str(error))
            else:
                yield ProfileEntry(name, kind, source, str(values.get("description", "")))


@dataclass(frozen=True, slots=True)
class ResolvedProfile:
    """A profile, the names that it was made from, and the origin of each value.

    `notices` are lines for the user, such as an environment variable that looks like a misspelt key.
    """

    profile: Profile
    origins: Mapping[str, str]
    model: str
    task: str | None
    notices: tuple[str, ...] = ()


def profile_folders(directories: Directories) -> ProfileFolders:
    """The folders of this user's and of the bundled profiles."""
    return ProfileFolders(own=directories.config / "profiles", bundled=bundled("profiles"))


def model_profile_name(model: str, folders: ProfileFolders) -> str:
    """The name of the model profile for a `--model`: its own, else that of QwQ-32B."""
    return own_model_profile(model, folders) or DEFAULT_MODEL


def own_model_profile(model: str, folders: ProfileFolders) -> str | None:
    """The model profile of the same name: a GGUF's file name without its ending, a name without `:Q4_K_M`."""
    stem = Path(model).name
    stem = stem[: -len(".gguf")] if stem.lower().endswith(".gguf") else stem
    for name in (model, stem, stem.partition(":")[0]):
        if folders.has(ProfileKind.MODEL, name):
            return name
    return None


def resolve(
    model: str,
    task: str | None,
    folders: ProfileFolders,
    environ: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
    given: Mapping[str, object] | None = None,
) -> ResolvedProfile:
    """The profile for a model, as `--model` names it, and a task, or no task.

    `settings` are the `key=value` texts of `--set`, in order; `given` are the values that a script sets.
    Raises ProfileError with the file, variable or flag, the key, and the allowed values.
    """
    variables = environ or {}
    model = model_profile_name(model, folders)
    layers = _file_layers(ProfileKind.MODEL, model, folders)
    if task is not None:
        layers += _file_layers(ProfileKind.TASK, task, folders)
    # An empty variable counts as not set.
    names = {key: ENVIRONMENT_PREFIX + key.upper() for key in RULES}
    layers += [
        Layer(name, {key: accepted(key, variables[name], name, is_text=True)})
        for key, name in names.items()
        if variables.get(name)
    ]
    layers += [_flag_layer(setting) for setting in settings]
    layers += [Layer(SCRIPT, {key: accepted(key, value, SCRIPT)}) for key, value in (given or {}).items()]

    values = _merged(layers)
    deciding = {key: layer for layer in layers for key in layer.values}
    origins = {key: deciding[key].origin if key in deciding else DEFAULT_ORIGIN for key in RULES}
    for key, cap_key in CAPPED.items():
        cap = values.get(cap_key, 0)
        if cap and key in deciding and deciding[key].kind is ProfileKind.TASK and values[key] > cap:
            origins[key] = f"{origins[cap_key]}: {cap_key} (the task asks for {values[key]:,})"
            values[key] = cap
    is_assumed = model == DEFAULT_MODEL and origins["native_window"] == layers[0].origin
    profile = Profile(**values, is_window_known=not is_assumed)
    _check_together(profile, origins)
    return ResolvedProfile(profile, origins, model, task, notices=_misspelt(variables))


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    return {key: value for layer in layers for key, value in layer.values.items()}


def _flag_layer(setting: str) -> Layer:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ProfileError(f"{FLAG} {setting[:60]}: write {FLAG} key=value, such as {FLAG} temperature=0.6.")
    return Layer(FLAG, {key.strip(): accepted(key.strip(), text, FLAG, is_text=True)})


def _check_together(profile: Profile, origins: Mapping[str, str]) -> None:
    """Refuse values that are each allowed but not with one another."""
    if profile.yarn not in (None, 1.0, *profile.yarn_factors):
        raise ProfileError(
            f"{origins['yarn']}: yarn is {RULES['yarn'].show(profile.yarn)}, allowed: off, auto or one of "
            f"{RULES['yarn_factors'].show(profile.yarn_factors)} (yarn_factors: {origins['yarn_factors']})."
        )
    if profile.kv_type is not None and is_quantized(profile.kv_type) and profile.flash_attention is False:
        raise ProfileError(
            f"kv_type {profile.kv_type} ({origins['kv_type']}) needs flash attention, which is off "
            f"({origins['flash_attention']}). Set flash_attention to on or auto, or kv_type to f16."
        )


def _misspelt(environ: Mapping[str, str]) -> tuple[str, ...]:
    """A notice for each QWQ_ variable that nothing reads and that looks like a key."""
    known = {ENVIRONMENT_PREFIX + key.upper() for key in RULES} | NOT_KEYS
    names = [variable.removeprefix(ENVIRONMENT_PREFIX) for variable in known]
    notices = []
    for variable in sorted(environ.keys() - known):
        prefix, name = variable[:4].upper(), variable[4:].upper()
        if prefix == ENVIRONMENT_PREFIX and (near := nearest(name, names, TYPO_LIKENESS)):
            meant = ENVIRONMENT_PREFIX + near
            notices.append(f"The environment variable {variable} is not read. Did you mean {meant}?")
    return tuple(notices)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # such as a configuration directory that may not be entered
        raise ProfileError(f"{path}: {error.strerror}.") from error


def _find(kind: ProfileKind, name: str, folders: ProfileFolders, asked_by: str = "") -> Path:
    files = folders.files(kind, name)
    if found := next(filter(_is_file, files), None):
        return found
    names = folders.names(kind)
    near = nearest(name, names)
    hint = f"Did you mean {near}?" if near else f"There are {', '.join(names)}."
    raise ProfileError(
        f"{asked_by}there is no {kind} profile {quoted(name)}. {hint} Your own would be {files[0]}."
    )


def read_table(path: Path, what: str = "profile") -> dict[str, object]:
    """The keys and values of a TOML file. Raises ProfileError with its path."""
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
