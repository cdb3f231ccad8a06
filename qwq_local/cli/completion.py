"""What the shell completes the word of a flag with: the values that begin with what is typed.

An error completes nothing: it would only disturb the line that is typed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from qwq_local.errors import QwqError


def _starting(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completion with the values that start with what is typed."""

    def complete(incomplete: str) -> list[str]:
        try:
            return [value for value in values() if value.startswith(incomplete)]
        except (QwqError, OSError):
            return []

    return complete


@_starting
def models() -> Iterable[str]:
    """The names of the models on this machine."""
    from qwq_local.cli.local import local_model_names
    from qwq_local.models.store import MINIATURE

    return [MINIATURE, *local_model_names(os.environ)]


@_starting
def tasks() -> Iterable[str]:
    """The names of the task profiles."""
    from qwq_local.paths import directories
    from qwq_local.profiles.layers import ProfileKind, list_profiles, profile_folders

    folders = profile_folders(directories(os.environ))
    return [entry.name for entry in list_profiles(folders) if entry.kind is ProfileKind.TASK]


@_starting
def machines() -> Iterable[str]:
    """The names of the described machines."""
    from qwq_local.machine.description import machine_names
    from qwq_local.paths import directories
    from qwq_local.profiles.layers import profile_folders

    return machine_names(profile_folders(directories(os.environ)))


def settings(incomplete: str) -> list[tuple[str, str]]:
    """The keys that start with what is typed, each with its meaning."""
    from qwq_local.profiles.keys import MEANINGS

    return [(f"{key}=", meaning) for key, meaning in MEANINGS.items() if f"{key}=".startswith(incomplete)]


def types(incomplete: str) -> list[str]:
    """The file types that start with what is typed; upper and lower case are the same."""
    from qwq_convert.file_types import FILE_TYPES

    typed, n = incomplete.upper(), len(incomplete)
    return [incomplete + name[n:] for name in FILE_TYPES if name.startswith(typed)]
