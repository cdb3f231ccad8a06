"""The registry of models: a JSON file in the data folder, shared by all processes.

It has the default model, the files that the user added with their names, which content was verified, and when
a model was last used. All of it can be found or made again. So an unreadable file is set aside, and the
registry starts empty.
"""

from __future__ import annotations

import json
import time
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


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One file, by its real path.

    `alias` is the user's name for it, `origin` is how it came ("pull", "convert", "add", or "" from another
    program), `added_at` is when. The sha256 is valid for a file of this length and modification time.
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


_KINDS = {
    each.name: {"str": str, "int": int}.get(str(each.type), (int, float)) for each in fields(ModelRecord)
}


@dataclass(frozen=True, slots=True)
class RegistryState:
    """All records by path, and the name of the default model; empty when no default was chosen."""

    default: str = ""
    records: Mapping[str, ModelRecord] = field(default_factory=dict)

    def of(self, path: Path) -> ModelRecord:
        """The record of a file; an empty one for a file without a record."""
        key = str(path.resolve())
        return self.records.get(key, ModelRecord(key))

    def with_record(self, record: ModelRecord) -> RegistryState:
        """This state with the record added."""
        return replace(self, records={**self.records, record.path: record})

    def with_verified(self, path: Path, **changes: Any) -> RegistryState:
        """This state with the file recorded as verified now, as it is on the disk, and with these changes."""
        status = path.stat()
        known = replace(self.of(path), n_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
        return self.with_record(replace(known, verified_at=time.time(), **changes))

    def without(self, path: Path) -> RegistryState:
        """This state without the record of a file."""
        key = str(path.resolve())
        return replace(self, records={k: record for k, record in self.records.items() if k != key})

    def is_verified(self, path: Path) -> bool:
        """Whether the file's content was verified, and the file was not changed since."""
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
        """Creates nothing: `change` does."""
        self._folder = folder
        self._path = folder / FILE

    def read(self) -> RegistryState:
        """The current state; empty when the file is missing or unreadable."""
        try:
            return self._load()
        except (OSError, ValueError, RecursionError):
            return RegistryState()

    def change(self, how: Callable[[RegistryState], RegistryState]) -> RegistryState:
        """Apply a change, one process at a time. Raises QwqError when it cannot be stored."""
        make_private(self._folder)
        try:
            with lock_file(self._path.with_suffix(".lock"), timeout_s=LOCK_TIMEOUT_S):
                try:
                    state = self._load()
                except FileNotFoundError:
                    state = RegistryState()
                except (ValueError, RecursionError):
                    self._path.replace(self._path.with_suffix(".damaged.json"))
                    state = RegistryState()
                state = how(state)
                records = [asdict(record) for record in state.records.values()]
                content = {"format": FORMAT, "default": state.default, "models": records}
                text = json.dumps(content, indent=1) + "\n"
                write_atomically(self._path, text.encode(), beside=self._path.with_suffix(".new"))
                return state
        except LockHeld:
            raise QwqError(f"{self._path} is locked by another qwq. Wait for it, then try again.") from None
        except OSError as error:
            reason = error.strerror or error
            raise QwqError(f"{self._path} cannot be written ({reason}). QWQ_DATA_DIR moves it.") from None

    def _load(self) -> RegistryState:
        """The state in the file. Raises OSError, and ValueError or RecursionError for a damaged one."""
        with self._path.open("rb") as file:
            content = json.loads(file.read(MAX_BYTES + 1))
        if not isinstance(content, dict) or not isinstance(content.get("models"), list):
            raise ValueError
        default = content.get("default")
        found = [_record(entry) for entry in content["models"][:MAX_RECORDS]]
        records = {record.path: record for record in found if record is not None}
        return RegistryState(default if isinstance(default, str) else "", records)


def _record(entry: Any) -> ModelRecord | None:
    """A record from JSON, without keys of other versions; None when a value has the wrong type."""
    if not isinstance(entry, dict) or not entry.get("path"):
        return None
    kept = {key: value for key, value in entry.items() if key in _KINDS and value is not None}
    if any(isinstance(value, bool) or not isinstance(value, _KINDS[key]) for key, value in kept.items()):
        return None
    return ModelRecord(**kept)
