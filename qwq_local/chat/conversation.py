"""The conversation of a chat: the path of its turns in the archive, and which of them the model sees.

A turn without an answer is not sent: an empty answer, or half a thought, would teach the model to give such
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwq_local.dialogue.conversation import Message, Role
from qwq_local.history.archive import Archive
from qwq_local.history.labels import title_of
from qwq_local.history.records import ConversationRecord, TurnRecord

_NAME_CHARS = 48


class Conversation:
    """The conversation of a chat; it begins in the archive with its first turn.

    Only the last turn holds its token ids: all of them may be millions. `dropped` are the ids of turns that
    the user left out, `saved` are the files that the conversation was written to.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._next_name = ""
        self._reported: set[int] = set()
        self.id: int | None = None
        self.turns: tuple[TurnRecord, ...] = ()
        self.dropped: frozenset[int] = frozenset()
        self.saved: list[Path] = []

    @property
    def last(self) -> TurnRecord | None:
        """The last turn."""
        return self.turns[-1] if self.turns else None

    @property
    def record(self) -> ConversationRecord | None:
        """Its record in the archive; None before the first turn."""
        return self._archive.conversation(self.id) if self.id is not None else None

    @property
    def name(self) -> str:
        """The name that the user gave it, else its first question."""
        record = self.record
        return short_title(record) if record is not None and (record.name or self.turns) else self._next_name

    @property
    def sent(self) -> tuple[TurnRecord, ...]:
        """The turns that the model sees with the next question."""
        return self.sent_of(self.turns)

    def sent_of(self, turns: Sequence[TurnRecord]) -> tuple[TurnRecord, ...]:
        """Of some turns those that the model sees: they have an answer and were not dropped."""
        return tuple(turn for turn in turns if turn.answer.strip() and turn.id not in self.dropped)

    def open(self, conversation: int) -> None:
        """Continue a conversation of the archive. Raises HistoryError."""
        turns = tuple(self._archive.path(conversation, with_tokens=False))
        self.clear()
        self.id, self.turns = conversation, turns

    def clear(self) -> None:
        """Leave the conversation; the next question begins a new one."""
        self.id, self.turns, self._next_name = None, (), ""
        self.dropped = frozenset()
        self.saved = []

    def begin(self, model: str, profile: str, system: str) -> int:
        """The id of the conversation, begun if there is none; the archive keeps its system prompt."""
        if self.id is None:
            self.id = self._archive.begin(model, profile, system, self._next_name)
        elif self._archive.conversation(self.id).system != system:
            self._archive.set_system(self.id, system)
        return self.id

    def move_to(self, archive: Archive, model: str, profile: str, system: str) -> None:
        """Continue in another archive, with copies of the turns under new ids. Raises HistoryError."""
        if self.id is not None:
            source = ConversationRecord(self.id, "", 0.0, 0.0, model, profile, system, len(self.turns), "")
            self._use_copy(archive, archive.adopt(source, self.turns))
        self._archive = archive

    def copy_if_changed_elsewhere(self) -> int | None:
        """Continue in a copy if another chat has continued this conversation; the old id, else None.

        Without the copy, what one chat says would be missing from the other's path. Raises HistoryError.
        """
        if self.id is None or self._archive.head(self.id) in (None, self.last.id if self.last else None):
            return None
        before, source = self.id, self._archive.conversation(self.id)
        turns = [self._archive.turn(turn.id) for turn in self.turns]
        self._use_copy(self._archive, self._archive.adopt(source, turns))
        return before

    def add(self, turn: TurnRecord) -> None:
        """Add a turn that was answered: it follows its parent and is the last."""
        self.turns = (*(known.without_tokens() for known in self.turns[: turn.number - 1]), turn)

    def _use_copy(self, archive: Archive, copy: int) -> None:
        """Continue with a copy; what was dropped stays dropped."""
        turns = tuple(archive.path(copy))
        pairs = list(zip(self.turns, turns, strict=True))
        self.dropped = frozenset(new.id for old, new in pairs if old.id in self.dropped)
        self._reported |= {new.id for old, new in pairs if old.id in self._reported}
        self.id, self.turns = copy, turns

    def back_to(self, turn: TurnRecord | None) -> None:
        """Go back to an earlier turn, or to before the first. Raises HistoryError."""
        if self.id is not None:
            self._archive.set_head(self.id, turn.id if turn is not None else None)
        self.turns = self.turns[: turn.number if turn is not None else 0]

    def rename(self, name: str) -> None:
        """Name the conversation, also one that has not begun yet. Raises HistoryError."""
        if self.id is None:
            self._next_name = name
        else:
            self._archive.rename(self.id, name)

    def drop(self, count: int) -> tuple[TurnRecord, ...]:
        """Leave the oldest `count` turns out of what is sent; returns them. The archive keeps them."""
        gone = self.sent[:count]
        self.dropped |= {turn.id for turn in gone}
        return gone

    def newly_unsent(self, turns: Sequence[TurnRecord]) -> list[TurnRecord]:
        """The turns that are not sent because they have no answer; each is returned once."""
        unanswered = [turn for turn in turns if not turn.answer.strip() and turn.id not in self._reported]
        self._reported.update(turn.id for turn in unanswered)
        return unanswered


def history_messages(system: str, turns: Sequence[TurnRecord]) -> list[Message]:
    """The system prompt, if any, then the question and the answer of each turn, without the thinking."""
    messages = [Message(Role.SYSTEM, system)] if system else []
    for turn in turns:
        messages += [Message(Role.USER, turn.content), Message(Role.ASSISTANT, turn.answer)]
    return messages


def short_title(record: ConversationRecord) -> str:
    """A conversation's name, or the beginning of its first question."""
    name = title_of(record)
    return name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1].rstrip() + "…"
