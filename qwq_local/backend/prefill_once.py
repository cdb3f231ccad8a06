"""What a backend asks before and after a turn, so that a text is prefilled once and not with every question.

It joins the KV store to the identity of the model file. `restore` comes before the turn, `keep` after its
answer is out: writing takes time, and nobody should wait for it. Only the last turn can be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwq_local.engine.api import AbortFlag
from qwq_local.engine.context import CachedSequence
from qwq_local.engine.kv_entry import ModelIdentity
from qwq_local.engine.kv_store import KvStore, Prefilled, kv_folder
from qwq_local.events import Event, Finished, FinishReason, Notice
from qwq_local.models.architecture import model_name
from qwq_local.models.header import Header
from qwq_local.models.identity import ModelIdentities
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class _LastTurn:
    sequence: CachedSequence
    header: Header
    prefilled: Prefilled


class PrefillOnce:
    """The store of a user's cache, as the profile sets it; `is_private` reads it and leaves no trace."""

    def __init__(self, cache: Path, profile: Profile, *, is_private: bool = False) -> None:
        self._cache = cache
        self._is_private = is_private
        self.adopt(profile)
        self._identities = ModelIdentities(cache / "identities")
        self._last: _LastTurn | None = None

    def adopt(self, profile: Profile) -> None:
        """Keep what another profile says from now on, as far as it says."""
        self._is_on = profile.kv_store != 0
        folder = kv_folder(self._cache, profile.kv_store)
        min_tokens = profile.kv_store_min_tokens
        self._store = KvStore(folder, min_tokens=min_tokens, is_private=self._is_private)

    def identity(self, header: Header) -> ModelIdentity:
        """Which weights they are, whether anything is kept or not. Raises OSError when a file is gone."""
        return self._identities.of(header)

    def restore(
        self, sequence: CachedSequence, header: Header, prompt: Sequence[int], abort: AbortFlag
    ) -> Iterator[Notice]:
        """Give the context what is stored of the prompt, if that is more than it holds. Raises Aborted."""
        self._last = None
        if (model := self._identity(header)) is None:
            return
        if not self._is_private:
            self._identities.learn(header)
        yield from map(Notice, self._store.restore(sequence, model, prompt, abort))

    def noted(
        self, events: Iterable[Event], sequence: CachedSequence, header: Header, prompt: Sequence[int]
    ) -> Iterator[Event]:
        """The events of a turn as they come; at their end it is one that can be kept.

        Kept is the prompt: the next one has no thinking, so it parts from the cache before the first token of
        it. A turn that was stopped may be gone on with: it is kept whole.
        """
        for event in events:
            if isinstance(event, Finished):
                rate = event.stats.prefill_rate
                is_stopped = event.reason is FinishReason.INTERRUPTED
                tokens = tuple(sequence.tokens) if is_stopped else prompt
                prefilled = Prefilled(tokens, 1 / rate if rate else 0.0, model_name(header))
                self._last = _LastTurn(sequence, header, prefilled)
            yield event

    def keep(self) -> Iterator[Notice]:
        """Store what the last turn prefilled.

        The context must still be the one of that turn. Of a turn that came to its end it drops what followed
        the prompt, which no next prompt would begin with.
        """
        last, self._last = self._last, None
        if last is not None and (model := self._identity(last.header)) is not None:
            yield from map(Notice, self._store.keep(last.sequence, model, last.prefilled))

    def forget(self) -> None:
        """There is no last turn any more: its context is gone."""
        self._last = None

    def close(self) -> None:
        """Stop what runs in the background."""
        self._last = None
        self._identities.close()

    def _identity(self, header: Header) -> ModelIdentity | None:
        """Which weights they are; nothing when the store is off, or the file was moved away meanwhile."""
        if self._is_on:
            with suppress(OSError):
                return self._identities.of(header)
        return None
