"""Opens the history's file: makes it if it is missing, migrates an older one, sets a damaged one aside.

A migration begins with a copy of the file. The history of a newer version is left alone. A file that cannot
be opened for another reason (locked, read-only, a full disk) is an error, and nothing is touched.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
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
from qwq_local.history.labels import squeezed
from qwq_local.history.schema import APPLICATION_ID, Schema, Step
from qwq_local.paths import make_private

# Reading this much takes no longer than the rest of the start. A larger file is read when damage was met.
ALWAYS_CHECKED_BYTES = 64 * 2**20
_MAGIC = b"SQLite format 3\0"
_DAMAGED_CODES = DAMAGED_CODES | {sqlite3.SQLITE_TOOBIG}  # a length that no table here has
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_CANNOT_LOCK = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY})
_BESIDE = ("", "-wal", "-shm")
_OPENING_WAIT_S = 30.0
_MAX_REASON = 200
_COPY_IT = "Copy its whole folder to where it may be written, and set QWQ_DATA_DIR to the copy."


class Damaged(Exception):
    """The file is no database, or a broken one; the text says why."""


def open_in_memory(schema: Schema) -> Database:
    """An empty history that only this process sees and that ends with it."""
    connection = _connected(":memory:")
    _create(connection, schema)
    return Database(connection, None, has_index=_prepare_index(connection, schema))


def open_database(path: Path, schema: Schema) -> tuple[Database, list[str]]:
    """The history at `path`, and what the user should know of how it was opened. Raises HistoryError."""
    notices: list[str] = []
    make_private(path.parent)
    with _opening(path):
        try:
            return _opened_or_new(path, schema, notices), notices
        except sqlite3.Error as error:
            raise explained(error, path) from error
        except OSError as error:
            raise HistoryError(
                f"the history {path} cannot be opened ({error.strerror or error}). QWQ_DATA_DIR moves it."
            ) from error


def open_to_read(path: Path, schema: Schema) -> Database:
    """The history at `path` where it may not be written, as it is: nothing is made, repaired or migrated.

    Raises HistoryError, also when somebody writes to it later.
    """
    try:
        connection, version = _connected_to_read(path, schema)
    except Damaged as damage:
        raise HistoryError(
            f"the history {path} is damaged ({damage}) and may not be written. {_COPY_IT}"
        ) from None
    except sqlite3.Error as error:
        raise explained(error, path) from error
    except OSError as error:
        raise HistoryError(f"the history {path} cannot be read: {error.strerror or error}.") from error
    if version != schema.version:
        connection.close()
        raise HistoryError(
            f"the history {path} is of version {version}, this qwq reads version {schema.version}, and it "
            f"may not be written to bring it up to date. {_COPY_IT}"
        )
    return Database(connection, path, has_index=_can_read_index(connection), is_read_only=True)


# Opening


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Only one process opens the history at a time: of two that find it old or damaged, one repairs it."""
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
    version = 0 if _make_file(path) else _inspected(path, schema)
    if version not in (0, schema.version):
        with closing(_connected(str(path))) as old:
            copy = _copy(old, path, version)
            _migrate(old, schema, version)
        notices.append(f"the history is of version {schema.version} now; {copy} is as it was before.")
    connection = _connected(str(path))
    try:
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
    connection.text_factory = _decoded
    try:
        # What is removed shall be gone from the file too.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _connected_to_read(path: Path, schema: Schema) -> tuple[sqlite3.Connection, int]:
    """A connection that only reads, and the version of what it reads."""
    try:
        return _checked(path, "mode=ro", schema)
    except sqlite3.OperationalError as error:
        if error_code(error) not in _CANNOT_LOCK:
            raise
        # A log needs a file beside it for its locks. Without a log nothing is being written, and no locks are
        # needed: https://www.sqlite.org/wal.html#readonly
        for end in ("-wal", "-journal"):
            beside = path.with_name(path.name + end)
            if beside.exists() and beside.stat().st_size:
                raise HistoryError(
                    f"the last turns of the history {path} are in {beside.name}, which cannot be read where "
                    f"nothing may be written. {_COPY_IT}"
                ) from error
        return _checked(path, "mode=ro&immutable=1", schema)


