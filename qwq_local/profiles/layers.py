"""Profiles: names, environment and flags in, one Profile out, every value with its origin.

Layers, later ones win key by key: built-in defaults, the model's profile, the task's profile (in both the
bundled file, then the user's own), environment variables, `--set` flags. A task written for a 32k window
must not break a smaller model, so a model profile caps what a task may ask for (`max_thinking_budget`,
`max_answer_reserve`); environment and flags are not capped. Knows no model file and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_local.errors import ProfileError
from qwq_local.paths import Directories, bundled
from qwq_local.planning.shape import is_quantized
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.files import Kind, Layer, ProfileEntry, ProfileFolders, file_layers, list_profiles
from qwq_local.profiles.keys import RULES, Profile, accepted_text, nearest

__all__ = [
    "Kind",
    "Profile",
    "ProfileEntry",
    "ProfileFolders",
    "ResolvedProfile",
    "list_profiles",
    "model_profile_name",
    "own_model_profile",
    "profile_folders",
    "resolve",
]

DEFAULT_ORIGIN = "default"
ENVIRONMENT_PREFIX = "QWQ_"
FLAG = "--set"
NOT_KEYS = frozenset({"QWQ_MODEL", "QWQ_PROFILE", "QWQ_CONFIG_DIR", "QWQ_CACHE_DIR", "QWQ_DATA_DIR"})
TYPO_LIKENESS = 0.75  # QWQ_ variables less like a key than this are another program's business
CAPPED = {"thinking_budget": "max_thinking_budget", "answer_reserve": "max_answer_reserve"}


@dataclass(frozen=True, slots=True)
class ResolvedProfile:
    """A profile with the names it was made from and, for every key, where its value came from.

    `notices` are lines for the user, such as an environment variable that looks like a misspelt key.
    """

    profile: Profile
    origins: Mapping[str, str]
    model: str
    task: str | None
    notices: tuple[str, ...] = ()


def profile_folders(directories: Directories) -> ProfileFolders:
    """The folders in which this user's and the bundled profiles lie."""
    return ProfileFolders(own=directories.config / "profiles", bundled=bundled("profiles"))


def model_profile_name(model: str, folders: ProfileFolders) -> str:
    """The model profile that goes with what was given as `--model`.

    That is the profile of the same name (a GGUF's file name without its ending, a name without `:Q4_K_M`),
    else the one of QwQ-32B.
    """
    return own_model_profile(model, folders) or DEFAULT_MODEL


def own_model_profile(model: str, folders: ProfileFolders) -> str | None:
    """The model profile of the same name, None when there is none."""
    stem = Path(model).name
    stem = stem[: -len(".gguf")] if stem.lower().endswith(".gguf") else stem
    for name in (model, stem, stem.partition(":")[0]):
        if folders.has(Kind.MODEL, name):
            return name
    return None


def resolve(
    model: str,
    task: str | None,
    folders: ProfileFolders,
    environ: Mapping[str, str] | None = None,
    settings: Sequence[str] = (),
) -> ResolvedProfile:
    """The profile for a model and a task; `settings` are the `key=value` texts of `--set`, in order.

    `model` is whatever `--model` was; `task` None leaves the task's layer out. Raises ProfileError naming
    the file, variable or flag, the key, and what is allowed.
    """
    variables = environ or {}
    model = model_profile_name(model, folders)
    layers = file_layers(Kind.MODEL, model, folders)
    if task is not None:
        layers += file_layers(Kind.TASK, task, folders)
    layers += _environment_layers(variables)
    layers += [_flag_layer(setting) for setting in settings]

    values, deciding = _merged(layers)
    origins = {key: deciding[key].origin if key in deciding else DEFAULT_ORIGIN for key in RULES}
    _cap_task_budgets(values, deciding, origins)
    is_assumed = model == DEFAULT_MODEL and origins["native_window"] == layers[0].origin
    profile = Profile(**values, is_window_known=not is_assumed)
    _check_together(profile, origins)
    return ResolvedProfile(profile, origins, model, task, notices=_misspelt(variables))


def _merged(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, Layer]]:
    """The last value of each key, and the layer that gave it."""
    values: dict[str, Any] = {}
    deciding: dict[str, Layer] = {}
    for layer in layers:
        values.update(layer.values)
        deciding.update(dict.fromkeys(layer.values, layer))
    return values, deciding


def _environment_layers(environ: Mapping[str, str]) -> list[Layer]:
    """One layer per QWQ_<KEY> variable; an empty one counts as not set."""
    layers = []
    for key in RULES:
        variable = ENVIRONMENT_PREFIX + key.upper()
        if text := environ.get(variable):
            layers.append(Layer(variable, {key: accepted_text(key, text, variable)}))
    return layers


def _flag_layer(setting: str) -> Layer:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ProfileError(f"{FLAG} {setting[:60]}: write {FLAG} key=value, such as {FLAG} temperature=0.6.")
    return Layer(FLAG, {key.strip(): accepted_text(key.strip(), text, FLAG)})


def _cap_task_budgets(values: dict[str, Any], deciding: Mapping[str, Layer], origins: dict[str, str]) -> None:
    for key, cap_key in CAPPED.items():
        cap = values.get(cap_key, 0)
        if cap and key in deciding and deciding[key].kind is Kind.TASK and values[key] > cap:
            origins[key] = f"{origins[cap_key]}: {cap_key} (the task asks for {values[key]:,})"
            values[key] = cap


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
    known = [key.upper() for key in RULES] + [name.removeprefix(ENVIRONMENT_PREFIX) for name in NOT_KEYS]
    notices = []
    for variable in sorted(environ):
        name = variable[len(ENVIRONMENT_PREFIX) :]
        if not variable.upper().startswith(ENVIRONMENT_PREFIX) or variable in NOT_KEYS:
            continue
        if variable.startswith(ENVIRONMENT_PREFIX) and name in known:
            continue
        if near := nearest(name.upper(), known, TYPO_LIKENESS):
            meant = ENVIRONMENT_PREFIX + near
            notices.append(f"The environment variable {variable} is not read. Did you mean {meant}?")
    return tuple(notices)
