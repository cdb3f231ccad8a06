"""What one turn is asked, and who answers: a Question goes in, events come out.

The seam between front ends and backends. A local model and a server elsewhere both fit behind it. Knows no
template, no tokens and no llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwq_local.dialogue.control import Opening, TurnControl
from qwq_local.dialogue.conversation import Message
from qwq_local.events import Event, Notice, Planned
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class Question:
    """What one turn is asked: the conversation, the schema of the answer, and a seed for it alone.

    `files` are the texts of attached files as they stand in the last message, for the ledger; `spared` counts
    the tokens of earlier thinking that the messages no longer hold. With an `opening` the turn goes on from
    there.
    """

    messages: Sequence[Message]
    schema: Mapping[str, object] | None = None
    seed: int | None = None
    files: Sequence[str] = ()
    control: TurnControl | None = None
    opening: Opening | None = None
    spared: int = 0
    wants_tokens: bool = False


class Backend(Protocol):
    """Answers questions, one at a time; called from one thread but for `stop`."""

    def reply(self, question: Question) -> Iterator[Event]:
        """The events of one turn, Finished last. Raises QwqError; Aborted when stopped while it loads."""

    def stop(self) -> None:
        """Ask the running turn to end, from any thread; it finishes as interrupted."""

    def keep(self) -> Iterator[Notice]:
        """Keep on disk what the last turn prefilled, once its answer is out."""

    def dry_run(self, question: Question) -> Planned:
        """The plan for a question, without answering it. Raises what `reply` would."""

    def count_tokens(self, text: str) -> int:
        """The tokens of plain text."""

    def adopt(self, profile: Profile) -> None:
        """Go on under another profile; what it does not touch stays loaded."""

    def identity(self) -> str:
        """Which weights answer: a checksum, or what stands in for it until that is known."""

    def close(self) -> None:
        """Free everything; closing twice is harmless."""
