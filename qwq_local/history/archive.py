"""The conversations of a user and their turns: kept, listed, found by name, copied, removed, searched.

One archive serves several threads of a process, and several processes may each open the same file.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.events import Event
from qwq_local.history.database import (
    Database,
    HistoryNotWritable,
    open_database,
    open_in_memory,
    open_to_read,
)
from qwq_local.history.labels import clean_name
from qwq_local.history.recorder import TurnRecorder
from qwq_local.history.records import (
    ConversationRecord,
    TurnOrigin,
    TurnRecord,
    TurnStart,
    TurnState,
)
from qwq_local.history.rows import CONVERSATIONS, conversation_of, packed_json, storable
from qwq_local.history.schema import Schema
from qwq_local.history.search import SearchHit, TextKind, find_words
from qwq_local.history.turns import Owner, insert_turn, read_path, read_turn, set_origin, settle_turn
from qwq_local.wire import event_object

FILE = "history.sqlite3"
_MAX_CANDIDATES = 5


class Archive:
    """A history, open. Everything may raise HistoryError, and is safe to call from any thread."""

    def __init__(self, database: Database, owner: Owner, clock: Callable[[], float] = time.time) -> None:
        self.notices: tuple[str, ...] = (database.notice,) if database.notice else ()
        self.is_private = database.path is None
        """Whether it lives in memory and never on a disk."""
        self._database = database
        self._owner = owner
        self._clock = clock
        self._recorders: list[TurnRecorder] = []

    @classmethod
    def open(
        cls, path: Path, schema: Schema | None = None, clock: Callable[[], float] = time.time
    ) -> Archive:
        """The history at `path`, made if it is missing; `notices` says what was done to it.

        Raises HistoryError.
        """
        return cls(open_database(path, schema or Schema()), Owner(path.parent / "running"), clock)

    @classmethod
    def to_read(cls, path: Path) -> Archive:
        """The history at `path`; where it may not be written it can only be read. Raises HistoryError."""
        try:
            return cls.open(path)
        except HistoryNotWritable:
            return cls(open_to_read(path, Schema()), Owner(path.parent / "running"))

    @classmethod
    def private(cls, clock: Callable[[], float] = time.time) -> Archive:
        """An empty history in memory; nothing of it is written to a disk."""
        return cls(open_in_memory(Schema()), Owner(None), clock)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the turns that still run, and close; closing twice is harmless."""
        for recorder in self._recorders:
            recorder.give_up()
        self._recorders.clear()
        self._owner.release()
        self._database.close()

    # Conversations

    def begin(self, model: str, profile: str, system: str, name: str = "", command: str = "chat") -> int:
        """The id of a new conversation, which `qwq chat` or another command begins."""
        now = self._clock()
        with self._database.writing() as connection:
            name = self._free_name(name, 0) if name else ""
            conversation = connection.execute(
                "INSERT INTO conversations (name, created_at, changed_at, model, profile, system, command) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (name, now, now, storable(model), storable(profile), storable(system), command),
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
        """All conversations, or at most `limit`, the last changed first."""
        newest_first = "ORDER BY conversations.changed_at DESC, conversations.id DESC LIMIT ?"
        rows = self._database.rows(f"{CONVERSATIONS} {newest_first}", -1 if limit is None else limit)
        return [conversation_of(row) for row in rows]

    def latest(self) -> ConversationRecord | None:
        """The conversation that was changed last."""
        return next(iter(self.conversations(1)), None)

    def find(self, text: str) -> ConversationRecord:
        """The conversation with that name or id, or the only one whose name begins with the text.

        Case matters only between two names that differ in nothing else. Raises HistoryError.
        """
        wanted = clean_name(text)
        named = [record for record in self.conversations() if record.name]
        for fold in (str, str.casefold):
            same = [record for record in named if fold(record.name) == fold(wanted)]
            if len(same) == 1:
                return same[0]
        if wanted.isascii() and wanted.isdigit() and len(wanted) < 19:
            return self.conversation(int(wanted))
        folded = wanted.casefold()
        beginning = [record for record in named if folded and record.name.casefold().startswith(folded)]
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
        """Give a conversation a name, or none; the name as it is kept, one line of at most 100 cells."""
        with self._changing(conversation):
            kept = self._free_name(name, conversation) if name else ""
            self._database.rows("UPDATE conversations SET name = ? WHERE id = ?", kept, conversation)
        return kept

    def set_system(self, conversation: int, system: str) -> None:
        """Change the system prompt of the next turns."""
        with self._changing(conversation):
            self._database.rows(
                "UPDATE conversations SET system = ? WHERE id = ?", storable(system), conversation
            )

    def remove(self, *conversations: int) -> None:
        """Remove conversations with all their turns, all or none; nothing of them stays in the file."""
        with self._database.writing(is_lasting=True) as connection:
            for conversation in conversations:
                self.conversation(conversation)
                if self._runs_elsewhere(connection, conversation):
                    raise HistoryError(
                        f"conversation {conversation} is being answered by another qwq. Leave that first."
                    )
                connection.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
        self._database.give_back_space()

    def fork(self, conversation: int, n_turns: int) -> int:
        """The id of a new conversation that begins with copies of the first `n_turns` turns."""
        source, path = self.conversation(conversation), self.path(conversation)
        if not 0 <= n_turns <= len(path):
            raise HistoryError(f"conversation {conversation} has {len(path)} turns, not {n_turns}.")
        return self.adopt(source, path[:n_turns])

    def adopt(self, source: ConversationRecord, path: Sequence[TurnRecord]) -> int:
        """The id of a new conversation with copies of these turns, of this archive or another one.

        A chat whose history cannot be written any more continues in a private archive.
        """
        new = self.begin(source.model, source.profile, source.system)
        with self._database.writing(is_lasting=True) as connection:
            parent: int | None = None
            for turn in path:
                state = TurnState.STOPPED if turn.state is TurnState.RUNNING else turn.state
                start = TurnStart(new, parent, turn.question, turn.content, turn.files)
                parent = insert_turn(connection, start, created_at=turn.created_at)
                settle_turn(connection, replace(turn, id=parent, state=state))
            connection.execute(
                "UPDATE conversations SET head = ?, forked_from = ? WHERE id = ?", (parent, source.id, new)
            )
        return new

    # Turns

    def path(self, conversation: int, *, with_tokens: bool = True) -> list[TurnRecord]:
        """The turns from the first to the head; without token ids when they are not wanted."""
        unwritten = self._unwritten()  # asked first: a turn may be written while it is read
        with self._database.reading() as connection:
            turns = read_path(connection, conversation, with_tokens=with_tokens)
        turns = [unwritten[turn.id].record if turn.id in unwritten else turn for turn in turns]
        return turns if with_tokens else [turn.without_tokens() for turn in turns]

    def standing(self, conversation: int) -> frozenset[int]:
        """The ids of the turns from the first to the head, without those undone or regenerated."""
        return frozenset(turn.id for turn in self.path(conversation, with_tokens=False))

    def every_turn(self, conversation: int) -> list[TurnRecord]:
        """All turns of a conversation in the order in which they were begun."""
        rows = self._database.rows("SELECT id FROM turns WHERE conversation = ? ORDER BY id", conversation)
        return [self.turn(row["id"]) for row in rows]

    def turn(self, turn: int) -> TurnRecord:
        """The turn with that id. Raises HistoryError."""
        recorder = self._unwritten().get(turn)
        with self._database.reading() as connection:
            written = read_turn(connection, turn)
        return written if recorder is None else recorder.record

    def set_head(self, conversation: int, turn: int | None) -> None:
        """Move the head of a conversation to one of its turns, or to None, before its first."""
        if turn is not None and self.turn(turn).conversation != conversation:
            raise HistoryError(f"turn {turn} is not one of conversation {conversation}.")
        with self._changing(conversation):
            self._database.rows("UPDATE conversations SET head = ? WHERE id = ?", turn, conversation)

    def head(self, conversation: int) -> int | None:
        """The turn at the head of a conversation; None before its first, or if there is none such."""
        row = self._database.row("SELECT head FROM conversations WHERE id = ?", conversation)
        return row["head"] if row is not None else None

    def begin_turn(self, start: TurnStart) -> TurnRecorder:
        """Write a turn that is about to run; it becomes the head. Raises HistoryError."""
        with self._database.writing(is_lasting=True) as connection:
            self._owner.hold()
            conversation = connection.execute(
                "SELECT model, profile FROM conversations WHERE id = ?", (start.conversation,)
            ).fetchone()
            if conversation is None:
                raise HistoryError(f"there is no conversation {start.conversation}.")
            if start.parent is not None:
                parent = self._row(connection, start.parent)
                if parent["conversation"] != start.conversation:
                    raise HistoryError(
                        f"turn {start.parent} is not one of conversation {start.conversation}."
                    )
            origin = start.origin or TurnOrigin(conversation["model"], profile=conversation["profile"])
            turn = insert_turn(connection, start, created_at=self._clock(), owner=self._owner.token)
            set_origin(connection, turn, origin)
            self._stamp(connection, start.conversation, turn)
        return self._recording(turn)

    def resume_turn(self, turn: int) -> TurnRecorder:
        """Let a turn that was stopped, cut or lost continue; it becomes the head. Raises HistoryError."""
        with self._database.writing(is_lasting=True) as connection:
            self._owner.hold()
            row = self._row(connection, turn)
            if row["state"] == TurnState.RUNNING:
                if self._owner.is_alive(row["owner"]):
                    raise HistoryError(
                        f"turn {turn} is being answered by a qwq right now. Stop it there first."
                    )
                self._lose(connection, turn)
            connection.execute(
                "UPDATE turns SET state = ?, owner = ?, reason = NULL WHERE id = ?",
                (TurnState.RUNNING, self._owner.token, turn),
            )
            if (origin := read_turn(connection, turn).origin) is not None:
                set_origin(connection, turn, replace(origin, is_continued=True))
            self._stamp(connection, row["conversation"], turn)
        return self._recording(turn)

    def pick_up(self) -> None:
        """Put together the turns of dead processes: they are LOST then, and the search finds them."""
        query = "SELECT id, owner FROM turns WHERE state = 'running' AND owner <> ''"
        if all(row["owner"] == self._owner.token for row in self._database.rows(query)):
            return
        with suppress(HistoryNotWritable), self._database.writing(is_lasting=True) as connection:
            running = connection.execute(query).fetchall()
            is_alive = {owner: self._owner.is_alive(owner) for owner in {row["owner"] for row in running}}
            for row in running:
                if not is_alive[row["owner"]]:
                    self._lose(connection, row["id"])

    def lost(self) -> list[TurnRecord]:
        """The turns that were lost with their process, each only once; those of living processes run on."""
        self.pick_up()
        query = "SELECT id FROM turns WHERE state = 'lost' AND owner <> '' ORDER BY id"
        if self._database.row(query) is None:
            return []
        with self._database.writing() as connection:
            turns = [read_turn(connection, row["id"]) for row in connection.execute(query).fetchall()]
            connection.execute("UPDATE turns SET owner = '' WHERE state = 'lost'")
            return turns

    def search(self, words: str, limit: int = 50, kind: TextKind | None = None) -> list[SearchHit]:
        """Where all of the words occur, the newest turns first; in one kind of text or in any."""
        return find_words(self._database, words, limit, kind)

    def _unwritten(self) -> dict[int, TurnRecorder]:
        """The turns that this process has not written whole, which their recorders know better."""
        return {recorder.turn_id: recorder for recorder in self._recorders if not recorder.is_written}

    def _recording(self, turn: int) -> TurnRecorder:
        recorder = TurnRecorder(self.turn(turn), self._append, self._end)
        self._recorders = [each for each in self._recorders if not each.is_written]
        self._recorders.append(recorder)
        return recorder

    def _append(self, turn: int, events: Iterable[Event], thinking_s: float, wait_s: float) -> None:
        """Write events to the journal."""
        lines = "\n".join(packed_json(event_object(event)) for event in events)
        with self._database.writing(wait_s=wait_s) as connection:
            self._row(connection, turn)
            connection.execute(
                "INSERT INTO journal (turn, events, thinking_s) VALUES (?, ?, ?)", (turn, lines, thinking_s)
            )

    def _end(self, turn: TurnRecord, wait_s: float) -> None:
        """Write a turn that has ended."""
        with self._database.writing(wait_s=wait_s, is_lasting=True) as connection:
            self._row(connection, turn.id)
            settle_turn(connection, turn)
            self._stamp(connection, turn.conversation)

    def _row(self, connection: sqlite3.Connection, turn: int) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute(
            "SELECT conversation, state, owner FROM turns WHERE id = ?", (turn,)
        ).fetchone()
        if row is None:
            raise HistoryError(f"there is no turn {turn}; it was removed.")
        return row

    def _lose(self, connection: sqlite3.Connection, turn: int) -> None:
        """Mark a turn LOST with what the journal has of it."""
        settle_turn(connection, replace(read_turn(connection, turn), state=TurnState.LOST))

    def _runs_elsewhere(self, connection: sqlite3.Connection, conversation: int) -> bool:
        """Whether a living process other than this one writes a turn of the conversation."""
        owners = connection.execute(
            "SELECT DISTINCT owner FROM turns WHERE conversation = ? AND state = 'running'", (conversation,)
        )
        return any(row["owner"] != self._owner.token and self._owner.is_alive(row["owner"]) for row in owners)

    def _stamp(self, connection: sqlite3.Connection, conversation: int, head: int | None = None) -> None:
        connection.execute(
            "UPDATE conversations SET changed_at = ?, head = coalesce(?, head) WHERE id = ?",
            (self._clock(), head, conversation),
        )

    @contextmanager
    def _changing(self, conversation: int) -> Iterator[None]:
        """A transaction that changes a conversation, which must exist."""
        with self._database.writing():
            self.conversation(conversation)
            yield

    def _free_name(self, name: str, conversation: int) -> str:
        """The name as it is kept. Raises HistoryError if it is taken or would be read as an id."""
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
