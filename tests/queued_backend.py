"""Backends that replay scripted turns, and a Chat over them.

QueuedBackend only answers. PlanningBackend implements every optional protocol; its tokens are words.
Everything else, archive, profiles and files, is real.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwq_local.backend.api import ReplyRequest
from qwq_local.chat.chat import Chat
from qwq_local.chat.events import ChatEvent, Said, Shown
from qwq_local.chat.model import ChatSetup, MakeBackend
from qwq_local.errors import DoesNotFit, PromptTooLong, QwqError
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Ledger,
    Notice,
    Planned,
    Prefill,
    Prompted,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.archive import Archive
from qwq_local.paths import Directories
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import ResolvedProfile, profile_folders, resolve
from qwq_local.terminal.chat_lines import lines_of

NATIVE = 1000
Script = Callable[["QueuedBackend", ReplyRequest], Iterator[Event]]


@dataclass
class QueuedBackend:
    """Replays `scripts`, one for each question, and records the questions."""

    scripts: list[Script] = field(default_factory=list)
    questions: list[ReplyRequest] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    is_closed: bool = False

    def reply(self, question: ReplyRequest) -> Iterator[Event]:
        """The next script."""
        self.questions.append(question)
        self.stopped.clear()
        yield from self.scripts.pop(0)(self, question)

    def stop(self) -> None:
        """Record the stop for the running script."""
        self.stopped.set()

    def close(self) -> None:
        """Record the call."""
        self.is_closed = True


@dataclass
class PlanningBackend(QueuedBackend):
    """Also plans, counts words as tokens, and records the profiles that it adopts."""

    profile: Profile = field(default_factory=Profile)
    name: str = "queued"
    weights: str = "sha256:one"
    kept: Sequence[str] = ()
    refuses: QwqError | None = None
    adopted: list[Profile] = field(default_factory=list)

    def reply(self, question: ReplyRequest) -> Iterator[Event]:
        """Replay the next script, if the question fits."""
        self.questions.append(question)
        self.stopped.clear()
        self.dry_run(question)
        yield from self.scripts.pop(0)(self, question)

    def keep(self) -> Iterator[Notice]:
        """The given notices."""
        yield from map(Notice, self.kept)

    def dry_run(self, question: ReplyRequest) -> Planned:
        """A plan with YaRN for more than NATIVE words; more than 4 times as many are too long."""
        if self.refuses is not None:
            raise self.refuses
        count = self.count_tokens
        tokens = sum(count(message.content) for message in question.messages)
        files = sum(map(count, question.files))
        last = count(question.messages[-1].content)
        factor = next((factor for factor in (1, 2, 4) if tokens <= factor * NATIVE), 0)
        if not factor:
            raise PromptTooLong(f"the prompt has {tokens:,} tokens; the window holds {4 * NATIVE:,}.")
        system = sum(count(m.content) for m in question.messages if m.role == "system")
        ledger = Ledger(
            system,
            files,
            tokens - last - system,
            last - files,
            factor * NATIVE - tokens,
            question.dropped_thinking,
        )
        return Planned(
            model=self.name,
            n_ctx=factor * NATIVE,
            prompt_tokens=tokens,
            thinking_budget=self.profile.thinking_budget,
            answer_reserve=100,
            yarn_factor=float(factor),
            kv_type="f16",
            n_gpu_layers=0,
            seed=question.seed if question.seed is not None else self.profile.seed or 7,
            yarn_origin=NATIVE,
            line=f"context {factor * NATIVE:,}",
            ledger=ledger,
        )

    def largest_context(self) -> int:
        """The largest of the windows."""
        return 4 * NATIVE

    def count_tokens(self, text: str) -> int:
        """The words."""
        return n_words(text)

    def adopt(self, profile: Profile) -> None:
        """Adopt the profile; one that is too hot raises after that."""
        self.profile = profile
        if profile.temperature == 5:
            raise DoesNotFit("too hot.")
        self.adopted.append(profile)

    def identity(self) -> str:
        """The value of `weights`."""
        return self.weights


def n_words(text: str) -> int:
    """The number of words."""
    return len(text.split())


def says(
    thinking: str = "Let me see.",
    answer: str = "It is so.",
    *,
    reason: FinishReason = FinishReason.STOP,
    closed: CloseReason | None = CloseReason.MODEL,
    generated: Sequence[int] = (),
) -> Script:
    """A turn with this thinking and answer. From an opening it continues to the same whole text."""

    def script(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        yield from planned(backend, question)
        if thinking:
            yield Thinking(thinking)
        if closed is not None:
            yield ThinkingClosed(closed, n_words(thinking), 72.0)
        if answer:
            yield Answer(answer)
        prompt_tokens = 0
        if isinstance(backend, PlanningBackend):
            prompt_tokens = backend.dry_run(question).prompt_tokens
            start = len(question.opening.generated) if question.opening is not None else 0
            tokens = generated or tuple(range(100, 100 + n_words(thinking + " " + answer)))
            yield Generated(start, tuple(tokens), n_words(thinking))
        stats = TurnStats(
            prompt_tokens=prompt_tokens,
            thinking_tokens=n_words(thinking),
            answer_tokens=n_words(answer),
        )
        yield Finished(reason, stats, thinking, answer)

    return script


def planned(backend: QueuedBackend, question: ReplyRequest, cached: int = 2) -> Iterator[Event]:
    """The first events of a turn: its plan, the ids of its prompt, its prefill; none without plans."""
    if not isinstance(backend, PlanningBackend):
        return
    plan = backend.dry_run(question)
    yield plan
    prompt = tuple(range(1, plan.prompt_tokens + 1))
    yield Prompted(question.opening.prompt if question.opening is not None else prompt)
    yield Prefill(plan.prompt_tokens, plan.prompt_tokens, cached)


def fails(error: Exception, *, after: Sequence[Event] | None = None) -> Script:
    """A turn that fails, at once or after its plan and `after`."""

    def script(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        if after is not None:
            yield from planned(backend, question)
            yield from after
        raise error
        yield

    return script


@dataclass
class Talking:
    """A chat and its backends so far."""

    chat: Chat
    backends: list[PlanningBackend]

    @property
    def backend(self) -> PlanningBackend:
        """The newest backend."""
        return self.backends[-1]

    def submit(self, line: str, *scripts: Script) -> list[ChatEvent]:
        """The events of a line that the model answers with these scripts."""
        self.backend.scripts.extend(scripts)
        return list(self.chat.submit(line))

    def lines(self, line: str, *scripts: Script) -> list[str]:
        """The lines that the chat says for a line."""
        return said(self.submit(line, *scripts))


def said(events: Iterable[ChatEvent]) -> list[str]:
    """The lines among some events."""
    return [text for event in events if isinstance(event, Shown) for text in lines_of(event)]


def errors(events: Iterable[ChatEvent]) -> list[str]:
    """The lines of errors."""
    return said(event for event in events if isinstance(event, Said) and event.is_error)


def talking(
    archive: Archive, cwd: Path, make: Callable[[str], PlanningBackend] | None = None, **opened: Any
) -> Talking:
    """A chat over a queued backend and the real miniature's profile."""
    backends: list[PlanningBackend] = []

    def make_backend(model: str, resolved: ResolvedProfile) -> PlanningBackend:
        backend = make(model) if make is not None else PlanningBackend()
        backend.profile = resolved.profile
        backends.append(backend)
        return backend

    return Talking(Chat(replace(chat_setup(archive, cwd, make_backend), **opened)), backends)


def chat_setup(archive: Archive, cwd: Path, make_backend: MakeBackend) -> ChatSetup:
    """The setup of a chat, with the real miniature's profile."""
    folders = profile_folders(Directories(cwd, cwd, cwd))

    def resolve_profile(model: str, profile: str | None, settings: Sequence[str]) -> ResolvedProfile:
        return resolve(model, profile, folders, {}, settings)

    return ChatSetup(archive, make_backend, resolve_profile, "miniature", "chat", cwd=cwd)
