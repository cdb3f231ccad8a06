"""One connection to the history for several threads.

Every write is one immediate transaction, so that two processes wait for each other instead of failing half
way. A failure of SQLite becomes a HistoryError that says what to do.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwq_local.errors import HistoryError

WAIT_S = 10.0
"""How long a write waits for another process or thread before it fails."""

_PRIMARY_CODE = 0xFF  # the rest of an extended result code says where it happened
DAMAGED_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_NOT_WRITABLE_CODES = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN})
_ADVICE = {
    sqlite3.SQLITE_FULL: "its disk is full. Make room, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_READONLY: "it may not be written. Change its permissions, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_PERM: "it may not be opened. Change its permissions, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. Check its folder, or move it with QWQ_DATA_DIR.",
    sqlite3.SQLITE_IOERR: "its disk did not take or give the data ({}). Move it with QWQ_DATA_DIR.",
}


class HistoryBusy(HistoryError):
    """Another process or thread has been writing for too long."""


class HistoryNotWritable(HistoryError):
    """This user may not write the history, or not in this place; it may be readable."""


def error_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; -1 for errors of Python's module."""
    code = getattr(error, "sqlite_errorcode", None)
    return code & _PRIMARY_CODE if isinstance(code, int) else -1


def explained(error: sqlite3.Error, path: Path | None) -> HistoryError:
    """The error for the user."""
    where = f"the history {path}" if path else "the history in memory"
    code = error_code(error)
    if code in _BUSY_CODES:
        return HistoryBusy(f"{where} is being written by another qwq. Try again when it is done.")
    if code in DAMAGED_CODES:
        return HistoryError(f"{where} is damaged ({error}). Start qwq again: it looks at all of it then.")
    advice = _ADVICE.get(code, "SQLite says: {}. Move it with QWQ_DATA_DIR, or report this.")
    kind = HistoryNotWritable if code in _NOT_WRITABLE_CODES else HistoryError
    return kind(f"{where}: {advice.format(error)}")


class Database:
    """An open history. `path` is None if it lives in memory; `has_index` says whether words can be found."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path | None,
        *,
        has_index: bool,
        is_read_only: bool = False,
    ) -> None:
        self.path = path
        self.has_index = has_index
        self.is_read_only = is_read_only
        self._connection = connection
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self._is_suspect = False

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """The rows of a query. Raises HistoryError."""
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._failed(error) from error

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row of a query, if any. Raises HistoryError."""
        return next(iter(self.rows(sql, *values)), None)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Within the block all queries see the same state of the history. Raises HistoryError."""
        with self._lock:
            is_outer = not self._connection.in_transaction
            try:
                if is_outer:
                    self._connection.execute("BEGIN")
                yield self._connection
            except sqlite3.Error as error:
                raise self._failed(error) from error
            finally:
                if is_outer:
                    self._roll_back()

    @contextmanager
    def writing(self, *, wait_s: float = WAIT_S, is_lasting: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction, committed at the end of the block and undone should it raise.

        `is_lasting` survives a loss of power as well; otherwise a commit survives only the process. Raises
        HistoryBusy when it cannot begin within `wait_s` seconds, HistoryError for what SQLite refuses.
        """
        if not self._lock.acquire(timeout=wait_s):
            raise explained_as_busy(self.path)
        try:
            self._begin(wait_s, is_lasting)
            yield self._connection
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise self._failed(error) from error
        except BaseException:
            self._roll_back()
            raise
        finally:
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

    def _begin(self, wait_s: float, is_lasting: bool) -> None:
        self._connection.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000)}")
        # In WAL mode NORMAL never waits for the disk at a commit, so a decode does not wait for it either.
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if is_lasting else 'NORMAL'}")
        self._connection.execute("BEGIN IMMEDIATE")

    def _roll_back(self) -> None:
        # After a full disk SQLite may have undone the transaction itself.
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def _failed(self, error: sqlite3.Error) -> HistoryError:
        if self.path is not None and error_code(error) in DAMAGED_CODES:
            with suppress(OSError):
                suspicion(self.path).touch(mode=0o600)
        return explained(error, self.path)


def explained_as_busy(path: Path | None) -> HistoryBusy:
    """The error for a history that another thread is writing."""
    return HistoryBusy(f"the history {path or 'in memory'} is being written. Try again when it is done.")


def suspicion(path: Path) -> Path:
    """The file beside a database that marks it as damaged: who opens it next looks at every page."""
    return path.with_name(path.name + ".suspect")
