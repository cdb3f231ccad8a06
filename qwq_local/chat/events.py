"""The seam between a chat and a front end: what a Talk takes, and what it yields beside the events of turns.

The values say what to show, not how.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from qwq_local.events import Event, Ledger, Planned

COMMAND = re.compile(r"/([A-Za-z][A-Za-z-]*)(?:\s+(.*))?\s*", re.DOTALL)
"""A whole line that is a command: its name, and what follows it. A path such as /etc/hosts is none."""


class ThinkView(StrEnum):
    """How thinking is shown while it streams, in the order in which its key goes through them."""

    OFF = "off"
    EXCERPT = "excerpt"
    TAIL = "tail"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Asking:
    """A turn begins: the question as the user wrote it; `thought` numbers its thinking, from 1.

    A `continued` turn follows the thought and the answer of that number, as far as they exist: `steered` are
    the user's sentences in that thought, `thinking_s` the seconds it took so far. `can_continue` says whether
    the turn can be continued after it is stopped.
    """

    question: str
    thought: int
    continued: bool = False
    thinking: str = ""
    answer: str = ""
    steered: tuple[str, ...] = ()
    thinking_s: float = 0.0
    can_continue: bool = True


@dataclass(frozen=True, slots=True)
class Said:
    """Lines for the user. `is_error` when what the user entered could not be done."""

    lines: tuple[str, ...]
    is_error: bool = False


def say(*lines: str) -> Said:
    """Lines for the user."""
    return Said(lines)


@dataclass(frozen=True, slots=True)
class TextTable:
    """Rows of cells, to be shown in columns; `right` are the numbers of the columns aligned to the right."""

    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandHelp:
    """How a command is written, and lines about it."""

    usage: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyHelp:
    """The keys of the terminal."""


@dataclass(frozen=True, slots=True)
class ContextUse:
    """Who has the context: `prompt_tokens` of `n_ctx`, divided as the ledger says."""

    ledger: Ledger
    prompt_tokens: int
    n_ctx: int


@dataclass(frozen=True, slots=True)
class NextPlan:
    """What is planned for the next question."""

    planned: Planned


Shown = Said | TextTable | CommandHelp | KeyHelp | ContextUse | NextPlan
"""What a front end lays out as lines."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """An earlier turn to show again, after a conversation is resumed or a turn is undone."""

    question: str
    thought: int
    thinking_tokens: int
    elapsed_s: float
    answer: str


@dataclass(frozen=True, slots=True)
class Page:
    """A text to read in a pager; `steered` are the user's own sentences in it."""

    title: str
    text: str
    steered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """A text for the clipboard, and what it is called."""

    text: str
    what: str


@dataclass(frozen=True, slots=True)
class Edit:
    """A text to change in the user's editor and then to submit."""

    text: str


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """How thinking is shown from now on."""

    view: ThinkView


@dataclass(frozen=True, slots=True)
class ChatStatus:
    """What the status line shows between turns: model, context, files for the next message."""

    model: str
    n_ctx: int
    used_tokens: int
    yarn_factor: float
    conversation: str = ""
    attached: int = 0


@dataclass(frozen=True, slots=True)
class Leave:
    """The user wants to leave."""


ChatEvent = Event | Shown | Asking | Recalled | Page | Copy | Edit | ViewChanged | ChatStatus | Leave


@dataclass(frozen=True, slots=True)
class Completion:
    """A text to put in place of the last `replaces` characters before the cursor, and its meaning."""

    text: str
    replaces: int
    meaning: str = ""


class Talk(Protocol):
    """A chat as a front end sees it. What `submit` returns runs in one thread; any may call the methods."""

    def start(self) -> Iterator[ChatEvent]:
        """What to show before the first line: a resumed conversation, notices, an offer to continue."""

    def submit(self, line: str) -> Iterator[ChatEvent]:
        """Run a line: ask the model, or run a /command. Errors come out as Said. `stop` is now for it."""

    def stop(self) -> None:
        """End the running turn, or the one that the line is about to begin; what came stays."""

    def answer_now(self) -> None:
        """End the thinking and answer."""

    def steer(self, text: str) -> None:
        """Put a sentence into the thinking and continue."""

    def pause(self) -> None:
        """Let the running turn wait."""

    def go_on(self) -> None:
        """End the pause."""

    def complete(self, before_cursor: str) -> Sequence[Completion]:
        """What may be put at the cursor, the likeliest first; quick."""

    def close(self) -> None:
        """Write what is left and free the model."""