def _checked(path: Path, how: str, schema: Schema) -> tuple[sqlite3.Connection, int]:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = _decoded
    try:
        return connection, _version(connection, path, schema)
    except BaseException:
        connection.close()
        raise


def _decoded(text: bytes) -> str:
    """The text, also if some of its bytes are damaged."""
    return text.decode("utf-8", "replace")


# Making and migrating


def _create(connection: sqlite3.Connection, schema: Schema) -> None:
    # Before the first table, or not at all: so the file shrinks when conversations are removed.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _run(connection, schema.tables, schema.version)


def _migrate(connection: sqlite3.Connection, schema: Schema, version: int) -> None:
    """Every step from `version` on in one transaction: all of them or none."""
    steps = (step for old in range(version, schema.version) for step in schema.migrations.get(old, ()))
    _run(connection, steps, schema.version)


def _run(connection: sqlite3.Connection, steps: Iterable[Step], version: int) -> None:
    with _transaction(connection):
        for step in steps:
            if isinstance(step, str):
                connection.execute(step)
            else:
                step(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _copy(connection: sqlite3.Connection, path: Path, version: int) -> Path:
    """A copy of the whole database that survives a loss of power, before anything is changed in it."""
    beside = path.with_name(f"{path.name}.copying")
    beside.unlink(missing_ok=True)
    _make_file(beside)
    with closing(sqlite3.connect(beside)) as copy:
        connection.backup(copy)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    kept = beside.replace(path.with_name(f"{path.name}.v{version}.bak"))
    sync_folder(path.parent)
    return kept


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


# The index of the search


def _prepare_index(connection: sqlite3.Connection, schema: Schema) -> bool:
    """Make the index of the search if it is missing or damaged; whether this SQLite can have it."""
    is_there = bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'finds'").fetchone())
    try:
        if is_there and _is_index_damaged(connection):
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


def _is_index_damaged(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1 FROM finds WHERE finds MATCH 'any'").fetchone()
    except sqlite3.DatabaseError as error:
        if error_code(error) not in DAMAGED_CODES:
            raise
        return True
    return False


def _can_read_index(connection: sqlite3.Connection) -> bool:
    try:
        return not _is_index_damaged(connection)
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return False


def _drop_index(connection: sqlite3.Connection) -> None:
    """Remove an index that is too damaged for DROP TABLE, which would read it first."""
    connection.execute("PRAGMA writable_schema = ON")
    try:
        with _transaction(connection):
            connection.execute("DELETE FROM sqlite_master WHERE name = 'finds'")
            for part in ("data", "idx", "docsize", "config"):
                connection.execute(f"DROP TABLE IF EXISTS finds_{part}")
            connection.execute("UPDATE turns SET is_indexed = 0")
    finally:
        connection.execute("PRAGMA writable_schema = RESET")


# Inspection: it changes nothing


def _inspected(path: Path, schema: Schema) -> int:
    """The version of a sound history, 0 of an empty file. Raises Damaged, HistoryError, sqlite3.Error."""
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    log = path.with_name(path.name + "-wal")
    if start and start != _MAGIC:
        raise Damaged("it is no SQLite database")
    if not start and log.exists() and log.stat().st_size:
        raise Damaged("it is empty, its log is not")  # SQLite would delete the log
    _roll_back_journal(path)
    try:
        connection, version = _checked(path, "mode=ro", schema)
    except sqlite3.DatabaseError as error:
        if error_code(error) in _DAMAGED_CODES:
            raise Damaged(str(error)) from error
        raise
    except UnicodeDecodeError as error:  # in a message of SQLite's that quotes what it found
        raise Damaged("its tables cannot be read") from error
    connection.close()
    return version


def _roll_back_journal(path: Path) -> None:
    """Undo what a process left half done that was killed while it made the history."""
    if path.with_name(path.name + "-journal").exists():
        with closing(sqlite3.connect(path)) as connection, suppress(sqlite3.DatabaseError):
            connection.execute("PRAGMA user_version")


def _version(connection: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """The version of a history, 0 if it is empty. Raises Damaged, HistoryError, sqlite3.Error."""
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
