"""The index of the search kept in step with the turns: ended ones go in, removed and resumed ones come out.

Every function belongs inside a transaction. An index that is damaged is emptied and filled again later: it
holds nothing that the turns do not, and no turn may be lost over it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress

from qwq_local.errors import HistoryError
from qwq_local.history.database import DAMAGED_CODES, Database, error_code
from qwq_local.history.records import TurnState

_BATCH = 10  # a second of work, while which another process waits
_PARTS = "question, thinking, answer"


def add_turns(connection: sqlite3.Connection, turns: Sequence[int]) -> None:
    """Put turns into the index that are not in it."""

    def add() -> None:
        for turn in turns:
            connection.execute(
                f"INSERT INTO finds (rowid, {_PARTS}) SELECT id, {_PARTS} FROM turns WHERE id = ?", (turn,)
            )
            connection.execute("UPDATE turns SET is_indexed = 1 WHERE id = ?", (turn,))

    _guarded(connection, add)


def take_out(connection: sqlite3.Connection, turns: Sequence[int]) -> None:
    """Take turns out of the index, before their texts change or go."""

    def remove() -> None:
        for turn in turns:
            connection.execute(
                f"INSERT INTO finds (finds, rowid, {_PARTS}) SELECT 'delete', id, {_PARTS} FROM turns "
                "WHERE id = ? AND is_indexed",
                (turn,),
            )
            connection.execute("UPDATE turns SET is_indexed = 0 WHERE id = ?", (turn,))

    _guarded(connection, remove)


def empty_index(connection: sqlite3.Connection) -> None:
    """Begin the index anew, with nothing in it."""
    connection.execute("INSERT INTO finds (finds) VALUES ('delete-all')")
    connection.execute("UPDATE turns SET is_indexed = 0 WHERE is_indexed")


def forget_removed(connection: sqlite3.Connection) -> None:
    """Write the index anew without what was taken out, which it otherwise keeps until it merges by itself."""
    _guarded(connection, lambda: connection.execute("INSERT INTO finds (finds) VALUES ('optimize')"))


def catch_up(database: Database) -> None:
    """Put every ended turn into the index that is not in it, as far as the history can be written now."""
    if database.has_index:
        with suppress(HistoryError):
            _catch_up(database)


def _catch_up(database: Database) -> None:
    query = "SELECT id FROM turns WHERE is_indexed = 0 AND state <> ? ORDER BY id LIMIT ?"
    while database.row(query, TurnState.RUNNING, _BATCH) is not None:
        with database.writing() as connection:
            turns = [row["id"] for row in connection.execute(query, (TurnState.RUNNING, _BATCH))]
            add_turns(connection, turns)
            if not connection.execute("SELECT 1 FROM turns WHERE is_indexed LIMIT 1").fetchone():
                return  # the index does not take them


def rebuild_later(database: Database) -> None:
    """Empty an index that cannot be read; the next start fills it again."""
    with suppress(HistoryError), database.writing() as connection:
        empty_index(connection)


def _guarded(connection: sqlite3.Connection, change: Callable[[], object]) -> None:
    connection.execute("SAVEPOINT indexing")
    try:
        change()
    except sqlite3.DatabaseError as error:
        if error_code(error) not in DAMAGED_CODES:
            raise
        connection.execute("ROLLBACK TO indexing")
        empty_index(connection)
    connection.execute("RELEASE indexing")
