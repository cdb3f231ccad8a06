"""What is known of the models on this machine: JSON under the data folder, shared by all processes.

Which model is the default, which files the user added under which name, which content was verified, when a
model was last used. Everything in it can be found or made again, so an unreadable file is set aside and
the registry starts empty. Knows no network and no other tool's files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qwq_local.errors import QwqError
from qwq_local.files import LockHeld, lock_file, write_atomically
from qwq_local.paths import make_private

FILE = "models.json"
FORMAT = 1
MAX_BYTES = 4 * 2**20
MAX_RECORDS = 1000
LOCK_TIMEOUT_S = 20.0
_ALLOWED: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one file, by its real path.

    `alias` is the name that the user gave it, `origin` how it came ("pull", "convert", "add"; "" when another
    tool brought it) and `added_at` when. The sha256 holds for a file of that length and modification time.
    """

    path: str
    alias: str = ""
    origin: str = ""
    file_type: str = ""
    repo: str = ""
    sha256: str = ""
    n_bytes: int = 0
    mtime_ns: int = 0
    verified_at: float = 0.0
    added_at: float = 0.0
    last_used: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """All records by path, and the name of the default model, empty when none was chosen."""

    default: str = ""
    records: Mapping[str, Record] = field(default_factory=dict)

    def of(self, path: Path) -> Record:
        """The record of a file, an empty one when nothing is known of it."""
        key = str(path.resolve())
        return self.records.get(key, Record(key))

    def with_record(self, record: Record) -> State:
        """The same with this record in it."""
        return replace(self, records={**self.records, record.path: record})

    def without(self, path: Path) -> State:
        """The same without the record of a file."""
        key = str(path.resolve())
        return replace(self, records={k: record for k, record in self.records.items() if k != key})

    def is_verified(self, path: Path) -> bool:
        """Whether the file's content was verified and nothing has touched it since."""
        record = self.of(path)
        try:
            status = path.stat()
        except OSError:
            return False
        is_same = (record.n_bytes, record.mtime_ns) == (status.st_size, status.st_mtime_ns)
        return record.verified_at > 0 and is_same


class Registry:
    """The registry in a data folder."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made before something is to be remembered."""
        self._folder = folder
        self._path = folder / FILE

    def read(self) -> State:
        """What is known now; nothing when the file is missing or unreadable."""
        try:
            if self._path.stat().st_size > MAX_BYTES:
                return State()
            return _state(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            return State()

    def change(self, how: Callable[[State], State]) -> State:
        """Apply a change to what is known, one process at a time. Raises QwqError when it cannot be kept."""
        make_private(self._folder)
        try:
            with lock_file(self._path.with_suffix(".lock"), timeout_s=LOCK_TIMEOUT_S):
                self._set_aside_if_damaged()
                state = how(self.read())
                self._write(state)
                return state
        except LockHeld:
            raise QwqError(f"{self._path} is locked by another qwq. Wait for it, then try again.") from None
        except OSError as error:
            reason = error.strerror or error
            raise QwqError(f"{self._path} cannot be written ({reason}). QWQ_DATA_DIR moves it.") from None

    def _set_aside_if_damaged(self) -> None:
        try:
            json.loads(self._path.read_bytes()[: MAX_BYTES + 1])
        except FileNotFoundError:
            return
        except (ValueError, RecursionError):
            self._path.replace(self._path.with_suffix(".damaged.json"))

    def _write(self, state: State) -> None:
        records = [asdict(record) for record in state.records.values()]
        text = json.dumps({"format": FORMAT, "default": state.default, "models": records}, indent=1)
        write_atomically(self._path, f"{text}\n".encode(), beside=self._path.with_suffix(".new"))


def _state(content: Any) -> State:
    if not isinstance(content, dict) or not isinstance(content.get("models"), list):
        return State()
    default = content.get("default")
    found = [_record(entry) for entry in content["models"][:MAX_RECORDS]]
    records = {record.path: record for record in found if record is not None}
    return State(default if isinstance(default, str) else "", records)


def _record(entry: Any) -> Record | None:
    """A record from JSON: keys of another version are left out, a wrong type makes it none."""
    if not isinstance(entry, dict):
        return None
    kept: dict[str, Any] = {}
    for known in fields(Record):
        value = entry.get(known.name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, _ALLOWED[str(known.type)]):
            return None
        kept[known.name] = value
    return Record(**kept) if kept.get("path") else None
