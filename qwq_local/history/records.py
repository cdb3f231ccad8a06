"""What the history holds, as values: conversations and their turns.

The turns of a conversation form a tree: a turn that is regenerated or undone stays. The head is the turn at
which the conversation stands. The path from the first turn to the head is what the model sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Planned,
    Prefill,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
    TokenLogprob,
    TurnStats,
)
from qwq_local.wire import plain


class TurnState(StrEnum):
    """Whether a turn is being written, and how it ended."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # interrupted, or cut at a limit: it can be continued
    LOST = "lost"  # its process died: it can be continued


@dataclass(frozen=True, slots=True)
class TurnOrigin:
    """What a turn was computed with.

    `settings` are the sampling settings and budgets by profile key. `cached_tokens` of the prompt came from a
    KV cache. `is_continued` is set once the turn was stopped and continued.
    """

    model: str
    identity: str = ""
    library: str = ""
    profile: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    yarn_factor: float = 1.0
    kv_type: str = ""
    cached_tokens: int = 0
    is_continued: bool = False


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Generated token ids in order.

    `sampled` says for each id whether the model sampled it or the program forced it, `logprobs` how likely it
    was. An item is None where that was not recorded, the whole is None where nothing was.
    """

    ids: tuple[int, ...] = ()
    sampled: tuple[bool | None, ...] | None = None
    logprobs: tuple[TokenLogprob | None, ...] | None = None

    def part(self, start: int, end: int | None = None) -> TokenRun:
        """The run from one position to another."""
        return TokenRun(
            self.ids[start:end],
            None if self.sampled is None else self.sampled[start:end],
            None if self.logprobs is None else self.logprobs[start:end],
        )

    def followed_by(self, other: TokenRun) -> TokenRun:
        """Both runs as one."""
        unknown, other_unknown = (None,) * len(self.ids), (None,) * len(other.ids)
        sampled = (self.sampled or unknown) + (other.sampled or other_unknown)
        logprobs = (self.logprobs or unknown) + (other.logprobs or other_unknown)
        return TokenRun(
            self.ids + other.ids,
            None if self.sampled is other.sampled is None else sampled,
            None if self.logprobs is other.logprobs is None else logprobs,
        )


@dataclass(frozen=True, slots=True)
class ThinkingPart:
    """Thinking; `steered` are the sentences in it that the person put there, in order."""

    text: str
    steered: tuple[str, ...] = ()
    tokens: TokenRun = TokenRun()


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A piece of the answer between other parts, mostly all of it."""

    text: str
    tokens: TokenRun = TokenRun()


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A tool that the model called."""

    name: str
    arguments: Mapping[str, object]
    tokens: TokenRun = TokenRun()


@dataclass(frozen=True, slots=True)
class ToolResultPart:
    """What a tool returned."""

    name: str
    text: str
    tokens: TokenRun = TokenRun()


TurnPart = ThinkingPart | AnswerPart | ToolCallPart | ToolResultPart


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """A conversation as a list shows it; times in seconds since the epoch.

    `n_turns` counts the turns on the path to the head, `first_question` is the first one's, cut to one line.
    `forked_from` is the id of the conversation that this one was copied from. `command` is the one that began
    it, "chat" or "ask".
    """

    id: int
    name: str
    created_at: float
    changed_at: float
    model: str
    profile: str
    system: str
    n_turns: int
    first_question: str
    forked_from: int | None = None
    command: str = "chat"


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A turn with its parts.

    `question` is what the person typed, `content` the whole message that was sent (files, suffix). `number`
    is its place on its path, from 1. `prompt` are the token ids before the first part. `plan` holds the
    fields of the first Planned event.
    """

    id: int
    conversation: int
    parent: int | None
    number: int
    question: str
    content: str
    files: tuple[str, ...]
    parts: tuple[TurnPart, ...]
    prompt: tuple[int, ...]
    state: TurnState
    reason: FinishReason | None
    closed: CloseReason | None
    origin: TurnOrigin | None
    plan: Mapping[str, object]
    stats: TurnStats
    thinking_s: float
    created_at: float

    @property
    def thinking(self) -> str:
        """The text of all thinking."""
        return "".join(part.text for part in self.parts if isinstance(part, ThinkingPart))

    @property
    def steered(self) -> tuple[str, ...]:
        """The person's sentences inside the thinking."""
        thinking = (part for part in self.parts if isinstance(part, ThinkingPart))
        return tuple(sentence for part in thinking for sentence in part.steered)

    @property
    def answer(self) -> str:
        """The text of the whole answer."""
        return "".join(part.text for part in self.parts if isinstance(part, AnswerPart))

    @property
    def generated(self) -> tuple[int, ...]:
        """All token ids after the prompt, sampled or forced."""
        return tuple(token for part in self.parts for token in part.tokens.ids)

    @property
    def can_go_on(self) -> bool:
        """Whether it was stopped, cut or lost before its end."""
        return self.state in (TurnState.STOPPED, TurnState.LOST)

    def without_tokens(self) -> TurnRecord:
        """The same turn without token ids, which may be many."""
        return replace(self, prompt=(), parts=tuple(replace(part, tokens=TokenRun()) for part in self.parts))


