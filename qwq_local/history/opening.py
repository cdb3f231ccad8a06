"""A path in, an open history out: made when missing, brought up to date after a copy, set aside when damaged.

A history of a newer version is left alone. What cannot be opened for another reason (locked, read-only, a
full disk) is an error and nothing is touched. Knows the schema, and no conversation.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.files import LockHeld, lock_file, sync_folder
from qwq_local.history.database import (
    DAMAGED_CODES,
    WAIT_S,
    Database,
    HistoryNotWritable,
    error_code,
    explained,
    suspicion,
)
from qwq_local.history.inspecting import Damaged, decoded, inspected
from qwq_local.history.schema import APPLICATION_ID, Schema
from qwq_local.paths import make_private

_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_BESIDE = ("", "-wal", "-shm")
_OPENING_WAIT_S = 30.0


def open_in_memory(schema: Schema) -> Database:
    """An empty history that nobody else can see and that ends with the process."""
    connection = _connected(":memory:")
    _create(connection, schema)
    return Database(connection, None, has_index=_prepare_index(connection, schema))


def open_database(path: Path, schema: Schema) -> tuple[Database, list[str]]:
    """The history at `path`, and what a person should know of how it was opened. Raises HistoryError."""
    notices: list[str] = []
    make_private(path.parent)
    with _alone(path):
        try:
            return _opened_or_new(path, schema, notices), notices
        except sqlite3.Error as error:
            raise explained(error, path) from error
        except OSError as error:
            raise HistoryError(
                f"the history {path} cannot be opened ({error.strerror or error}). QWQ_DATA_DIR moves it."
            ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else opens the history meanwhile: of two who find it old or damaged, one mends it."""
    beside = path.with_name(path.name + ".lock")
    with ExitStack() as held:
        try:
            held.enter_context(lock_file(beside, timeout_s=_OPENING_WAIT_S, mode=0o600))
        except LockHeld:
            raise HistoryError(f"the history {path} is being opened by another qwq. Try again.") from None
        except OSError as error:
            raise (HistoryNotWritable if error.errno in _FORBIDDEN else HistoryError)(
                f"the history {path} cannot be locked: {error.strerror or error}. QWQ_DATA_DIR moves it, and "
                "`qwq chat --private` does without."
            ) from None
        yield


def _opened_or_new(path: Path, schema: Schema, notices: list[str]) -> Database:
    try:
        return _opened(path, schema, notices)
    except Damaged as damage:
        kept = _set_aside(path)
        notices.append(f"{path.name} was damaged ({damage}), kept as {kept}; a new history begins.")
        return _opened(path, schema, notices)


def _opened(path: Path, schema: Schema, notices: list[str]) -> Database:
    """The database, sound and of the right version. Raises Damaged, HistoryError, sqlite3.Error."""
    version = 0 if _make_file(path) else inspected(path, schema)
    connection = _connected(str(path))
    try:
        if version not in (0, schema.version):
            _copy(connection, path, version)
            _migrate(connection, schema, version)
            copy = _copy_of(path, version).name
            notices.append(f"the history is of version {schema.version} now; {copy} is as it was before.")
        if version == 0:
            _create(connection, schema)
        connection.execute("PRAGMA journal_mode = WAL")
        return Database(connection, path, has_index=_prepare_index(connection, schema))
    except BaseException:
        connection.close()
        raise


def _make_file(path: Path) -> bool:
    """Make the file for this user alone if it is missing; whether it was."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return False
    return True


def _connected(place: str) -> sqlite3.Connection:
    connection = sqlite3.connect(place, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    connection.text_factory = decoded
    try:
        # What is removed shall be gone from the file too.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection, schema: Schema) -> None:
    # Before the first table, or not at all: so the file shrinks when conversations are removed.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _run(connection, schema.tables, schema.version)


def _migrate(connection: sqlite3.Connection, schema: Schema, version: int) -> None:
    """Every step from `version` on in one transaction: either all of it is done or nothing."""
    steps = [
        statement for old in range(version, schema.version) for statement in schema.migrations.get(old, ())
    ]
    _run(connection, steps, schema.version)


def _run(connection: sqlite3.Connection, statements: list[str] | tuple[str, ...], version: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _prepare_index(connection: sqlite3.Connection, schema: Schema) -> bool:
    """Make the index of the search if it is missing or damaged; whether this SQLite can have it."""
    is_there = bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'finds'").fetchone())
    try:
        if is_there and not _can_read_index(connection):
            _drop_index(connection)
            is_there = False
        if not is_there:
            connection.execute(schema.index)
        connection.execute("SELECT 1 FROM finds LIMIT 0")
    except sqlite3.OperationalError as error:
        if error_code(error) != sqlite3.SQLITE_ERROR:
            raise
        return False  # no FTS5, or no trigram tokenizer
    except UnicodeDecodeError:  # in a message of SQLite's that quotes what it found
        return False
    return True


def _can_read_index(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1 FROM finds WHERE finds MATCH 'any'").fetchone()
    except sqlite3.DatabaseError as error:
        if error_code(error) not in DAMAGED_CODES:
            raise
        return False
    return True


def _drop_index(connection: sqlite3.Connection) -> None:
    """Remove an index that is too damaged for DROP TABLE, which would read it first."""
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("DELETE FROM sqlite_master WHERE name = 'finds'")
        for part in ("data", "idx", "docsize", "config"):
            connection.execute(f"DROP TABLE IF EXISTS finds_{part}")
        connection.execute("UPDATE turns SET is_indexed = 0")
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA writable_schema = RESET")


def _copy_of(path: Path, version: int) -> Path:
    return path.with_name(f"{path.name}.v{version}.bak")


def _copy(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """A copy of the whole database that outlasts a loss of power, before anything is changed in it."""
    beside = path.with_name(f"{path.name}.copying")
    beside.unlink(missing_ok=True)
    _make_file(beside)
    with closing(sqlite3.connect(beside)) as copy:
        connection.backup(copy)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(_copy_of(path, version))
    sync_folder(path.parent)


def _set_aside(path: Path) -> Path:
    """Give a damaged database and its log another name. Raises HistoryError."""
    stem = f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (f"{stem}{addition}{path.suffix}" for addition in ("", *(f"-{n}" for n in range(2, 1000))))
    kept = next(kept for name in names if not (kept := path.with_name(name)).exists())
    try:
        for end in _BESIDE:
            with suppress(FileNotFoundError):
                path.with_name(path.name + end).rename(kept.with_name(kept.name + end))
        suspicion(path).unlink(missing_ok=True)
    except OSError as error:
        raise HistoryError(
            f"the history {path} is damaged and cannot be moved ({error.strerror}). Move it away yourself."
        ) from error
    return kept
