"""One entry of the KV store: the keys and values of a token sequence in a file with a checksum.

The file is llama.cpp's own sequence-state file (magic, version, token count, tokens, state) and a trailer:
a JSON record with the entry's key and the checksum of everything before it; the record's length and CRC-32;
our magic. The trailer is written last, so a file without one is incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qwq_local.engine.api import ContextSettings
from qwq_local.engine.library import TESTED_VERSION
from qwq_local.errors import Aborted, AbortFlag
from qwq_local.files import read_at

SUFFIX = ".kv"
_MAGIC = b"QWQ-KV\x01\n"
_TAIL = struct.Struct("<II8s")  # the record's length and CRC-32, our magic
_HEAD = struct.Struct("<III")  # llama.cpp's magic ("ggsq"), version and token count
_LLAMA_MAGIC, _LLAMA_VERSION = 0x67677371, 3
_TOKEN_BYTES = 4
_MAX_RECORD_BYTES = 4096
MAX_TRAILER_BYTES = _MAX_RECORD_BYTES + _TAIL.size
_MAX_TOKENS = 1 << 22
_MAX_LABEL = 64
PIECE_BYTES = 1 << 24  # of one CRC-32
_CHECKSUM_THREADS = 4
_RECORD_TYPES = {
    **dict.fromkeys(("label", "checksum", "library"), str),
    **dict.fromkeys(("n_tokens", "state_bytes"), int),
    "prefill_token_s": float,
}
_KEY_TYPES = {
    **dict.fromkeys(("kv_type_k", "kv_type_v"), (str,)),
    "flash_attention": (bool, type(None)),
    "yarn_factor": (float,),
    "yarn_origin": (int,),
    "is_linear": (bool,),
}


class DamagedEntry(Exception):
    """A file in the store that is not a complete entry of this version."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which weights: a hash of header, size and time of the file; the SHA-256 of it once that is known."""

    header: str
    sha256: str = ""

    def is_same(self, other: ModelIdentity) -> bool:
        """Whether both are the same weights; by content if both know it."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.header == other.header


@dataclass(frozen=True, slots=True)
class StateKey:
    """What an entry and a context that reads it must have in common."""

    model: ModelIdentity
    kv_type_k: str
    kv_type_v: str
    flash_attention: bool | None
    yarn_factor: float = 1.0
    yarn_origin: int = 0
    is_linear: bool = False

    @classmethod
    def of(cls, model: ModelIdentity, settings: ContextSettings) -> StateKey:
        """The key of a context over a model; without scaling its origin and kind do not count."""
        is_scaled = settings.yarn_factor > 1
        return cls(
            model=model,
            kv_type_k=settings.kv_type_k,
            kv_type_v=settings.kv_type_v,
            flash_attention=settings.flash_attention,
            yarn_factor=float(settings.yarn_factor) if is_scaled else 1.0,
            yarn_origin=settings.yarn_origin if is_scaled else 0,
            is_linear=settings.is_linear and is_scaled,
        )

    def matches(self, other: StateKey) -> bool:
        """Whether keys and values computed under one key are valid under the other."""
        return self.model.is_same(other.model) and self._of_context() == other._of_context()

    def _of_context(self) -> tuple[object, ...]:
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "model")


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """What the trailer holds: the key, the model's name, the seconds a token took to prefill, the checksum.

    `state_bytes` is the length of everything before the trailer.
    """

    key: StateKey
    label: str
    n_tokens: int
    prefill_token_s: float
    state_bytes: int
    checksum: str
    library: str = TESTED_VERSION


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the store whose trailer is sound; its content is not verified yet."""

    path: Path
    record: EntryRecord
    file_bytes: int
    used_s: float

    def token_bytes(self) -> bytes:
        """The tokens in the file, four little-endian bytes each. Raises OSError, DamagedEntry."""
        with self.path.open("rb") as file:
            head = file.read(_HEAD.size)
            tokens = file.read(self.record.n_tokens * _TOKEN_BYTES)
        if head != _HEAD.pack(_LLAMA_MAGIC, _LLAMA_VERSION, self.record.n_tokens):
            raise DamagedEntry
        if entry_name(self.record.key, tokens) != self.path.name:
            raise DamagedEntry
        return tokens

    def verify(self, abort: AbortFlag | None = None) -> None:
        """Read all of it. Raises DamagedEntry when the checksum is wrong, OSError, and Aborted."""
        if checksum(self.path, self.record.state_bytes, abort) != self.record.checksum:
            raise DamagedEntry


