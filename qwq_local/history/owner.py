"""Which process writes a turn, and whether it still lives.

A process that writes turns holds a lock on a file of its own, named by a random token that its turns carry.
The system drops the lock with the process, however it ends: so neither a recycled process id nor a reboot
can make a dead process look alive, and nothing has to be asked of the process table, which differs between
systems and ends at the edge of a container.
"""

from __future__ import annotations

import re
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.files import LockHeld, lock_file
from qwq_local.paths import make_private

_TOKEN = re.compile(r"[0-9a-f]{32}")
_SUFFIX = ".lock"


class Owner:
    """This process as the writer of turns. Without a folder nobody else can see what it writes.

    `hold` and `is_alive` belong inside a transaction of the history: so no file is taken for abandoned
    between its making and its locking.
    """

    def __init__(self, folder: Path | None) -> None:
        self.token = secrets.token_hex(16)
        self._folder = folder
        self._lock: ExitStack | None = None

    def hold(self) -> None:
        """Be alive for other processes, until `release` or the end of this process. Raises HistoryError.

        What processes left that are gone is removed the first time.
        """
        if self._folder is None or self._lock is not None:
            return
        make_private(self._folder)
        self._remove_abandoned(self._folder)
        path = self._path(self._folder, self.token)
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
        path = self._path(self._folder, token)
        if not path.exists():
            return False
        try:
            with lock_file(path):
                return False
        except (OSError, LockHeld):
            return True

    def release(self) -> None:
        """Be gone for other processes."""
        if self._folder is None or self._lock is None:
            return
        with suppress(OSError):
            self._path(self._folder, self.token).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.close()
        self._lock = None

    def _remove_abandoned(self, folder: Path) -> None:
        with suppress(OSError):
            for path in folder.glob(f"*{_SUFFIX}"):
                if _TOKEN.fullmatch(path.stem) and not self.is_alive(path.stem):
                    path.unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, token: str) -> Path:
        return folder / (token + _SUFFIX)
