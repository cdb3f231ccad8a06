"""The seam between front ends and backends: a ReplyRequest goes in, events come out.

A local model and a server elsewhere both fit behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.conversation import Message
from qwq_local.engine.api import AnswerConstraint
from qwq_local.events import Event, Notice, Planned
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """What one reply is asked for: the conversation, what constrains the answer, a seed for it alone.

    `files` are the texts of attached files as they appear in the last message. `dropped_thinking` counts the
    tokens of earlier thinking that the messages leave out. Both are for the ledger. With an `opening` the
    reply continues from there.
    """

    messages: Sequence[Message]
    constraint: AnswerConstraint | None = None
    seed: int | None = None
    files: Sequence[str] = ()
    control: ReplyControl | None = None
    opening: Opening | None = None
    dropped_thinking: int = 0
    wants_tokens: bool = False


@runtime_checkable
class Backend(Protocol):
    """Answers requests, one at a time; called from one thread except for `stop`.

    What only some backends can do are the Protocols below. Front ends ask for them with `isinstance`, and
    leave out what a backend cannot do.
    """

    def reply(self, request: ReplyRequest) -> Iterator[Event]:
        """The events of one reply, Finished last. Raises QwqError; Aborted when stopped while it loads."""

    def stop(self) -> None:
        """Stop the running reply, from any thread; it finishes as interrupted."""

    def close(self) -> None:
        """Free everything; closing twice is harmless."""


@runtime_checkable
class Plans(Protocol):
    """A backend that plans: context, memory and budgets are known before it answers."""

    def dry_run(self, request: ReplyRequest) -> Planned:
        """The plan for a request, without answering it. Raises what `reply` would."""

    def largest_context(self) -> int:
        """The largest context that a plan may have, in tokens."""


@runtime_checkable
class CountsTokens(Protocol):
    """A backend that knows its model's tokens."""

    def count_tokens(self, text: str) -> int:
        """The number of tokens of plain text."""


@runtime_checkable
class Adopts(Protocol):
    """A backend whose profile can be changed between two replies."""

    def adopt(self, profile: Profile) -> None:
        """Use another profile from now on; what it does not touch stays loaded. Raises UsageError."""


@runtime_checkable
class Keeps(Protocol):
    """A backend that keeps what it prefilled for the next process."""

    def keep(self) -> Iterator[Notice]:
        """Keep on disk what the last reply prefilled; called after its answer is out."""


@runtime_checkable
class Identified(Protocol):
    """A backend that knows which weights answer."""

    def identity(self) -> str:
        """A checksum of the weights, or of their header until that is known; "" for unknown."""
