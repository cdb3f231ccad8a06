"""What a chat is made from: the archive, how a model's name becomes a backend, and what was asked for.

Everything that touches the machine, model files, profiles and the clock, comes in here. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qwq_local.backend.question import Adopts, Backend, CountsTokens, Identified, Keeps, Plans
from qwq_local.history.archive import Archive
from qwq_local.profiles.layers import ResolvedProfile


class Resolve(Protocol):
    """Names and `key=value` texts in, the profile out. Raises ProfileError."""

    def __call__(self, model: str, profile: str | None, settings: Sequence[str], /) -> ResolvedProfile:
        """The profile for a model, a task and settings over it."""


class ChatBackend(Backend, Plans, CountsTokens, Adopts, Keeps, Identified, Protocol):
    """A backend with every ability."""


class MakeBackend(Protocol):
    """A model's name and its profile in, a backend out that has loaded nothing yet."""

    def __call__(self, model: str, resolved: ResolvedProfile, /) -> ChatBackend:
        """Raises ModelNotFound, UsageError for an ambiguous name, ModelFileError."""


def _no_names() -> Sequence[str]:
    return ()


@dataclass(frozen=True, slots=True)
class ChatSetup:
    """All that a chat needs. The archive stays the caller's to close; backends are the chat's.

    `settings` are the `key=value` texts of flags; `system` and `seed` stand for those keys. `resume` is the
    conversation to go on with, `entered` lines that are done before the person's. `library` names llama.cpp's
    version.
    """

    archive: Archive
    make_backend: MakeBackend
    resolve: Resolve
    model: str
    profile: str | None = None
    settings: tuple[str, ...] = ()
    system: str | None = None
    seed: int | None = None
    resume: int | None = None
    entered: tuple[str, ...] = ()
    cwd: Path = field(default_factory=Path.cwd)
    library: str = ""
    model_names: Callable[[], Sequence[str]] = _no_names
    profile_names: Callable[[], Sequence[str]] = _no_names
