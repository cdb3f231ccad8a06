"""What is in a file that should be a history: its version, or why it is damaged. Looking changes nothing.

Knows the schema, and no conversation.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.history.database import DAMAGED_CODES, error_code, suspicion
from qwq_local.history.lines import squeezed
from qwq_local.history.schema import APPLICATION_ID, Schema

# Reading this much costs no more than the rest of the start; more is read when there is a reason to.
ALWAYS_CHECKED_BYTES = 64 * 2**20
_MAGIC = b"SQLite format 3\0"
_DAMAGED_CODES = DAMAGED_CODES | {sqlite3.SQLITE_TOOBIG}  # a length that no table here has
_MAX_REASON = 200


class Damaged(Exception):
    """The file is no database, or not a sound one; the text says why."""


def inspected(path: Path, schema: Schema) -> int:
    """The version of a sound history, 0 of an empty file; neither it nor its log is changed by looking.

    Raises Damaged, HistoryError, sqlite3.Error.
    """
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    log = path.with_name(path.name + "-wal")
    if start and start != _MAGIC:
        raise Damaged("it is no SQLite database")
    if not start and log.exists() and log.stat().st_size:
        raise Damaged("it is empty, its log is not")  # which SQLite would throw away
    _roll_back_journal(path)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.text_factory = decoded
            return checked_version(connection, path, schema)
    except sqlite3.DatabaseError as error:
        if error_code(error) in _DAMAGED_CODES:
            raise Damaged(str(error)) from error
        raise
    except UnicodeDecodeError as error:  # in a message of SQLite's that quotes what it found
        raise Damaged("its tables cannot be read") from error


def _roll_back_journal(path: Path) -> None:
    """Undo what a process was killed in that was making the history: it had no log of its own yet."""
    if path.with_name(path.name + "-journal").exists():
        with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.DatabaseError):
            connection.execute("PRAGMA user_version")


def checked_version(connection: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """The version of what a connection reads, 0 of nothing. Raises Damaged, HistoryError, sqlite3.Error."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    n_tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    is_ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    if n_tables and not is_ours:
        raise HistoryError(f"{path} is a database of another program. Move it away, or set QWQ_DATA_DIR.")
    if version > schema.version:
        raise HistoryError(
            f"the history {path} is of version {version}, this qwq knows up to {schema.version}. "
            "Install a newer qwq, or set QWQ_DATA_DIR to begin another history."
        )
    mark = suspicion(path)
    if path.stat().st_size <= ALWAYS_CHECKED_BYTES or mark.exists():
        if harm := _harm(connection, schema):
            raise Damaged(squeezed(harm[0], _MAX_REASON))
        with suppress(OSError):  # where nothing may be written it stays
            mark.unlink(missing_ok=True)
    if n_tables and version not in (schema.version, *schema.migrations):
        raise Damaged(f"version {version} never was")
    if version == schema.version and not _has_columns(connection, schema):
        raise Damaged("its tables are not as they should be")
    return version


def _harm(connection: sqlite3.Connection, schema: Schema) -> list[str]:
    """What SQLite finds wrong with the tables; the index of the search can be made again."""
    try:
        found = connection.execute("PRAGMA quick_check(100)").fetchall()
    except sqlite3.OperationalError as error:
        if error_code(error) != sqlite3.SQLITE_ERROR:
            raise
        # The index's definition is not understood; SQLite 3.44 and later try to.
        checks = [f"PRAGMA quick_check({name})" for name in schema.table_names]
        found = [row for check in checks for row in connection.execute(check)]
    lines = [str(row[0]) for row in found]
    return [line for line in lines if line != "ok" and "fts5" not in line.lower()]


def _has_columns(connection: sqlite3.Connection, schema: Schema) -> bool:
    """Whether every table of the schema is there with its columns."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as example:
        for statement in schema.tables:
            example.execute(statement)
        names = schema.table_names
        return all(_columns(example, name) <= _columns(connection, name) for name in names)


def _columns(connection: sqlite3.Connection, table: str) -> set[tuple[str, str]]:
    return set(connection.execute("SELECT name, type FROM pragma_table_info(?)", (table,)))


def decoded(text: bytes) -> str:
    """The text, even if a bit of it was lost: it is still of use."""
    return text.decode("utf-8", "replace")
