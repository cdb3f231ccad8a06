"""The conversation that is held: the path of its turns in the archive, and what of it the model sees.

Turns come in from the archive; messages, names and counts go out. A turn without an answer is not sent: an
empty answer, or half a thought, would teach the model to give such ones. Knows no backend.
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
    """The conversation there is, or none yet: it begins in the archive with its first turn.

    Of its turns but the last, token ids are not held: they may be millions. `dropped` are the ids of turns
    that the person left out, `saved` the files that it was written to.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._wanted_name = ""
        self._told_left_out: set[int] = set()
        self.id: int | None = None
        self.turns: tuple[TurnRecord, ...] = ()
        self.dropped: frozenset[int] = frozenset()
        self.saved: list[Path] = []

    @property
    def last(self) -> TurnRecord | None:
        """The turn that the conversation stands at."""
        return self.turns[-1] if self.turns else None

    @property
    def record(self) -> ConversationRecord | None:
        """What the archive says of it; None before the first turn."""
        return self._archive.conversation(self.id) if self.id is not None else None

    @property
    def name(self) -> str:
        """What it is called: the person's name for it, else its first question."""
        record = self.record
        return called(record) if record is not None and (record.name or self.turns) else self._wanted_name

    @property
    def sent(self) -> tuple[TurnRecord, ...]:
        """The turns that the model sees with the next question."""
        return self.sent_of(self.turns)

    def sent_of(self, turns: Sequence[TurnRecord]) -> tuple[TurnRecord, ...]:
        """Those of some turns that the model sees: they have an answer and were not dropped."""
        return tuple(turn for turn in turns if turn.answer.strip() and turn.id not in self.dropped)

    def open(self, conversation: int) -> None:
        """Go on with a conversation of the archive. Raises HistoryError."""
        turns = tuple(self._archive.path(conversation, with_tokens=False))
        self.clear()
        self.id, self.turns = conversation, turns

    def clear(self) -> None:
        """Hold none; the next question begins one."""
        self.id, self.turns, self._wanted_name = None, (), ""
        self.dropped = frozenset()
        self.saved = []

    def begin(self, model: str, profile: str, system: str) -> int:
        """The id of the conversation, begun if there was none; the archive keeps its system prompt."""
        if self.id is None:
            self.id = self._archive.begin(model, profile, system, self._wanted_name)
        elif self._archive.conversation(self.id).system != system:
            self._archive.set_system(self.id, system)
        return self.id

    def move_to(self, archive: Archive, model: str, profile: str, system: str) -> None:
        """Go on in another archive, with copies of the turns under new ids. Raises HistoryError."""
        if self.id is not None:
            source = ConversationRecord(self.id, "", 0.0, 0.0, model, profile, system, len(self.turns), "")
            self._hold(archive, archive.adopt(source, self.turns))
        self._archive = archive

    def part(self) -> int | None:
        """Go on in a copy when another chat has gone on with the conversation; the one before, else None.

        What was said in either would else be missing from the other's path. Raises HistoryError.
        """
        if self.id is None or self._archive.head(self.id) in (None, self.last.id if self.last else None):
            return None
        before, source = self.id, self._archive.conversation(self.id)
        turns = [self._archive.turn(turn.id) for turn in self.turns]
        self._hold(self._archive, self._archive.adopt(source, turns))
        return before

    def take(self, turn: TurnRecord) -> None:
        """A turn was answered, or answered anew: it follows its parent and is the last."""
        parents = [known.id for known in self.turns]
        upto = parents.index(turn.parent) + 1 if turn.parent in parents else 0
        before = (known.without_tokens() for known in self.turns[:upto])
        self.turns = (*before, turn)

    def _hold(self, archive: Archive, copy: int) -> None:
        """Go on with a copy; what was dropped stays so."""
        turns = tuple(archive.path(copy))
        pairs = list(zip(self.turns, turns, strict=True))
        self.dropped = frozenset(new.id for old, new in pairs if old.id in self.dropped)
        self._told_left_out |= {new.id for old, new in pairs if old.id in self._told_left_out}
        self.id, self.turns = copy, turns

    def back_to(self, turn: TurnRecord | None) -> None:
        """Stand at an earlier turn, or before the first. Raises HistoryError."""
        if self.id is not None:
            self._archive.set_head(self.id, turn.id if turn is not None else None)
        upto = next((i + 1 for i, known in enumerate(self.turns) if turn and known.id == turn.id), 0)
        self.turns = self.turns[:upto]

    def rename(self, name: str) -> None:
        """Call it by a name; one that has not begun will be called so. Raises HistoryError."""
        if self.id is None:
            self._wanted_name = name
        else:
            self._archive.rename(self.id, name)

    def drop(self, count: int) -> tuple[TurnRecord, ...]:
        """Leave the oldest so many turns out of what is sent; those turns. The archive keeps them."""
        gone = self.sent[:count]
        self.dropped |= {turn.id for turn in gone}
        return gone

    def newly_left_out(self, turns: Sequence[TurnRecord]) -> list[TurnRecord]:
        """The turns that are not sent for want of an answer and were not told of before."""
        silent = [turn for turn in turns if not turn.answer.strip() and turn.id not in self._told_left_out]
        self._told_left_out.update(turn.id for turn in silent)
        return silent


def history_messages(system: str, turns: Sequence[TurnRecord]) -> list[Message]:
    """The system prompt, if any, then of each turn what was asked and answered, without the thinking."""
    messages = [Message(Role.SYSTEM, system)] if system else []
    for turn in turns:
        messages += [Message(Role.USER, turn.content), Message(Role.ASSISTANT, turn.answer)]
    return messages


def called(record: ConversationRecord) -> str:
    """What a conversation is called in a line: its name, else the beginning of its first question."""
    name = title_of(record)
    return name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1].rstrip() + "…"