def entry_name(key: StateKey, tokens: bytes) -> str:
    """The file name of these tokens under this key; every process computes the same."""
    digest = hashlib.sha256(_json(asdict(key)))
    digest.update(tokens)
    return digest.hexdigest()[:32] + SUFFIX


def packed(tokens: Sequence[int]) -> bytes:
    """Tokens as four little-endian bytes each."""
    return struct.pack(f"<{len(tokens)}i", *tokens)


def common_tokens(a: bytes, b: bytes) -> int:
    """The number of tokens at the beginning that two packed sequences share."""
    low, high = 0, min(len(a), len(b)) // _TOKEN_BYTES
    while low < high:  # the first `low` tokens are equal, and not more than `high` are
        middle = (low + high + 1) // 2
        span = slice(low * _TOKEN_BYTES, middle * _TOKEN_BYTES)
        low, high = (middle, high) if a[span] == b[span] else (low, middle - 1)
    return low


def append_trailer(path: Path, record: EntryRecord) -> None:
    """Turn a state file into an entry. Raises OSError."""
    text = _json(asdict(record))
    with path.open("ab") as file:
        file.write(text + _TAIL.pack(len(text), zlib.crc32(text), _MAGIC))


def read_entry(path: Path) -> Entry:
    """The entry at `path`, from its trailer alone. Raises DamagedEntry, and OSError when the file is gone."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        file.seek(max(0, status.st_size - MAX_TRAILER_BYTES))
        end = file.read(MAX_TRAILER_BYTES)
    if len(end) < _TAIL.size:
        raise DamagedEntry
    length, crc, magic = _TAIL.unpack(end[-_TAIL.size :])
    text = end[-_TAIL.size - length : -_TAIL.size]
    if magic != _MAGIC or len(text) != length or zlib.crc32(text) != crc:
        raise DamagedEntry
    record = _record(text)
    if record.state_bytes != status.st_size - _TAIL.size - length:
        raise DamagedEntry
    return Entry(path, record, status.st_size, status.st_mtime)


def checksum(path: Path, n_bytes: int, abort: AbortFlag | None = None) -> str:
    """64 hex digits over the first `n_bytes` of a file: SHA-256 of the length and the CRC-32 of each piece.

    It finds damage, not malice, and is fast: several threads read and sum. Raises OSError, and Aborted when
    the flag is set meanwhile.
    """
    with path.open("rb") as file:

        def crc32(offset: int) -> int:
            if abort:
                raise Aborted
            return zlib.crc32(read_at(file.fileno(), min(PIECE_BYTES, n_bytes - offset), offset))

        with ThreadPoolExecutor(_CHECKSUM_THREADS, "checksum") as threads:
            sums = list(threads.map(crc32, range(0, n_bytes, PIECE_BYTES)))
    digest = hashlib.sha256(n_bytes.to_bytes(8, "little"))
    for crc in sums:
        digest.update(crc.to_bytes(4, "little"))
    return digest.hexdigest()


def clean_label(name: str) -> str:
    """A model's name, printable and short."""
    return "".join(c if c.isprintable() else " " for c in name)[:_MAX_LABEL]


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _record(text: bytes) -> EntryRecord:
    """The record, if this version wrote it. Raises DamagedEntry."""
    try:
        values = json.loads(text)
        model = ModelIdentity(**values["key"].pop("model"))
        record = EntryRecord(**{**values, "key": StateKey(model=model, **values["key"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedEntry from error
    is_sound = (
        _json(asdict(record)) == text
        and all(type(getattr(record, name)) is kind for name, kind in _RECORD_TYPES.items())
        and all(type(getattr(record.key, name)) in kinds for name, kinds in _KEY_TYPES.items())
        and type(model.header) is type(model.sha256) is str
        and record.prefill_token_s >= 0
        and 0 < record.n_tokens <= _MAX_TOKENS
        and record.library == TESTED_VERSION
    )
    if not is_sound:
        raise DamagedEntry
    return record
