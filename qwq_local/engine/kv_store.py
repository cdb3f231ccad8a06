"""The KV store: prefilled prompts are kept on disk, and later contexts read them back.

An entry is read only when model, rope scaling, KV types, flash attention and library version are equal and
its checksum is right; what it holds beyond the shared beginning is cut off by the next prefill. Devices and
batch sizes are not part of the key: they change the last bits, as they do from one prefill to another.

The folder has no index, so two processes at once and a kill at any moment leave no inconsistent state.
An entry appears by a rename; the least recently used one makes room for a new one.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qwq_local.engine.context import CachedSequence
from qwq_local.engine.kv_entry import (
    MAX_TRAILER_BYTES,
    SUFFIX,
    DamagedEntry,
    Entry,
    EntryRecord,
    ModelIdentity,
    StateKey,
    append_trailer,
    checksum,
    clean_label,
    common_tokens,
    entry_name,
    packed,
    read_entry,
)
from qwq_local.errors import AbortFlag, QwqError
from qwq_local.files import free_bytes, remove_quietly
from qwq_local.paths import make_private
from qwq_local.text import GIB, binary_size

_ENTRY_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
_INCOMPLETE = ".saving-"
_ABANDONED_S = 600  # a file that is being written is younger
_SHARE_OF_FREE_DISK = 10
_READ_BYTES_PER_S = 5e8  # reading and checksum on a usual computer
DEFAULT_MIN_TOKENS = 1024
_MAX_BESIDE_STATE = 16 + MAX_TRAILER_BYTES  # the head of llama.cpp's file and our trailer
_MANY_BYTES = 1 << 30


class NoRoom(Exception):
    """An entry does not fit the store or the disk; the text says which limit it exceeds."""


@dataclass(frozen=True, slots=True)
class KvFolder:
    """The entries in the folder `path`, which is created when there is something to write.

    Only the user may read it. `limit_bytes` None means a tenth of the disk space that is free or taken by
    the store.
    """

    path: Path
    limit_bytes: int | None = None

    def entries(self, *, remove_damaged: bool = True) -> list[Entry]:
        """Every entry with a sound trailer, last used first; others with the name of an entry are removed."""
        found = []
        for path in self._files(_ENTRY_NAME.fullmatch):
            try:
                found.append(read_entry(path))
            except DamagedEntry:
                if remove_damaged:
                    remove_quietly(path)
            except OSError:  # another process has just removed it
                continue
        return sorted(found, key=lambda entry: entry.used_s, reverse=True)

    def limit(self) -> int:
        """The bytes that the store may take up. Raises OSError."""
        if self.limit_bytes is not None:
            return self.limit_bytes
        used = sum(entry.file_bytes for entry in self.entries(remove_damaged=False))
        return (free_bytes(self.path) + used) // _SHARE_OF_FREE_DISK

    def make_room(self, n_bytes: int) -> None:
        """Remove entries, least recently used first, until `n_bytes` more are within the limit.

        Raises OSError, and NoRoom, before it removes an entry, when `n_bytes` alone exceed the limit.
        """
        make_private(self.path)
        self.remove_abandoned()
        limit, entries = self.limit(), self.entries()
        if n_bytes > limit:
            raise NoRoom(f"the KV store may have {binary_size(limit)} (--set kv_store=GIB)")
        used = sum(entry.file_bytes for entry in entries)
        while entries and used + n_bytes > limit:
            oldest = entries.pop()
            remove_quietly(oldest.path)
            used -= oldest.file_bytes
        free = free_bytes(self.path)
        if n_bytes > free:
            raise NoRoom(f"the disk has {binary_size(free)} left")

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """An empty private file to write an entry to; deleted after the block unless it was renamed."""
        make_private(self.path)
        descriptor, name = tempfile.mkstemp(prefix=_INCOMPLETE, dir=self.path)
        os.close(descriptor)
        try:
            yield Path(name)
        finally:
            remove_quietly(Path(name))

    def remove_abandoned(self, older_s: float = _ABANDONED_S) -> None:
        """Remove incomplete files of killed processes."""
        for path in self._files(lambda name: name.startswith(_INCOMPLETE)):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > older_s:
                    path.unlink()

    def _files(self, is_wanted: Callable[[str], object]) -> Iterator[Path]:
        try:
            listed = list(os.scandir(self.path))
        except OSError:  # the folder does not exist yet
            return
        for item in listed:
            if is_wanted(item.name) and item.is_file(follow_symlinks=False):
                yield Path(item.path)


def kv_folder(cache: Path, limit_gib: float | None = None) -> KvFolder:
    """The store in a cache folder; a limit of None as in KvFolder."""
    return KvFolder(cache / "kv", None if limit_gib is None else int(limit_gib * GIB))


def _touch(path: Path) -> None:
    """Set the time of last use to now."""
    with suppress(OSError):
        os.utime(path)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt that was prefilled: its tokens, the seconds that one of them took, the model's name."""

    tokens: Sequence[int]
    token_s: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class _StoredPrefix:
    """An entry and the number of tokens that it shares with the wanted ones."""

    entry: Entry
    n_common: int


