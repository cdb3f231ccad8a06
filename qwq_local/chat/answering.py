"""Who answers: a model, a profile and settings in, a backend that goes along with their changes out.

A change that cannot be had leaves everything as it was. Knows no conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from qwq_local.backend.question import Question
from qwq_local.chat.setup import ChatBackend, ChatSetup
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.engine.api import SamplerSettings
from qwq_local.errors import ProfileError, QwqError
from qwq_local.events import Planned
from qwq_local.history.records import TurnOrigin
from qwq_local.profiles.keys import RULES, Profile
from qwq_local.profiles.layers import FLAG, ResolvedProfile

# What decides which tokens come, besides the plan: the sampler's keys, the budgets, how it is computed.
_SAMPLER_KEYS = tuple(field.name for field in fields(SamplerSettings) if field.name not in ("seed", "order"))
RECORDED_KEYS = (
    *_SAMPLER_KEYS,
    "sampler_order",
    *("thinking_budget", "answer_reserve", "max_tokens", "loop_guard"),
    *("n_batch", "n_ubatch", "flash_attention", "threads"),
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen: a model and a profile by name, settings over them, and what they come to."""

    model: str
    profile: str | None
    settings: Mapping[str, str]
    resolved: ResolvedProfile


class Answering:
    """The backend that answers and what it answers under; free it with `close`."""

    def __init__(self, setup: ChatSetup) -> None:
        """Raises ProfileError, ModelNotFound, UsageError."""
        self._setup = setup
        asked = settings_of(setup.settings)
        if setup.system is not None:
            asked["system"] = setup.system
        if setup.seed is not None:
            asked["seed"] = str(setup.seed)
        self.chosen = self._choice(setup.model, setup.profile, asked)
        self.backend: ChatBackend = setup.make_backend(setup.model, self.chosen.resolved)
        self.planned: Planned | None = None

    @property
    def profile(self) -> Profile:
        """The profile in force."""
        return self.chosen.resolved.profile

    @property
    def settings(self) -> Mapping[str, str]:
        """What was set over the profile, as text by key."""
        return self.chosen.settings

    @property
    def window(self) -> int:
        """The context in force in tokens, 0 before the first question to this model."""
        return self.planned.n_ctx if self.planned is not None else 0

    def change(self, changes: Mapping[str, str | None]) -> None:
        """Set keys; None takes one back to the profile's. Raises ProfileError, and nothing changes then."""
        chosen = self.chosen
        try:
            self._adopt(self._choice(chosen.model, chosen.profile, _changed(chosen.settings, changes)))
        except ProfileError as error:
            # The setting was no flag of the command line.
            raise ProfileError(str(error).removeprefix(f"{FLAG}: ")) from error

    def change_profile(self, name: str) -> None:
        """Go on under another profile, the settings kept. Raises ProfileError; nothing changes then."""
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
        """What the profile says about a key, were it not set."""
        chosen = self.chosen
        others = {name: text for name, text in chosen.settings.items() if name != key}
        return shown(self._choice(chosen.model, chosen.profile, others).resolved.profile, key)

    def change_model(self, name: str) -> Planned:
        """Let another model answer; its plan for a short question. Raises QwqError, the old one being back.

        The old one is freed before the new one is planned: the memory is not for both.
        """
        chosen = self._choice(name, self.chosen.profile, self.chosen.settings)
        backend = self._setup.make_backend(name, chosen.resolved)
        self.backend.close()
        try:
            planned = backend.dry_run(Question([Message(Role.USER, "?")]))
        except QwqError:
            backend.close()
            self.backend = self._setup.make_backend(self.chosen.model, self.chosen.resolved)
            raise
        self.chosen, self.backend, self.planned = chosen, backend, None
        return planned

    def origin(self, planned: Planned, cached_tokens: int) -> TurnOrigin:
        """Where a turn under this plan comes from."""
        return TurnOrigin(
            model=self.chosen.model,
            identity=self.backend.identity(),
            library=self._setup.library,
            profile=self.chosen.profile or "",
            settings={key: shown(self.profile, key) for key in RECORDED_KEYS},
            seed=planned.seed,
            yarn_factor=planned.yarn_factor,
            kv_type=planned.kv_type,
            cached_tokens=cached_tokens,
        )

    def close(self) -> None:
        """Free the model."""
        self.backend.close()

    def _choice(self, model: str, profile: str | None, settings: Mapping[str, str]) -> Chosen:
        texts = [f"{key}={text}" for key, text in settings.items()]
        return Chosen(model, profile, dict(settings), self._setup.resolve(model, profile, texts))

    def _adopt(self, chosen: Chosen) -> None:
        try:
            self.backend.adopt(chosen.resolved.profile)
        except QwqError:
            self.backend.adopt(self.chosen.resolved.profile)
            raise
        self.chosen = chosen


def shown(profile: Profile, key: str) -> str:
    """The value of a key as it would be set. Raises KeyError for an unknown one."""
    return RULES[key].show(getattr(profile, key))


def settings_of(texts: Sequence[str]) -> dict[str, str]:
    """`key=value` texts by key, the last of each. Raises ProfileError for a text that is none."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ProfileError(f"{text[:60]!r}: write key=value, such as temperature=0.6.")
        found[key.strip()] = value
    return found


def _changed(settings: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    kept = {key: text for key, text in settings.items() if key not in changes}
    return kept | {key: text for key, text in changes.items() if text is not None}
