"""The model that answers a chat: its backend, its profile, and the settings over that profile.

A change that fails leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qwq_local.backend.api import (
    Adopts,
    Backend,
    CountsTokens,
    Identified,
    Keeps,
    Plans,
    ReplyRequest,
)
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.errors import ProfileError, QwqError
from qwq_local.events import Notice, Planned
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnOrigin
from qwq_local.profiles.keys import RECORDED_KEYS, RULES, Profile
from qwq_local.profiles.layers import FLAG, ResolvedProfile

_SENT_KEYS = frozenset(("system", "seed", "question_suffix"))
"""Keys that a chat sends with each question; the backend need not adopt them."""


Resolve = Callable[[str, str | None, Sequence[str]], ResolvedProfile]
"""Finds the profile for a model's name, a task's name and `key=value` texts. Raises ProfileError."""

MakeBackend = Callable[[str, ResolvedProfile], Backend]
"""Makes a backend, with nothing loaded yet, for a model's name and its profile. Raises ModelNotFound,
UsageError for an ambiguous name, ModelFileError."""


@dataclass(frozen=True, slots=True)
class ChatSetup:
    """Everything that a chat needs. Who opens the archive closes it; the chat closes its backends.

    `settings` are the `key=value` texts of flags. `resume` is the conversation to continue, `entered` are
    lines to run before the user's. `library` names llama.cpp's version.
    """

    archive: Archive
    make_backend: MakeBackend
    resolve: Resolve
    model: str
    profile: str | None = None
    settings: tuple[str, ...] = ()
    resume: int | None = None
    entered: tuple[str, ...] = ()
    cwd: Path = field(default_factory=Path.cwd)
    library: str = ""
    model_names: Callable[[], Sequence[str]] = tuple
    profile_names: Callable[[], Sequence[str]] = tuple


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model and a profile by name, settings over them, and the profile that they give."""

    model: str
    profile: str | None
    settings: Mapping[str, str]
    resolved: ResolvedProfile


class ChatModel:
    """The backend that answers and the profile it answers under; free it with `close`.

    This is the one place that asks what the backend can do besides answering.
    """

    def __init__(self, setup: ChatSetup) -> None:
        """Raises ProfileError, ModelNotFound, UsageError."""
        self._setup = setup
        self.chosen = self._choice(setup.model, setup.profile, parse_settings(setup.settings))
        self.planned: Planned | None = None
        """The plan of the last question to this model."""
        self.backend = setup.make_backend(setup.model, self.chosen.resolved)

    def can_plan(self) -> bool:
        """Whether there are plans: the context, its use, the memory."""
        return isinstance(self.backend, Plans)

    def can_adopt(self) -> bool:
        """Whether the profile can be changed."""
        return isinstance(self.backend, Adopts)

    def can_continue(self) -> bool:
        """Whether a stopped turn can be continued, which takes the same weights."""
        return isinstance(self.backend, Identified)

    def plan(self, question: ReplyRequest) -> Planned | None:
        """The plan for a question, None if the backend makes none. Raises PromptTooLong, DoesNotFit."""
        return self.backend.dry_run(question) if isinstance(self.backend, Plans) else None

    def count_tokens(self, text: str) -> int | None:
        """The tokens of plain text, None if the backend does not count them."""
        return self.backend.count_tokens(text) if isinstance(self.backend, CountsTokens) else None

    def keep(self) -> Iterator[Notice]:
        """Let the backend keep what it prefilled, if it can."""
        if isinstance(self.backend, Keeps):
            yield from self.backend.keep()

    def identity(self) -> str:
        """Which weights answer; "" if that is unknown."""
        return self.backend.identity() if isinstance(self.backend, Identified) else ""

    @property
    def name(self) -> str:
        """The name by which the model was chosen."""
        return self.chosen.model

    @property
    def profile(self) -> Profile:
        """The profile in force."""
        return self.chosen.resolved.profile

    def change(self, changes: Mapping[str, str | None]) -> None:
        """Set keys; None restores the profile's value. Raises ProfileError, and nothing changes then."""
        chosen = self.chosen
        kept = {key: text for key, text in chosen.settings.items() if key not in changes}
        settings = kept | {key: text for key, text in changes.items() if text is not None}
        if not self.can_adopt() and not changes.keys() <= _SENT_KEYS:
            raise ProfileError(f"{chosen.model} takes no other settings than the seed and the system prompt.")
        try:
            self._adopt(self._choice(chosen.model, chosen.profile, settings))
        except ProfileError as error:
            # The setting was no flag of the command line.
            raise ProfileError(str(error).removeprefix(f"{FLAG}: ")) from error

    def change_profile(self, name: str) -> None:
        """Use another profile and keep the settings. Raises ProfileError, and nothing changes then."""
        self._adopt(self._choice(self.chosen.model, name, self.chosen.settings))

    @contextmanager
    def under(self, changes: Mapping[str, str | None]) -> Iterator[None]:
        """Settings for one turn alone. Raises ProfileError before it begins."""
        before = self.chosen
        if changes:
            self.change(changes)
        try:
            yield
        finally:
            if changes:
                self._adopt(before)

    def default_of(self, key: str) -> str:
        """The profile's own value of a key, as text."""
        chosen = self.chosen
        others = {name: text for name, text in chosen.settings.items() if name != key}
        return value_text(self._choice(chosen.model, chosen.profile, others).resolved.profile, key)

    def change_model(self, name: str) -> Planned | None:
        """Let another model answer; returns its plan for a short question, if it makes plans.

        The old one is freed before the new one is planned: the memory does not hold both. Raises QwqError;
        the old one answers again then.
        """
        chosen = self._choice(name, self.chosen.profile, self.chosen.settings)
        backend = self._setup.make_backend(name, chosen.resolved)
        self.backend.close()
        self.backend = backend
        try:
            planned = self.plan(ReplyRequest([Message(Role.USER, "?")]))
        except QwqError:
            backend.close()
            self.backend = self._setup.make_backend(self.chosen.model, self.chosen.resolved)
            raise
        self.chosen, self.planned = chosen, None
        return planned

    def origin(self, seed: int | None) -> TurnOrigin:
        """What a turn is computed with, as far as that is known before its plan; `seed` is the one sent."""
        return TurnOrigin(
            model=self.chosen.model,
            identity=self.identity(),
            library=self._setup.library if self.can_continue() else "",
            profile=self.chosen.profile or "",
            settings={key: value_text(self.profile, key) for key in RECORDED_KEYS},
            seed=seed or 0,
        )

    def _choice(self, model: str, profile: str | None, settings: Mapping[str, str]) -> ModelChoice:
        texts = [f"{key}={text}" for key, text in settings.items()]
        return ModelChoice(model, profile, dict(settings), self._setup.resolve(model, profile, texts))

    def _adopt(self, chosen: ModelChoice) -> None:
        if isinstance(self.backend, Adopts):
            try:
                self.backend.adopt(chosen.resolved.profile)
            except QwqError:
                self.backend.adopt(self.profile)
                raise
        self.chosen = chosen


def value_text(profile: Profile, key: str) -> str:
    """The value of a key as the user would write it. Raises KeyError for an unknown key."""
    return RULES[key].show(getattr(profile, key))


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """`key=value` texts by key, the last of each. Raises ProfileError for another form."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ProfileError(f"{text[:60]!r}: write key=value, such as temperature=0.6.")
        found[key.strip()] = value
    return found
