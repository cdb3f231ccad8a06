"""The prefill cache: a text is read once, and later replies, also of other processes, take it from disk.

It joins the KV store to the identity of the model file. `restore` runs before a reply. `keep` runs after the
answer is out, because writing takes time. Only the last reply can be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwq_local.engine.context import CachedSequence
from qwq_local.engine.kv_entry import ModelIdentity
from qwq_local.engine.kv_store import KvStore, Prefilled, kv_folder
from qwq_local.errors import AbortFlag
from qwq_local.events import Event, Finished, FinishReason, Notice
from qwq_local.models.architecture import model_name
from qwq_local.models.header import Header
from qwq_local.models.identity import ModelIdentities
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class _LastReply:
    sequence: CachedSequence
    header: Header
    prefilled: Prefilled


class PrefillCache:
    """The KV store under a cache folder, as the profile sets it; `is_private` reads and never writes."""

    def __init__(self, cache: Path, profile: Profile, *, is_private: bool = False) -> None:
        self._cache = cache
        self._is_private = is_private
        self.adopt(profile)
        self._identities = ModelIdentities(cache / "identities")
        self._last: _LastReply | None = None

    def adopt(self, profile: Profile) -> None:
        """Use the limits of another profile."""
        self._is_on = profile.kv_store != 0
        folder = kv_folder(self._cache, profile.kv_store)
        min_tokens = profile.kv_store_min_tokens
        self._store = KvStore(folder, min_tokens=min_tokens, is_private=self._is_private)

    def identity(self, header: Header) -> ModelIdentity:
        """Which weights they are. Raises OSError when a file is gone."""
        return self._identities.of(header)

    def restore(
        self, sequence: CachedSequence, header: Header, prompt: Sequence[int], abort: AbortFlag
    ) -> Iterator[Notice]:
        """Load what is stored of the prompt, if that is more than the sequence holds. Raises Aborted."""
        self._last = None
        if (model := self._identity(header)) is None:
            return
        if not self._is_private:
            self._identities.learn(header)
        yield from map(Notice, self._store.restore(sequence, model, prompt, abort))

    def noted(
        self, events: Iterable[Event], sequence: CachedSequence, header: Header, prompt: Sequence[int]
    ) -> Iterator[Event]:
        """Pass the events of a reply on; after the last one it can be kept.

        Only the prompt is kept: the next prompt leaves the thinking out, so nothing after it matches. A reply
        that was stopped can be continued, so all of it is kept.
        """
        for event in events:
            if isinstance(event, Finished):
                rate = event.stats.prefill_rate
                is_stopped = event.reason is FinishReason.INTERRUPTED
                tokens = tuple(sequence.tokens) if is_stopped else prompt
                prefilled = Prefilled(tokens, 1 / rate if rate else 0.0, model_name(header))
                self._last = _LastReply(sequence, header, prefilled)
            yield event

    def keep(self) -> Iterator[Notice]:
        """Store what the last reply prefilled; the context must still be the same.

        After a reply that reached its end, the sequence is cut back to the prompt.
        """
        last, self._last = self._last, None
        if last is not None and (model := self._identity(last.header)) is not None:
            yield from map(Notice, self._store.keep(last.sequence, model, last.prefilled))

    def forget(self) -> None:
        """Forget the last reply: its context is gone."""
        self._last = None

    def close(self) -> None:
        """Stop hashing the model file in the background."""
        self._last = None
        self._identities.close()

    def _identity(self, header: Header) -> ModelIdentity | None:
        """Which weights they are; None when the store is off or the file is gone."""
        if self._is_on:
            with suppress(OSError):
                return self._identities.of(header)
        return None