class KvStore:
    """Saves cached sequences and reads them back. `is_private` only reads, and changes no file.

    Both generators yield lines for the user: that it takes a while, or what failed.
    """

    def __init__(
        self,
        folder: KvFolder,
        *,
        min_tokens: int = DEFAULT_MIN_TOKENS,
        is_private: bool = False,
        many_bytes: int = _MANY_BYTES,
    ) -> None:
        """A prompt is saved when at least `min_tokens` of its tokens are not stored yet.

        Reading or writing `many_bytes` and more is announced.
        """
        self.folder = folder
        self._min_tokens = min_tokens
        self._is_private = is_private
        self._many_bytes = many_bytes

    def restore(
        self, sequence: CachedSequence, model: ModelIdentity, prompt: Sequence[int], abort: AbortFlag
    ) -> Generator[str, None, int]:
        """Load the longest stored beginning of the prompt; returns how many of its tokens are cached now.

        Nothing is read when the sequence already holds as much, or when prefilling is as fast. An entry that
        cannot be read is skipped. Raises Aborted.
        """
        wanted = packed(prompt)
        for candidate in self._candidates(StateKey.of(model, sequence.settings), wanted):
            held = common_tokens(packed(sequence.tokens), wanted)
            entry = candidate.entry
            if entry.record.n_tokens > sequence.settings.n_ctx or not _pays(candidate, held):
                continue
            if entry.file_bytes >= self._many_bytes:
                yield f"reading {entry.record.n_tokens:,} prefilled tokens ({binary_size(entry.file_bytes)})."
            if self._is_verified(entry, abort) and self._read(sequence, entry):
                break
        return common_tokens(packed(sequence.tokens), wanted)

    def keep(self, sequence: CachedSequence, model: ModelIdentity, prefilled: Prefilled) -> Iterator[str]:
        """Save the beginning of the prompt that the sequence holds.

        The sequence is truncated to it. Nothing is written when fewer than `min_tokens` of its tokens are
        not stored yet.
        """
        wanted = packed(prefilled.tokens)
        n_tokens = common_tokens(packed(sequence.tokens), wanted)
        if self._is_private or n_tokens < self._min_tokens:
            return
        key = StateKey.of(model, sequence.settings)
        candidates = list(self._candidates(key, packed(prefilled.tokens[:n_tokens])))
        if candidates and n_tokens - candidates[0].n_common < self._min_tokens:
            return
        sequence.truncate(n_tokens)
        size = sequence.state_bytes + len(packed(sequence.tokens)) + _MAX_BESIDE_STATE
        try:
            self.folder.make_room(size)
            if size >= self._many_bytes:
                yield f"keeping {n_tokens:,} prefilled tokens for the next question ({binary_size(size)})."
            self._write(sequence, key, prefilled)
        except (NoRoom, OSError, QwqError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            yield f"what was prefilled is not kept for the next question: {binary_size(size)}, {why}."
            return
        for candidate in candidates:
            # The new entry contains it.
            if candidate.entry.record.n_tokens - candidate.n_common < self._min_tokens:
                remove_quietly(candidate.entry.path)

    def _candidates(self, key: StateKey, wanted: bytes) -> Iterator[_StoredPrefix]:
        """Entries under the key: the longest shared beginning first, of two equal ones the smaller file."""
        found = []
        for entry in self.folder.entries(remove_damaged=not self._is_private):
            if not entry.record.key.matches(key):
                continue
            try:
                found.append(_StoredPrefix(entry, common_tokens(entry.token_bytes(), wanted)))
            except DamagedEntry:
                self._remove(entry)
            except OSError:
                continue
        yield from sorted(found, key=lambda each: (-each.n_common, each.entry.file_bytes))

    def _is_verified(self, entry: Entry, abort: AbortFlag) -> bool:
        try:
            entry.verify(abort)
        except DamagedEntry:
            self._remove(entry)
            return False
        except OSError:
            return False
        return True

    def _read(self, sequence: CachedSequence, entry: Entry) -> bool:
        if not self._is_private:
            _touch(entry.path)
        return sequence.read_state(entry.path, entry.record.n_tokens)

    def _write(self, sequence: CachedSequence, key: StateKey, prefilled: Prefilled) -> None:
        with self.folder.new_file() as path:
            n_bytes = sequence.write_state(path)
            tokens = packed(sequence.tokens)
            record = EntryRecord(
                key=key,
                label=clean_label(prefilled.label),
                n_tokens=len(sequence.tokens),
                prefill_token_s=float(prefilled.token_s),
                state_bytes=n_bytes,
                checksum=checksum(path, n_bytes),
            )
            append_trailer(path, record)
            path.replace(self.folder.path / entry_name(key, tokens))

    def _remove(self, entry: Entry) -> None:
        if not self._is_private:
            remove_quietly(entry.path)


def _pays(candidate: _StoredPrefix, held: int) -> bool:
    """Whether reading the entry is faster than prefilling the tokens that the sequence lacks."""
    gained = candidate.n_common - held
    if gained <= 0:
        return False
    record = candidate.entry.record
    if record.prefill_token_s == 0:
        return True
    return gained * record.prefill_token_s > record.state_bytes / _READ_BYTES_PER_S
