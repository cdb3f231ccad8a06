"""The conversations of a user: kept, listed, found by name, copied, removed, searched; and their turns.

What comes in is text of any kind; what goes out are records. One archive serves several threads of a process,
and several processes may each have one over the same file. Knows no terminal and no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.history.database import Database, HistoryNotWritable
from qwq_local.history.index import catch_up, forget_removed, take_out
from qwq_local.history.lines import clean_name
from qwq_local.history.opening import open_database, open_in_memory
from qwq_local.history.owners import Owner
from qwq_local.history.packing import storable
from qwq_local.history.read_only import open_to_read
from qwq_local.history.recorder import TurnRecorder
from qwq_local.history.records import ConversationRecord, Hit, Part, TurnRecord, TurnStart, TurnState
from qwq_local.history.rows import CONVERSATIONS, conversation_of
from qwq_local.history.schema import Schema
from qwq_local.history.search import find_words
from qwq_local.history.turns import Turns

FILE = "history.sqlite3"
_OWNERS = "running"
_MAX_CANDIDATES = 5
_NEWEST_FIRST = " ORDER BY conversations.changed_at DESC, conversations.id DESC"


class Archive:
    """A history, open. Everything may raise HistoryError, and is safe to call from any thread."""

    def __init__(self, database: Database, owner: Owner, clock: Callable[[], float] = time.time) -> None:
        self.notices: tuple[str, ...] = ()
        self.is_private = False
        """Whether nothing of it is ever on a disk."""
        self._database = database
        self._owner = owner
        self._clock = clock
        self._turns = Turns(database, owner, clock)
        self._recorders: list[TurnRecorder] = []
        catch_up(database)

    @classmethod
    def open(
        cls, path: Path, schema: Schema | None = None, clock: Callable[[], float] = time.time
    ) -> Archive:
        """The history at `path`, made if it is missing; `notices` tells what was done to it. HistoryError."""
        database, notices = open_database(path, schema or Schema())
        archive = cls(database, Owner(path.parent / _OWNERS), clock)
        archive.notices = tuple(notices)
        return archive

    @classmethod
    def to_read(cls, path: Path) -> Archive:
        """The history at `path`; where it may not be written, as it is, to be read alone. HistoryError."""
        try:
            return cls.open(path)
        except HistoryNotWritable:
            return cls(open_to_read(path, Schema()), Owner(path.parent / _OWNERS))

    @classmethod
    def private(cls, clock: Callable[[], float] = time.time) -> Archive:
        """An empty history in memory: nothing of it is ever written to a disk."""
        archive = cls(open_in_memory(Schema()), Owner(None), clock)
        archive.is_private = True
        return archive

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the turns that were not ended, and close; closing twice is harmless."""
        for recorder in self._recorders:
            recorder.give_up()
        self._recorders.clear()
        self._owner.release()
        self._database.close()

    # Conversations

    def begin(self, model: str, profile: str, system: str, name: str = "") -> int:
        """The id of a new conversation."""
        now = self._clock()
        with self._database.writing() as connection:
            name = self._free_name(name, 0) if name else ""
            conversation = connection.execute(
                "INSERT INTO conversations (name, created_at, changed_at, model, profile, system) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (name, now, now, storable(model), storable(profile), storable(system)),
            ).lastrowid
        assert conversation is not None
        return conversation

    def conversation(self, conversation: int) -> ConversationRecord:
        """The conversation with that id."""
        row = self._database.row(f"{CONVERSATIONS} WHERE conversations.id = ?", conversation)
        if row is None:
            raise HistoryError(f"there is no conversation {conversation}; `qwq history` lists them.")
        return conversation_of(row)

    def conversations(self, limit: int | None = None) -> list[ConversationRecord]:
        """All conversations, or so many, the last changed first."""
        rows = self._database.rows(f"{CONVERSATIONS}{_NEWEST_FIRST} LIMIT ?", -1 if limit is None else limit)
        return [conversation_of(row) for row in rows]

    def latest(self) -> ConversationRecord | None:
        """The conversation that was changed last."""
        return next(iter(self.conversations(1)), None)

    def find(self, text: str) -> ConversationRecord:
        """The conversation with that name or id, or the one whose name begins so.

        Upper and lower case are told apart only where two names differ in nothing else.
        """
        wanted = clean_name(text)
        named = [record for record in self.conversations() if record.name]
        folded = wanted.casefold()
        for matching in (
            [record for record in named if record.name == wanted],
            [record for record in named if record.name.casefold() == folded],
        ):
            if len(matching) == 1:
                return matching[0]
        if wanted.isascii() and wanted.isdigit() and len(wanted) < 19:
            return self.conversation(int(wanted))
        beginning = [record for record in named if wanted and record.name.casefold().startswith(folded)]
        if len(beginning) == 1:
            return beginning[0]
        if not beginning:
            raise HistoryError(f"there is no conversation {wanted!r}; `qwq history` lists them.")
        candidates = ", ".join(f"{record.name} ({record.id})" for record in beginning[:_MAX_CANDIDATES])
        more = len(beginning) - _MAX_CANDIDATES
        raise HistoryError(
            f"{wanted!r} begins {len(beginning)} names: {candidates}"
            f"{f' and {more} more' if more > 0 else ''}. Write more of it, or its number."
        )

    def rename(self, conversation: int, name: str) -> str:
        """Give a conversation a name, or none; the name as it is kept: one line of 100 cells at most."""
        with self._changing(conversation):
            kept = self._free_name(name, conversation) if name else ""
            self._database.rows("UPDATE conversations SET name = ? WHERE id = ?", kept, conversation)
        return kept

    def set_system(self, conversation: int, system: str) -> None:
        """Keep another system prompt for the turns to come."""
        with self._changing(conversation):
            self._database.rows(
                "UPDATE conversations SET system = ? WHERE id = ?", storable(system), conversation
            )

    def remove(self, *conversations: int) -> None:
        """Remove conversations with all their turns: nothing of them stays in the file. All or none."""
        with self._database.writing(is_lasting=True) as connection:
            for conversation in conversations:
                self.conversation(conversation)
                if self._turns.running_elsewhere(connection, conversation):
                    raise HistoryError(
                        f"conversation {conversation} is being answered by another qwq. Leave that first."
                    )
                if self._database.has_index:
                    query = "SELECT id FROM turns WHERE conversation = ?"
                    take_out(connection, [row["id"] for row in connection.execute(query, (conversation,))])
                connection.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
            if self._database.has_index:
                forget_removed(connection)
        self._database.give_back_space()

    def fork(self, conversation: int, n_turns: int) -> int:
        """The id of a new conversation that begins with copies of the first `n_turns` turns."""
        source, path = self.conversation(conversation), self.path(conversation)
        if not 0 <= n_turns <= len(path):
            raise HistoryError(f"conversation {conversation} has {len(path)} turns, not {n_turns}.")
        return self.adopt(source, path[:n_turns])

    def adopt(self, source: ConversationRecord, path: Sequence[TurnRecord]) -> int:
        """The id of a new conversation with copies of these turns, of this archive or another one.

        With a private archive, a chat goes on whose history cannot be written any more.
        """
        new = self.begin(source.model, source.profile, source.system)
        with self._database.writing(is_lasting=True) as connection:
            parent: int | None = None
            for number, turn in enumerate(path, 1):
                state = TurnState.STOPPED if turn.state is TurnState.RUNNING else turn.state
                copy = replace(turn, conversation=new, parent=parent, number=number, state=state)
                parent = self._turns.insert(connection, copy)
            connection.execute(
                "UPDATE conversations SET head = ?, forked_from = ? WHERE id = ?", (parent, source.id, new)
            )
        return new

    # Turns

    def path(self, conversation: int, *, with_tokens: bool = True) -> list[TurnRecord]:
        """The turns from the first to the head; without token ids when they are not wanted."""
        with self._settled() as recorders:
            turns = self._turns.path(conversation, with_tokens=with_tokens)
            return [_completed(turn, recorders) for turn in turns]

    def standing(self, conversation: int) -> frozenset[int]:
        """The ids of the turns from the first to the head: of all but those undone or answered anew."""
        return frozenset(turn.id for turn in self._turns.path(conversation, with_tokens=False))

    def every_turn(self, conversation: int) -> list[TurnRecord]:
        """All turns that were ever begun in a conversation, in the order in which they were."""
        rows = self._database.rows("SELECT id FROM turns WHERE conversation = ? ORDER BY id", conversation)
        return [self.turn(row["id"]) for row in rows]

    def turn(self, turn: int) -> TurnRecord:
        """The turn with that id."""
        with self._settled() as recorders:
            return _completed(self._turns.get(turn), recorders)

    def set_head(self, conversation: int, turn: int | None) -> None:
        """Let a conversation stand at one of its turns, or before its first."""
        if turn is not None and self._turns.get(turn).conversation != conversation:
            raise HistoryError(f"turn {turn} is not one of conversation {conversation}.")
        with self._changing(conversation):
            self._database.rows("UPDATE conversations SET head = ? WHERE id = ?", turn, conversation)

    def head(self, conversation: int) -> int | None:
        """The turn that a conversation stands at; None before its first, or when there is none such."""
        row = self._database.row("SELECT head FROM conversations WHERE id = ?", conversation)
        return row["head"] if row is not None else None

    def begin_turn(self, start: TurnStart) -> TurnRecorder:
        """Write a turn that is about to run; it becomes the head."""
        return self._recording(self._turns.get(self._turns.begin(start)))

    def resume_turn(self, turn: int) -> TurnRecorder:
        """Let a turn that was stopped, cut or lost run on; it becomes the head."""
        return self._recording(self._turns.take_up(turn))

    def pick_up(self) -> None:
        """Put together what dead processes left of their turns: they are LOST then, and can be found."""
        if not self._database.is_read_only:
            self._turns.pick_up()

    def lost(self) -> list[TurnRecord]:
        """The turns that were lost with their process, each told once; a living process's are left alone."""
        self._turns.pick_up()
        return [self._turns.get(turn) for turn in self._turns.tell_lost()]

    def search(self, words: str, limit: int = 50, part: Part | None = None) -> list[Hit]:
        """Where all of the words occur, the newest turns first; in one part of the turns or in any."""
        return find_words(self._database, words, limit, part)

    @contextmanager
    def _settled(self) -> Iterator[dict[int, TurnRecorder]]:
        """The turns that this process writes, while nothing of them moves into the database."""
        with ExitStack() as stack:
            recorders = list(self._recorders)
            for recorder in recorders:
                stack.enter_context(recorder.held())
            yield {recorder.turn_id: recorder for recorder in recorders if not recorder.is_written}

    def _recording(self, turn: TurnRecord) -> TurnRecorder:
        recorder = TurnRecorder(self._turns, turn)
        self._recorders = [each for each in self._recorders if not each.is_written]
        self._recorders.append(recorder)
        return recorder

    @contextmanager
    def _changing(self, conversation: int) -> Iterator[None]:
        """A transaction that changes a conversation, which must exist."""
        with self._database.writing():
            self.conversation(conversation)
            yield

    def _free_name(self, name: str, conversation: int) -> str:
        """The name as it can be kept. Raises HistoryError when it is taken or would be read as an id."""
        kept = clean_name(name)
        if not kept:
            raise HistoryError("a name needs a letter that can be seen.")
        if kept.isascii() and kept.isdigit():
            raise HistoryError(f"{kept} would be taken for a conversation's number: add a letter.")
        row = self._database.row(
            "SELECT id FROM conversations WHERE name = ? AND id <> ?", kept, conversation
        )
        if row is not None:
            raise HistoryError(f"{kept!r} is the name of conversation {row['id']} already.")
        return kept


def _completed(turn: TurnRecord, recorders: dict[int, TurnRecorder]) -> TurnRecord:
    recorder = recorders.get(turn.id)
    return turn if recorder is None else recorder.completed(turn)
