"""The rows of turns: inserted, read with their parts and their journal, and completed; and who writes them.

A second of a running turn is one short row, appended to the journal. Its own row is written when it begins
and ends.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from contextlib import ExitStack, suppress
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.files import LockHeld, lock_file
from qwq_local.history.records import RunningTurn, TurnOrigin, TurnRecord, TurnStart, TurnState
from qwq_local.history.rows import packed_json, packed_tokens, part_values, storable, turn_of
from qwq_local.history.schema import INSERT_PART
from qwq_local.paths import make_private
from qwq_local.wire import event_of

_PATH = """WITH RECURSIVE path (turn) AS (
        SELECT head FROM conversations WHERE conversations.id = ?
        UNION ALL SELECT parent FROM turns JOIN path ON turns.id = path.turn WHERE parent IS NOT NULL)
    SELECT {} FROM turns WHERE id IN (SELECT turn FROM path) ORDER BY number"""
_COLUMNS = """id, conversation, parent, number, question, content, files, {} AS prompt, state, reason, closed,
    origin, plan, stats, thinking_s, created_at"""

_OWNER = re.compile(r"[0-9a-f]{32}")


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
                if _OWNER.fullmatch(left.stem) and not self.is_alive(left.stem):
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
        if self._folder is None or not _OWNER.fullmatch(token):
            return False
        if not (path := self._folder / f"{token}.lock").exists():
            return False
        try:
            with lock_file(path, mode=0o600):
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


def insert_turn(
    connection: sqlite3.Connection, start: TurnStart, *, created_at: float, owner: str = ""
) -> int:
    """Insert the row of a running turn, and derive its place from its parent; its id."""
    turn = connection.execute(
        "INSERT INTO turns "
        "(conversation, parent, number, question, content, files, state, owner, created_at) "
        "VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?)",
        (
            start.conversation,
            start.parent,
            storable(start.question),
            storable(start.content),
            packed_json(start.files),
            TurnState.RUNNING,
            owner,
            created_at,
        ),
    ).lastrowid
    assert turn is not None
    place = "SELECT root, number + 1 FROM turns WHERE id = ? UNION ALL SELECT ?, 1"
    connection.execute(
        f"UPDATE turns SET (root, number) = ({place} LIMIT 1) WHERE id = ?", (start.parent, turn, turn)
    )
    return turn


def read_turn(connection: sqlite3.Connection, turn: int) -> TurnRecord:
    """A turn as it stands in the database. Raises HistoryError."""
    row = connection.execute(
        f"SELECT {_COLUMNS.format('prompt')} FROM turns WHERE id = ?", (turn,)
    ).fetchone()
    if row is None:
        raise HistoryError(f"there is no turn {turn}; it was removed.")
    return _assembled(connection, row, with_tokens=True)


def read_path(connection: sqlite3.Connection, conversation: int, *, with_tokens: bool) -> list[TurnRecord]:
    """The turns from the first to the head; without token ids, which may be many, if they are not wanted."""
    columns = _COLUMNS.format("prompt" if with_tokens else "x''")
    rows = connection.execute(_PATH.format(columns), (conversation,)).fetchall()
    return [_assembled(connection, row, with_tokens=with_tokens) for row in rows]


def _assembled(connection: sqlite3.Connection, row: sqlite3.Row, *, with_tokens: bool) -> TurnRecord:
    """The turn of a row with its parts, and with the events of the journal if it runs."""
    tokens = (
        "tokens, sampled, logprobs" if with_tokens else "x'' AS tokens, NULL AS sampled, NULL AS logprobs"
    )
    query = f"SELECT kind, text, details, {tokens} FROM parts WHERE turn = ? ORDER BY position"
    turn = turn_of(row, connection.execute(query, (row["id"],)))
    if turn.state is not TurnState.RUNNING:
        return turn
    running = RunningTurn(turn)
    for entry in connection.execute("SELECT * FROM journal WHERE turn = ? ORDER BY id", (turn.id,)):
        for line in entry["events"].split("\n"):
            with suppress(ValueError, RecursionError):  # a damaged line is left out
                running.take(event_of(json.loads(line)))
        running.thinking_s = entry["thinking_s"]
    return running.record


def settle_turn(connection: sqlite3.Connection, turn: TurnRecord) -> None:
    """Write a turn that has ended into its row and its parts; its journal goes. In a transaction."""
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


def set_origin(connection: sqlite3.Connection, turn: int, origin: TurnOrigin) -> None:
    """Write what a turn is computed with; its conversation takes over model and profile."""
    connection.execute("UPDATE turns SET origin = ? WHERE id = ?", (packed_json(origin), turn))
    connection.execute(
        "UPDATE conversations SET model = ?, profile = ? "
        "WHERE id = (SELECT conversation FROM turns WHERE id = ?)",
        (storable(origin.model), storable(origin.profile), turn),
    )
