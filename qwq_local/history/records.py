"""What the history holds, as values: conversations, their turns, and what a search finds.

Turns form a tree inside a conversation: a regenerated or undone turn stays. The conversation's head is the
turn that it stands at, and the path from the first turn to the head is what the model is told. Knows no
database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from qwq_local.events import CloseReason, FinishReason, TurnStats


class TurnState(StrEnum):
    """Whether a turn is being written, and how it ended."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"  # interrupted, or cut at a limit: it can go on
    LOST = "lost"  # its process died: it can go on


class Part(StrEnum):
    """The three texts of a turn."""

    QUESTION = "question"
    THINKING = "thinking"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Origin:
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
class ConversationRecord:
    """A conversation as a list shows it; times in seconds since the epoch.

    `n_turns` counts the turns on the path to the head, `first_question` is its first one's, cut to one line.
    `forked_from` is the id of the conversation that this one was copied from.
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


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A turn with all its text and token ids.

    `question` is what the person typed, `content` the whole message that was sent (files, suffix); `number`
    is its place on its path, from 1. `steered` are the person's sentences inside `thinking`. `generated` are
    the ids after the prompt, sampled or forced, `plan` the fields of the first Planned event.
    """

    id: int
    conversation: int
    parent: int | None
    number: int
    question: str
    content: str
    files: tuple[str, ...]
    thinking: str
    answer: str
    steered: tuple[str, ...]
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    state: TurnState
    reason: FinishReason | None
    closed: CloseReason | None
    origin: Origin | None
    plan: Mapping[str, object]
    stats: TurnStats
    thinking_s: float
    created_at: float

    @property
    def can_go_on(self) -> bool:
        """Whether it was stopped, cut or lost before its end."""
        return self.state in (TurnState.STOPPED, TurnState.LOST)


@dataclass(frozen=True, slots=True)
class TurnStart:
    """A turn about to run: after which turn (None for a first one), and what is asked."""

    conversation: int
    parent: int | None
    question: str
    content: str
    files: tuple[str, ...] = ()
    profile: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hit:
    """A part of a turn in which a search found its words; `excerpt` is one line around the first of them.

    `turn` is the turn's id and `number` its place on its path.
    """

    conversation: ConversationRecord
    turn: int
    number: int
    part: Part
    excerpt: str
