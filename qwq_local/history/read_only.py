"""A history that may not be written, opened to be read: on a read-only disk, or by another user.

Nothing is made, mended or brought up to date; what would be is refused with what to do. Knows the schema, and
no conversation.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.history.database import Database, error_code, explained
from qwq_local.history.inspecting import Damaged, checked_version, decoded
from qwq_local.history.schema import Schema

_MEND = "Copy its whole folder to where it may be written, and set QWQ_DATA_DIR to the copy."
_CANNOT_LOCK = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY})


def open_to_read(path: Path, schema: Schema) -> Database:
    """The history at `path` as it is; writing to it raises HistoryError. Raises HistoryError."""
    try:
        connection, version = _connected(path, schema)
    except Damaged as damage:
        raise HistoryError(
            f"the history {path} is damaged ({damage}) and may not be written. {_MEND}"
        ) from None
    except sqlite3.Error as error:
        raise explained(error, path) from error
    except OSError as error:
        raise HistoryError(f"the history {path} cannot be read: {error.strerror or error}.") from error
    if version != schema.version:
        connection.close()
        raise HistoryError(
            f"the history {path} is of version {version}, this qwq reads version {schema.version}, and it "
            f"may not be written to bring it up to date. {_MEND}"
        )
    return Database(connection, path, has_index=_has_index(connection), is_read_only=True)


def _connected(path: Path, schema: Schema) -> tuple[sqlite3.Connection, int]:
    """A connection that only reads, and the version of what it reads."""
    try:
        return _checked(path, "mode=ro", schema)
    except sqlite3.OperationalError as error:
        if error_code(error) not in _CANNOT_LOCK:
            raise
        # A log needs a file beside it for its locks. Without a log nobody writes, and none are needed:
        # https://www.sqlite.org/wal.html#readonly
        for end in ("-wal", "-journal"):
            beside = path.with_name(path.name + end)
            if beside.exists() and beside.stat().st_size:
                raise HistoryError(
                    f"the last turns of the history {path} are in {beside.name}, which cannot be read where "
                    f"nothing may be written. {_MEND}"
                ) from error
        return _checked(path, "mode=ro&immutable=1", schema)


def _checked(path: Path, how: str, schema: Schema) -> tuple[sqlite3.Connection, int]:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = decoded
    try:
        return connection, checked_version(connection, path, schema)
    except BaseException:
        connection.close()
        raise


def _has_index(connection: sqlite3.Connection) -> bool:
    """Whether there is an index of the search that this SQLite can read."""
    try:
        connection.execute("SELECT 1 FROM finds WHERE finds MATCH 'any'").fetchone()
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return False
    return True
