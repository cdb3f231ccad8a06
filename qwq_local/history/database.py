"""The history's database: one connection for several threads, and how its file is opened.

Every write is one immediate transaction, so that two processes wait for each other instead of failing half
way. A failure of SQLite becomes a HistoryError that says what to do.

Opening makes a missing file, migrates an older one after a copy, and sets a damaged one aside. An intact file
is not scanned: a query that meets damage marks the file, and who opens it next reads every page. The history
of a newer version is left alone. A file that cannot be opened for another reason (locked, read-only, a full
disk) is an error, and nothing is touched.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.files import LockHeld, lock_file, sync_folder
from qwq_local.history.labels import squeezed
from qwq_local.history.schema import APPLICATION_ID, Schema, Step
from qwq_local.paths import make_private

_WAIT_S = 10.0
_OPENING_WAIT_S = 30.0
_PRIMARY_CODE = 0xFF  # the rest of an extended result code says where it happened
DAMAGED_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_NOT_WRITABLE_CODES = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN})
_BROKEN_CODES = DAMAGED_CODES | {sqlite3.SQLITE_TOOBIG}  # a length that no table here has
_FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_ADVICE = {
    sqlite3.SQLITE_FULL: "its disk is full. Make room, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_READONLY: "it may not be written. Change its permissions, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_PERM: "it may not be opened. Change its permissions, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. Check its folder, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_IOERR: "its disk did not take or give the data ({}). Move it with QWQ_DATA_DIR.",
}
_COPY_IT = "Copy its whole folder to where it may be written, and set QWQ_DATA_DIR to the copy."


class HistoryBusy(HistoryError):
    """Another process or thread has been writing for too long."""


class HistoryNotWritable(HistoryError):
    """This user may not write the history, or not in this place; it may be readable."""


class _Damaged(Exception):
    """The file is no database, or a broken one; the text says why."""


def error_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; -1 for errors of Python's module."""
    code = getattr(error, "sqlite_errorcode", None)
    return code & _PRIMARY_CODE if isinstance(code, int) else -1


def _failure(error: sqlite3.Error, path: Path | None) -> HistoryError:
    """The error for the user. Damage is marked, so that the next opening reads every page."""
    where = f"the history {path}" if path else "the history in memory"
    code = error_code(error)
    if code in _BUSY_CODES:
        return HistoryBusy(f"{where} is being written by another qwq. Try again when it is done.")
    if code in DAMAGED_CODES:
        if path is not None:
            with suppress(OSError):
                _beside(path, ".suspect").touch(mode=0o600)
        return HistoryError(f"{where} is damaged ({error}). Start qwq again: it looks at all of it then.")
    advice = _ADVICE.get(code, "SQLite says: {}. Move it with QWQ_DATA_DIR, or report this.")
    kind = HistoryNotWritable if code in _NOT_WRITABLE_CODES else HistoryError
    return kind(f"{where}: {advice.format(error)}")