@dataclass(frozen=True, slots=True)
class TurnStart:
    """A turn about to run: after which turn (None for a first one), and what is asked.

    `origin` is completed by the plan and the prefill. Without one it is the conversation's model and profile.
    """

    conversation: int
    parent: int | None
    question: str
    content: str
    files: tuple[str, ...] = ()
    origin: TurnOrigin | None = None


TurnEvent = Planned | Prompted | Prefill | Thinking | Steered | Answer | Generated | ThinkingClosed | Finished
"""The events that change a turn's record."""

_CUT = frozenset({FinishReason.INTERRUPTED, FinishReason.MAX_TOKENS, FinishReason.CONTEXT})


class RunningTurn:
    """Takes events and gives the turn as it stands.

    A turn that is continued keeps its plan and its origin; its seconds are added. `thinking_s` is set from
    outside: events do not carry the time.
    """

    def __init__(self, begun: TurnRecord) -> None:
        self._begun = begun
        self._thinking, self._answer, self._steered = [begun.thinking], [begun.answer], list(begun.steered)
        self._tokens, self._n_thinking = TokenRun(), 0
        for part in begun.parts:
            self._tokens = self._tokens.followed_by(part.tokens)
            if isinstance(part, ThinkingPart):
                self._n_thinking = len(self._tokens.ids)
        self._is_counted = False  # before the first ids
        self._record = begun
        self.has_prefilled = False
        self.thinking_s = begun.thinking_s

    @property
    def has_ended(self) -> bool:
        """Whether it finished or was stopped."""
        return self._record.state is not TurnState.RUNNING

    def take(self, event: Event) -> None:
        """The next event."""
        match event:
            case Planned():
                if not self._begun.plan:
                    self._change(plan=plain(event))
                    self._complete_origin(
                        seed=event.seed, yarn_factor=event.yarn_factor, kv_type=event.kv_type
                    )
            case Prefill():
                if not (self.has_prefilled or self._begun.prompt):
                    self._complete_origin(cached_tokens=event.cached)
                self.has_prefilled = True
            case Prompted():
                self._change(prompt=event.tokens)
            case Thinking() | Steered():
                self._thinking.append(event.text)
                if isinstance(event, Steered):
                    self._steered.append(event.text)
            case Answer():
                self._answer.append(event.text)
            case Generated():
                new = TokenRun(event.tokens, event.sampled or None, event.logprobs)
                self._tokens = self._tokens.part(0, event.start).followed_by(new)
                self._n_thinking = event.thinking
                self._is_counted = True
            case ThinkingClosed():
                self.thinking_s = self._begun.thinking_s + event.elapsed_s
                self._change(closed=event.reason)
            case Finished():
                self._thinking, self._answer = [event.thinking], [event.answer]
                self._change(
                    state=TurnState.STOPPED if event.reason in _CUT else TurnState.DONE,
                    reason=event.reason,
                    stats=_added(self._begun.stats, event.stats),
                )

    def stop(self) -> None:
        """End it without Finished."""
        self._change(stats=self._stats, state=TurnState.STOPPED, reason=FinishReason.INTERRUPTED)

    @property
    def record(self) -> TurnRecord:
        """The turn as it stands, with the figures that its events tell so far."""
        thinking = ThinkingPart(
            "".join(self._thinking), tuple(self._steered), self._tokens.part(0, self._n_thinking)
        )
        answer = AnswerPart("".join(self._answer), self._tokens.part(self._n_thinking))
        parts = tuple(part for part in (thinking, answer) if part.text or part.tokens.ids)
        stats = self._record.stats if self.has_ended else self._stats
        return replace(self._record, parts=parts, stats=stats, thinking_s=self.thinking_s)

    @property
    def _stats(self) -> TurnStats:
        stats = self._begun.stats
        stats = replace(stats, prompt_tokens=len(self._record.prompt) or stats.prompt_tokens)
        if not self._is_counted:
            return stats
        n_answer = max(0, len(self._tokens.ids) - self._n_thinking)
        return replace(stats, thinking_tokens=self._n_thinking, answer_tokens=n_answer)

    def _complete_origin(self, **known: Any) -> None:
        if self._record.origin is not None:
            self._change(origin=replace(self._record.origin, **known))

    def _change(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)


def _added(before: TurnStats, now: TurnStats) -> TurnStats:
    """The figures of a continued turn: `now` counts all its tokens, but only the seconds since."""
    if not before.decode_s:  # the process died and its seconds are unknown
        return now
    return replace(
        now,
        prefill_s=before.prefill_s + now.prefill_s,
        decode_s=before.decode_s + now.decode_s,
        cached_tokens=before.cached_tokens,
        resumed_tokens=0,
        resumed_cached=0,
    )
