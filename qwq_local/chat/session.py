"""The state of a chat, in one place for all its commands: who answers, what was said, what waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwq_local.chat.answering import Answering
from qwq_local.chat.conversation import Conversation
from qwq_local.chat.events import Changed
from qwq_local.chat.running import Running
from qwq_local.chat.setup import ChatSetup
from qwq_local.dialogue.conversation import Attachment, Framing, fence
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnRecord


@dataclass(frozen=True, slots=True)
class Attached:
    """A file that waits for the next question, with its tokens as it will stand there."""

    attachment: Attachment
    tokens: int


@dataclass(slots=True)
class Session:
    """All that lasts from one line to the next.

    `replacing` is the turn whose question is being edited, `notices` are what is to be said after the turn,
    `offered` is the conversation with a lost turn that /continue takes up before anything is asked.
    """

    setup: ChatSetup
    answering: Answering
    conversation: Conversation
    archive: Archive
    running: Running = field(default_factory=Running)
    attached: dict[str, Attached] = field(default_factory=dict)
    replacing: TurnRecord | None = None
    offered: int | None = None
    notices: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, setup: ChatSetup) -> Session:
        """A session that nothing was said in. Raises what finding the model raises."""
        return cls(setup, Answering(setup), Conversation(setup.archive), setup.archive)

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The files that wait for the next question."""
        return tuple(waiting.attachment for waiting in self.attached.values())

    def content(self, question: str, attachments: Sequence[Attachment] = ()) -> str:
        """The whole user message: files, question, the profile's suffix. Raises UsageError for nothing."""
        framing = Framing("", tuple(attachments), self.answering.profile.question_suffix)
        return framing.messages(question)[-1].content

    def go_on_in_memory(self) -> None:
        """Keep what is said from here on in memory alone: the archive cannot be written."""
        chosen = self.answering.chosen
        memory = Archive.private()
        self.conversation.move_to(memory, chosen.model, chosen.profile or "", self.answering.profile.system)
        self.archive = memory

    def close(self) -> None:
        """Free the model; the archive of the setup is its opener's."""
        self.answering.close()
        if self.archive is not self.setup.archive:
            self.archive.close()

    def changed(self) -> Changed:
        """What the status line shows now; of the context what the next question finds taken."""
        answering, last = self.answering, self.conversation.last
        planned = answering.planned
        used = last.stats.prompt_tokens + last.stats.answer_tokens if last is not None else 0
        return Changed(
            model=planned.model if planned is not None else answering.chosen.model,
            n_ctx=answering.window,
            used_tokens=used,
            yarn_factor=planned.yarn_factor if planned is not None else 1.0,
            conversation="not kept" if self.archive.is_private else self.conversation.name,
            attached=len(self.attached),
        )


def fences(attachments: Sequence[Attachment]) -> tuple[str, ...]:
    """The files as they stand in a message."""
    return tuple(map(fence, attachments))


def thoughts(turns: Sequence[TurnRecord]) -> str:
    """Which turns, by the numbers of their thoughts: `thought 3`, `thoughts 1-4`, `thoughts 1, 3`."""
    numbers = [turn.number for turn in turns]
    if len(numbers) == 1:
        return f"thought {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"thoughts {numbers[0]}-{numbers[-1]}"
    return f"thoughts {', '.join(map(str, numbers))}"
