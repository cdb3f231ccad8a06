"""Turns in the database: begun, journaled while they run, ended, taken up again, and found after a crash.

A second of a running turn is one short row, appended to the journal. Its own row is written when it begins
and ends.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.events import Event
from qwq_local.files import LockHeld, lock_file
from qwq_local.history.database import Database
from qwq_local.history.records import RunningTurn, TurnOrigin, TurnRecord, TurnStart, TurnState
from qwq_local.history.rows import packed_json, packed_tokens, part_values, storable, turn_of
from qwq_local.history.schema import INSERT_PART
from qwq_local.history.search import add_to_index, take_out_of_index
from qwq_local.paths import make_private
from qwq_local.wire import event_object, event_of

_PATH = """WITH RECURSIVE path (turn) AS (
        SELECT head FROM conversations WHERE conversations.id = ?
        UNION ALL SELECT parent FROM turns JOIN path ON turns.id = path.turn WHERE parent IS NOT NULL)
    SELECT {} FROM turns WHERE id IN (SELECT turn FROM path) ORDER BY number"""
_COLUMNS = """id, conversation, parent, number, question, content, files, {} AS prompt, state, reason, closed,
    origin, plan, stats, thinking_s, created_at"""
_PART_COLUMNS = "kind, text, details, {} AS tokens, {} AS sampled, {} AS logprobs"
# Token ids of a long path are many and seldom needed.
_WITH_TOKENS = _COLUMNS.format("prompt"), _PART_COLUMNS.format("tokens", "sampled", "logprobs")
_WITHOUT_TOKENS = _COLUMNS.format("x''"), _PART_COLUMNS.format("x''", "NULL", "NULL")


_TOKEN = re.compile(r"[0-9a-f]{32}")


class Owner:
    """This process as the writer of turns, and whether the writers of other turns still live.

    A process that writes turns holds a lock on a file of its own, named by a random token that its turns
    carry. The system drops the lock with the process, however it ends. So neither a recycled process id nor a
    reboot makes a dead process look alive, and the process table, which differs between systems and ends at
    the edge of a container, is not needed. Without a folder no other process sees the turns.

    `hold` and `is_alive` belong inside a transaction of the history: so no file is taken for abandoned
    between its making and its locking.
    """

    def __init__(self, folder: Path | None) -> None:
        self.token = os.urandom(16).hex()
        self._folder = folder
        self._lock: ExitStack | None = None

    def hold(self) -> None:
        """Be alive for other processes, until `release` or the end of this process. Raises HistoryError.

        What processes left that are gone is removed the first time.
        """
        if self._folder is None or self._lock is not None:
            return
        make_private(self._folder)
        with suppress(OSError):
            for left in self._folder.glob("*.lock"):
                if _TOKEN.fullmatch(left.stem) and not self.is_alive(left.stem):
                    left.unlink(missing_ok=True)
        path = self._folder / f"{self.token}.lock"
        lock = ExitStack()
        try:
            lock.enter_context(lock_file(path, mode=0o600))
        except (OSError, LockHeld) as error:
            raise HistoryError(f"{path} cannot be locked: {error}. Move it with QWQ_DATA_DIR.") from None
        self._lock = lock

    def is_alive(self, token: str) -> bool:
        """Whether the process with that token lives, as far as anyone can tell from here."""
        if token == self.token:
            return True
        if self._folder is None or not _TOKEN.fullmatch(token):
            return False
        if not (path := self._folder / f"{token}.lock").exists():
            return False
        try:
            with lock_file(path):
                return False
        except (OSError, LockHeld):
            return True

    def release(self) -> None:
        """Be gone for other processes."""
        lock, self._lock = self._lock, None
        if self._folder is not None and lock is not None:
            with suppress(OSError):
                (self._folder / f"{self.token}.lock").unlink(missing_ok=True)
            lock.close()


class Turns:
    """The turns of a history, as this process writes and reads them."""

    def __init__(self, database: Database, owner: Owner, clock: Callable[[], float]) -> None:
        self._database = database
        self._owner = owner
        self._clock = clock

    def begin(self, start: TurnStart) -> TurnRecord:
        """Write a turn that is about to run, and make it the head. Raises HistoryError."""
        with self._database.writing(is_lasting=True) as connection:
            self._owner.hold()
            conversation = connection.execute(
                "SELECT model, profile FROM conversations WHERE id = ?", (start.conversation,)
            ).fetchone()
            if conversation is None:
                raise HistoryError(f"there is no conversation {start.conversation}.")
            number = 1
            if start.parent is not None:
                parent = self._row(connection, start.parent)
                if parent["conversation"] != start.conversation:
                    raise HistoryError(
                        f"turn {start.parent} is not one of conversation {start.conversation}."
                    )
                number += parent["number"]
            origin = start.origin or TurnOrigin(conversation["model"], profile=conversation["profile"])
            turn = _insert(
                connection,
                conversation=start.conversation,
                parent=start.parent,
                number=number,
                question=storable(start.question),
                content=storable(start.content),
                files=packed_json(start.files),
                state=TurnState.RUNNING,
                owner=self._owner.token,
                created_at=self._clock(),
            )
            self._set_origin(connection, turn, origin)
            self._stamp(connection, start.conversation, turn)
            return self._read(connection, turn)

    def take_up(self, turn: int) -> TurnRecord:
        """Let a turn that has ended run again; as it stands. Raises HistoryError when it runs."""
        with self._database.writing(is_lasting=True) as connection:
            self._owner.hold()
            row = self._row(connection, turn)
            if row["state"] == TurnState.RUNNING:
                if self._owner.is_alive(row["owner"]):
                    raise HistoryError(
                        f"turn {turn} is being answered by a qwq right now. Stop it there first."
                    )
                self._lose(connection, turn)
            if self._database.has_index:
                take_out_of_index(connection, [turn])
            connection.execute(
                "UPDATE turns SET state = ?, owner = ?, reason = NULL WHERE id = ?",
                (TurnState.RUNNING, self._owner.token, turn),
            )
            if (origin := self._read(connection, turn).origin) is not None:
                self._set_origin(connection, turn, replace(origin, is_continued=True))
            self._stamp(connection, row["conversation"], turn)
            return self._read(connection, turn)

    def append(self, turn: int, events: Iterable[Event], thinking_s: float, wait_s: float) -> None:
        """Write events to the journal. Raises HistoryBusy after `wait_s` seconds, HistoryError."""
        lines = "\n".join(packed_json(event_object(event)) for event in events)
        with self._database.writing(wait_s=wait_s) as connection:
            self._row(connection, turn)
            connection.execute(
                "INSERT INTO journal (turn, events, thinking_s) VALUES (?, ?, ?)", (turn, lines, thinking_s)
            )

    def end(self, turn: TurnRecord, wait_s: float) -> None:
        """Write a turn that has ended. Raises HistoryBusy, HistoryError."""
        with self._database.writing(wait_s=wait_s, is_lasting=True) as connection:
            self._row(connection, turn.id)
            self._settle(connection, turn)
            self._stamp(connection, turn.conversation)

    def get(self, turn: int) -> TurnRecord:
        """A turn as it stands in the database. Raises HistoryError."""
        with self._database.reading() as connection:
            return self._read(connection, turn)

    def path(self, conversation: int, *, with_tokens: bool = True) -> list[TurnRecord]:
        """The turns from the first to the head."""
        columns, part_columns = _WITH_TOKENS if with_tokens else _WITHOUT_TOKENS
        with self._database.reading() as connection:
            rows = connection.execute(_PATH.format(columns), (conversation,)).fetchall()
            return [self._assembled(connection, row, part_columns) for row in rows]

    def pick_up(self) -> None:
        """Put together the turns of dead processes, and mark them LOST."""
        query = "SELECT id, owner FROM turns WHERE state = 'running' AND owner <> ''"
        if all(row["owner"] == self._owner.token for row in self._database.rows(query)):
            return
        with self._database.writing(is_lasting=True) as connection:
            running = connection.execute(query).fetchall()
            is_alive = {owner: self._owner.is_alive(owner) for owner in {row["owner"] for row in running}}
            for row in running:
                if not is_alive[row["owner"]]:
                    self._lose(connection, row["id"])

    def take_lost(self) -> list[TurnRecord]:
        """The lost turns that were not returned before."""
        query = "SELECT id FROM turns WHERE state = 'lost' AND owner <> '' ORDER BY id"
        if self._database.row(query) is None:
            return []
        with self._database.writing() as connection:
            turns = [self._read(connection, row["id"]) for row in connection.execute(query).fetchall()]
            connection.execute("UPDATE turns SET owner = '' WHERE state = 'lost'")
            return turns

    def running_elsewhere(self, connection: sqlite3.Connection, conversation: int) -> bool:
        """Whether a living process other than this one writes a turn of the conversation."""
        owners = connection.execute(
            "SELECT DISTINCT owner FROM turns WHERE conversation = ? AND state = 'running'", (conversation,)
        )
        return any(row["owner"] != self._owner.token and self._owner.is_alive(row["owner"]) for row in owners)

    def insert(self, connection: sqlite3.Connection, turn: TurnRecord) -> int:
        """Write a whole turn under a new id, with the conversation and the parent that it names."""
        new = _insert(
            connection,
            conversation=turn.conversation,
            parent=turn.parent,
            number=turn.number,
            question=storable(turn.question),
            content=storable(turn.content),
            files=packed_json(turn.files),
            state=turn.state,
            created_at=turn.created_at,
        )
        self._settle(connection, replace(turn, id=new))
        return new

    def _row(self, connection: sqlite3.Connection, turn: int) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute(
            "SELECT conversation, number, state, owner FROM turns WHERE id = ?", (turn,)
        ).fetchone()
        if row is None:
            raise HistoryError(f"there is no turn {turn}; it was removed.")
        return row

    def _read(self, connection: sqlite3.Connection, turn: int) -> TurnRecord:
        columns, part_columns = _WITH_TOKENS
        row = connection.execute(f"SELECT {columns} FROM turns WHERE id = ?", (turn,)).fetchone()
        if row is None:
            raise HistoryError(f"there is no turn {turn}.")
        return self._assembled(connection, row, part_columns)

    def _assembled(self, connection: sqlite3.Connection, row: sqlite3.Row, part_columns: str) -> TurnRecord:
        """The turn of a row with its parts, and with the events of the journal if it runs."""
        query = f"SELECT {part_columns} FROM parts WHERE turn = ? ORDER BY position"
        turn = turn_of(row, connection.execute(query, (row["id"],)))
        if turn.state is not TurnState.RUNNING:
            return turn
        running = RunningTurn(turn)
        for entry in connection.execute("SELECT * FROM journal WHERE turn = ? ORDER BY id", (turn.id,)):
            for event in _events_of(entry["events"]):
                running.take(event)
            running.thinking_s = entry["thinking_s"]
        return running.record

    def _lose(self, connection: sqlite3.Connection, turn: int) -> None:
        """Mark a turn LOST with what the journal has of it."""
        self._settle(connection, replace(self._read(connection, turn), state=TurnState.LOST))

    def _settle(self, connection: sqlite3.Connection, turn: TurnRecord) -> None:
        """Write a turn that has ended into its row and its parts; its journal is not needed any more."""
        connection.execute(
            "UPDATE turns SET prompt = ?, origin = ?, plan = ?, stats = ?, thinking_s = ?, closed = ?, "
            "state = ?, reason = ?, owner = iif(? = 'lost', owner, '') WHERE id = ?",
            (
                packed_tokens(turn.prompt),
                "" if turn.origin is None else packed_json(turn.origin),
                packed_json(turn.plan),
                packed_json(turn.stats),
                turn.thinking_s,
                turn.closed,
                turn.state,
                turn.reason,
                turn.state,  # a lost turn keeps its owner until it was reported
                turn.id,
            ),
        )
        connection.execute("DELETE FROM journal WHERE turn = ?", (turn.id,))
        connection.execute("DELETE FROM parts WHERE turn = ?", (turn.id,))
        rows = [(turn.id, position, *part_values(part)) for position, part in enumerate(turn.parts)]
        connection.executemany(INSERT_PART, rows)
        if self._database.has_index:
            add_to_index(connection, [turn.id])

    def _set_origin(self, connection: sqlite3.Connection, turn: int, origin: TurnOrigin) -> None:
        """Write what a turn is computed with; its conversation takes over model and profile."""
        connection.execute("UPDATE turns SET origin = ? WHERE id = ?", (packed_json(origin), turn))
        connection.execute(
            "UPDATE conversations SET model = ?, profile = ? "
            "WHERE id = (SELECT conversation FROM turns WHERE id = ?)",
            (storable(origin.model), storable(origin.profile), turn),
        )

    def _stamp(self, connection: sqlite3.Connection, conversation: int, head: int | None = None) -> None:
        connection.execute(
            "UPDATE conversations SET changed_at = ?, head = coalesce(?, head) WHERE id = ?",
            (self._clock(), head, conversation),
        )


def _insert(connection: sqlite3.Connection, **values: object) -> int:
    """Insert a row of `turns`, whose root is its parent's or itself; its id."""
    marks = ", ".join("?" * len(values))
    turn = connection.execute(
        f"INSERT INTO turns ({', '.join(values)}) VALUES ({marks})", tuple(values.values())
    ).lastrowid
    assert turn is not None
    root = "coalesce((SELECT root FROM turns AS up WHERE up.id = turns.parent), id)"
    connection.execute(f"UPDATE turns SET root = {root} WHERE id = ?", (turn,))
    return turn


def _events_of(lines: str) -> Iterator[Event]:
    """The events of some lines; those that are damaged are left out."""
    for line in lines.split("\n"):
        with suppress(ValueError, RecursionError):
            yield event_of(json.loads(line))
