"""What the shell may complete the word of a flag with: its beginning in, all values that begin so out.

Whatever goes wrong, there is nothing to complete with: nobody reads an error while pressing Tab.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from qwq_local.errors import QwqError

Complete = Callable[[str], list[str]]


def _beginning_so(values: Callable[[], Iterable[str]]) -> Complete:
    """A completion with those of the values that begin with what is typed."""

    def complete(incomplete: str) -> list[str]:
        try:
            return [value for value in values() if value.startswith(incomplete)]
        except (QwqError, OSError):
            return []

    return complete


def _models() -> Iterable[str]:
    from qwq_local.cli.profiles import local_model_names
    from qwq_local.models.store import MINIATURE

    return [MINIATURE, *local_model_names()]


def _tasks() -> Iterable[str]:
    from qwq_local.paths import directories
    from qwq_local.profiles.files import Kind, list_profiles
    from qwq_local.profiles.layers import profile_folders

    folders = profile_folders(directories(os.environ))
    return [entry.name for entry in list_profiles(folders) if entry.kind is Kind.TASK]


def _machines() -> Iterable[str]:
    from qwq_local.machine.files import machine_names
    from qwq_local.paths import directories
    from qwq_local.profiles.layers import profile_folders

    return machine_names(profile_folders(directories(os.environ)))


def _settings() -> Iterable[str]:
    from qwq_local.profiles.keys import RULES

    return [f"{key}=" for key in RULES]


models = _beginning_so(_models)
tasks = _beginning_so(_tasks)
machines = _beginning_so(_machines)
settings = _beginning_so(_settings)


def types(incomplete: str) -> list[str]:
    """The file types that begin with what is typed, in any case, as they are found in any."""
    from qwq_convert.file_types import FILE_TYPES

    typed, n = incomplete.upper(), len(incomplete)
    return [incomplete + name[n:] for name in FILE_TYPES if name.startswith(typed)]