class Database:
    """An open history. `path` is None if it lives in memory; `notice` says what was done to the file."""

    def __init__(self, connection: sqlite3.Connection, path: Path | None) -> None:
        self.path = path
        self.notice = ""
        self._connection = connection
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.RLock()

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """The rows of a query. Raises HistoryError."""
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise _failure(error, self.path) from error

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row of a query, if any. Raises HistoryError."""
        return next(iter(self.rows(sql, *values)), None)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Within the block all queries see the same state of the history. Raises HistoryError."""
        with self._lock:
            try:
                self._connection.execute("BEGIN")
                yield self._connection
            except sqlite3.Error as error:
                raise _failure(error, self.path) from error
            finally:
                self._roll_back()

    @contextmanager
    def writing(self, *, wait_s: float = _WAIT_S, is_lasting: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction, committed at the end of the block and undone should it raise.

        `is_lasting` survives a loss of power as well; otherwise a commit survives only the process. Raises
        HistoryBusy when it cannot begin within `wait_s` seconds, HistoryError for what SQLite refuses.
        """
        if not self._lock.acquire(timeout=wait_s):
            raise HistoryBusy(
                f"the history {self.path or 'in memory'} is being written. Try again when it is done."
            )
        try:
            self._connection.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
            # In WAL mode a commit under NORMAL never waits for the disk, so a decode does not wait either.
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if is_lasting else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise _failure(error, self.path) from error
        finally:
            self._roll_back()
            self._lock.release()

    def give_back_space(self) -> None:
        """Shrink the file after a removal, and overwrite what the log still has."""
        with self._lock, suppress(sqlite3.Error):
            # A script, since every step of this statement frees a page and `execute` takes only one.
            self._connection.executescript("PRAGMA incremental_vacuum")
            self._connection.execute("PRAGMA wal_checkpoint (TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close the connection; closing twice is harmless."""
        with self._lock, suppress(sqlite3.Error):
            self._connection.close()

    def _roll_back(self) -> None:
        """Undo a transaction that was not committed; after a full disk SQLite may have done it itself."""
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


def open_in_memory(schema: Schema) -> Database:
    """An empty history that only this process sees and that ends with it."""
    return _made(_connected(":memory:"), None, schema)


def open_database(path: Path, schema: Schema) -> Database:
    """The history at `path`; its `notice` says what was done to it. Raises HistoryError."""
    make_private(path.parent)
    with _opening(path):
        try:
            return _opened(path, schema)
        except _Damaged as damage:
            kept = _set_aside(path)
            database = _opened(path, schema)
            database.notice = f"{path.name} was damaged ({damage}), kept as {kept}; a new history begins."
            return database


def open_to_read(path: Path, schema: Schema) -> Database:
    """The history at `path` where it may not be written, as it is: nothing is made, repaired or migrated.

    Raises HistoryError, also when somebody writes to it later.
    """
    try:
        connection = _connected_to_read(path, schema)
    except _Damaged as damage:
        raise HistoryError(
            f"the history {path} is damaged ({damage}) and may not be written. {_COPY_IT}"
        ) from None
    except sqlite3.Error as error:
        raise _failure(error, path) from error
    except OSError as error:
        raise HistoryError(f"the history {path} cannot be read: {error.strerror or error}.") from error
    if (version := _pragma(connection, "user_version")) != schema.version:
        connection.close()
        raise HistoryError(
            f"the history {path} is of version {version}, this qwq reads version {schema.version}, and it "
            f"may not be written to bring it up to date. {_COPY_IT}"
        )
    return Database(connection, path)


# Opening


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Only one process opens the history at a time: of two that find it old or damaged, one repairs it."""
    with ExitStack() as held:
        try:
            held.enter_context(lock_file(_beside(path, ".lock"), timeout_s=_OPENING_WAIT_S, mode=0o600))
        except LockHeld:
            raise HistoryError(f"the history {path} is being opened by another qwq. Try again.") from None
        except OSError as error:
            raise (HistoryNotWritable if error.errno in _FORBIDDEN else HistoryError)(
                f"the history {path} cannot be locked: {error.strerror or error}. QWQ_DATA_DIR moves it, and "
                "`qwq chat --private` does without."
            ) from None
        try:
            yield
        except sqlite3.Error as error:
            raise _failure(error, path) from error
        except OSError as error:
            raise HistoryError(
                f"the history {path} cannot be opened ({error.strerror or error}). QWQ_DATA_DIR moves it."
            ) from error


def _opened(path: Path, schema: Schema) -> Database:
    """The history, of the right version. Raises _Damaged, HistoryError, sqlite3.Error, OSError."""
    if not path.exists():
        path.touch(mode=0o600)
    connection = _checked(path, "rw", schema)
    try:
        version = _pragma(connection, "user_version")
        if version == 0:
            return _made(connection, path, schema)
        if version < schema.version:
            copy = _copy(connection, path, version)
            steps = (step for each in range(version, schema.version) for step in schema.migrations[each])
            _run(Database(connection, path), steps, schema.version)
            connection.close()  # SQLite reads the changed tables when it connects
            database = _opened(path, schema)
            database.notice = f"the history is of version {schema.version} now; {copy} is as it was before."
            return database
        connection.execute("PRAGMA journal_mode = WAL")
        return Database(connection, path)
    except BaseException:
        connection.close()
        raise


def _checked(path: Path, mode: str, schema: Schema) -> sqlite3.Connection:
    """A connection to a sound history or an empty file. Raises _Damaged, HistoryError, sqlite3.Error."""
    log = _beside(path, "-wal")
    if not path.stat().st_size and log.exists() and log.stat().st_size:
        raise _Damaged("it is empty, its log is not")  # SQLite would delete the log
    connection = _connected(f"{path.absolute().as_uri()}?mode={mode}")
    try:
        _check(connection, path, schema)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.DatabaseError) and error_code(error) in _BROKEN_CODES:
            raise _Damaged(str(error)) from error
        if isinstance(error, UnicodeDecodeError):  # in a message of SQLite's that quotes what it found
            raise _Damaged("its tables cannot be read") from error
        raise
    return connection


def _connected(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        uri, uri=True, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = lambda text: text.decode("utf-8", "replace")  # some bytes may be damaged
    # What is removed shall be gone from the file too.
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _connected_to_read(path: Path, schema: Schema) -> sqlite3.Connection:
    try:
        return _checked(path, "ro", schema)
    except sqlite3.OperationalError as error:
        if error_code(error) not in _NOT_WRITABLE_CODES:
            raise
        # A log needs a file beside it for its locks. Without a log nothing is being written, and no locks are
        # needed: https://www.sqlite.org/wal.html#readonly
        for log in (_beside(path, "-wal"), _beside(path, "-journal")):
            if log.exists() and log.stat().st_size:
                raise HistoryError(
                    f"the last turns of the history {path} are in {log.name}, which cannot be read where "
                    f"nothing may be written. {_COPY_IT}"
                ) from error
        return _checked(path, "ro&immutable=1", schema)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


# Making and migrating


def _made(connection: sqlite3.Connection, path: Path | None, schema: Schema) -> Database:
    """A new history in an empty database."""
    # Before the first table, or not at all: so the file shrinks when conversations are removed.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    database = Database(connection, path)
    _run(database, schema.tables, schema.version)
    return database


def _run(database: Database, steps: Iterable[Step], version: int) -> None:
    """All of the steps or none."""
    with database.writing(is_lasting=True) as connection:
        for step in steps:
            if isinstance(step, str):
                connection.execute(step)
            else:
                step(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")


def _copy(connection: sqlite3.Connection, path: Path, version: int) -> Path:
    """A copy of the whole database that survives a loss of power, before anything is changed in it."""
    beside = _beside(path, ".copying")
    beside.unlink(missing_ok=True)
    beside.touch(mode=0o600)
    with closing(sqlite3.connect(beside)) as copy:
        connection.backup(copy)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    kept = beside.replace(_beside(path, f".v{version}.bak"))
    sync_folder(path.parent)
    return kept


def _set_aside(path: Path) -> Path:
    """Give a damaged database and its log another name. Raises HistoryError."""
    stem = f"{path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (f"{stem}{addition}{path.suffix}" for addition in ("", *(f"-{n}" for n in range(2, 1000))))
    kept = next(kept for name in names if not (kept := path.with_name(name)).exists())
    try:
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                _beside(path, ending).rename(_beside(kept, ending))
        _beside(path, ".suspect").unlink(missing_ok=True)
    except OSError as error:
        raise HistoryError(
            f"the history {path} is damaged and cannot be moved ({error.strerror}). Move it away yourself."
        ) from error
    return kept


# Checks


def _check(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    version = _pragma(connection, "user_version")
    has_tables = connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None
    if has_tables and _pragma(connection, "application_id") != APPLICATION_ID:
        raise HistoryError(f"{path} is a database of another program. Move it away, or set QWQ_DATA_DIR.")
    if version > schema.version:
        raise HistoryError(
            f"the history {path} is of version {version}, this qwq knows up to {schema.version}. "
            "Install a newer qwq, or set QWQ_DATA_DIR to begin another history."
        )
    mark = _beside(path, ".suspect")
    if mark.exists():
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise _Damaged(squeezed(found, 200))
        with suppress(OSError):  # where nothing may be written it stays
            mark.unlink(missing_ok=True)
    if has_tables and version not in (schema.version, *schema.migrations):
        raise _Damaged(f"version {version} never was")
    if version == schema.version and not _has_columns(connection, schema):
        raise _Damaged("its tables are not as they should be")


def _has_columns(connection: sqlite3.Connection, schema: Schema) -> bool:
    """Whether every table of the schema is there with its columns. Reads the first row of each."""
    try:
        return all(
            columns <= {each[0] for each in connection.execute(f"SELECT * FROM {table} LIMIT 1").description}
            for table, columns in schema.columns.items()
        )
    except sqlite3.OperationalError as error:
        if error_code(error) != sqlite3.SQLITE_ERROR:
            raise
        return False
