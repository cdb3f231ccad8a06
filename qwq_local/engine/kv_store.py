"""Prefill once: what a context has prefilled is kept on disk, and the next one that needs it reads it back.

Comes in: a context, the identity of its model, the tokens of a prompt. Goes out: a context that holds the
longest stored beginning of that prompt. An entry is read only when the model, rope scaling, KV types, flash
attention and library version are the same and its checksum holds; the rest of it, past the common beginning,
is cut off by the next prefill. Devices and batch sizes are not part of the key: they move the last bits, as
they do from one prefill to another.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from qwq_local.engine.api import AbortFlag
from qwq_local.engine.checksum import checksum
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.kv_entry import (
    MAX_TRAILER_BYTES,
    DamagedEntry,
    Entry,
    ModelIdentity,
    Record,
    StateKey,
    append_trailer,
    clean_label,
    common_tokens,
    entry_name,
    packed,
)
from qwq_local.engine.kv_folder import KvFolder, NoRoom, touch
from qwq_local.errors import QwqError
from qwq_local.files import remove_quietly
from qwq_local.text import binary_size

# What reading and the checksum come to on a usual computer: it must beat prefilling.
_READ_BYTES_PER_S = 5e8
DEFAULT_MIN_TOKENS = 1024
# The head of llama.cpp's file and our trailer.
_MAX_BESIDE_STATE = 16 + MAX_TRAILER_BYTES
_MANY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What was prefilled for a prompt: its tokens, the seconds one of them took, the model's name."""

    tokens: Sequence[int]
    token_s: float = 0.0
    label: str = ""


@dataclass(frozen=True, slots=True)
class _Candidate:
    entry: Entry
    n_common: int


class KvStore:
    """Reads and writes the KV cache of contexts; `is_private` reads only, and leaves no trace of it.

    Both ways yield lines for the user: that it will take a while, or that it went wrong.
    """

    def __init__(
        self,
        folder: KvFolder,
        *,
        min_tokens: int = DEFAULT_MIN_TOKENS,
        is_private: bool = False,
        many_bytes: int = _MANY_BYTES,
    ) -> None:
        """`min_tokens` is how many tokens must have been prefilled, and not stored, to be worth a file.

        From `many_bytes` on, reading and writing are announced.
        """
        self.folder = folder
        self._min_tokens = min_tokens
        self._is_private = is_private
        self._many_bytes = many_bytes

    def restore(
        self, context: LlamaContext, model: ModelIdentity, prompt: Sequence[int], abort: AbortFlag
    ) -> Generator[str, None, int]:
        """Make the context hold the longest stored beginning of the prompt; returns what it now has of it.

        Nothing is read when the context itself holds as much, or prefilling would be as quick. Never fails:
        what cannot be read is not there. Raises Aborted.
        """
        wanted = packed(prompt)
        for candidate in self._candidates(StateKey.of(model, context.settings), wanted):
            held = common_tokens(packed(context.tokens), wanted)
            entry = candidate.entry
            if entry.record.n_tokens > context.settings.n_ctx or not _pays(candidate, held):
                continue
            if entry.file_bytes >= self._many_bytes:
                yield f"reading {entry.record.n_tokens:,} prefilled tokens ({binary_size(entry.file_bytes)})."
            if self._is_verified(entry, abort) and self._read(context, entry):
                break
        return common_tokens(packed(context.tokens), wanted)

    def keep(self, context: LlamaContext, model: ModelIdentity, prefilled: Prefilled) -> Iterator[str]:
        """Store the beginning of the prompt that the context holds.

        What the context holds beyond the prompt is dropped from it. Nothing is written when fewer than
        `min_tokens` tokens of it are not stored yet.
        """
        wanted = packed(prefilled.tokens)
        n_tokens = common_tokens(packed(context.tokens), wanted)
        if self._is_private or n_tokens < self._min_tokens:
            return
        key = StateKey.of(model, context.settings)
        candidates = list(self._candidates(key, packed(prefilled.tokens[:n_tokens])))
        if candidates and n_tokens - candidates[0].n_common < self._min_tokens:
            return
        context.truncate(n_tokens)
        size = context.state_bytes + len(packed(context.tokens)) + _MAX_BESIDE_STATE
        try:
            self.folder.make_room(size)
            if size >= self._many_bytes:
                yield f"keeping {n_tokens:,} prefilled tokens for the next question ({binary_size(size)})."
            self._write(context, key, prefilled)
        except (NoRoom, OSError, QwqError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            yield f"what was prefilled is not kept for the next question: {binary_size(size)}, {why}."
            return
        for candidate in candidates:
            # What the new entry has too is not kept twice.
            if candidate.entry.record.n_tokens - candidate.n_common < self._min_tokens:
                remove_quietly(candidate.entry.path)

    def _candidates(self, key: StateKey, wanted: bytes) -> Iterator[_Candidate]:
        """Entries under the key, the longest common beginning first, of equals the smallest file."""
        found = []
        for entry in self.folder.entries(remove_damaged=not self._is_private):
            if not entry.record.key.matches(key):
                continue
            try:
                found.append(_Candidate(entry, common_tokens(entry.token_bytes(), wanted)))
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

    def _read(self, context: LlamaContext, entry: Entry) -> bool:
        if not self._is_private:
            touch(entry.path)
        return context.read_state(entry.path, entry.record.n_tokens)

    def _write(self, context: LlamaContext, key: StateKey, prefilled: Prefilled) -> None:
        with self.folder.new_file() as path:
            n_bytes = context.write_state(path)
            tokens = packed(context.tokens)
            record = Record(
                key=key,
                label=clean_label(prefilled.label),
                n_tokens=len(context.tokens),
                prefill_token_s=float(prefilled.token_s),
                state_bytes=n_bytes,
                checksum=checksum(path, n_bytes),
            )
            append_trailer(path, record)
            path.replace(self.folder.path / entry_name(key, tokens))

    def _remove(self, entry: Entry) -> None:
        if not self._is_private:
            remove_quietly(entry.path)


def _pays(candidate: _Candidate, held: int) -> bool:
    """Whether reading the entry takes less time than prefilling what the context lacks of it."""
    gained = candidate.n_common - held
    if gained <= 0:
        return False
    record = candidate.entry.record
    if record.prefill_token_s == 0:
        return True
    return gained * record.prefill_token_s > record.state_bytes / _READ_BYTES_PER_S
