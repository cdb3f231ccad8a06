"""What turns took on this machine: their figures in, rates for the estimate of later ones out.

One small file of JSON in the cache, by what decides the speed: the weights and where they lie, the threads,
the KV type, and the length of the prompt in powers of two. Later turns weigh more than earlier ones. Whatever
is lost or unreadable is measured again. Knows no texts and no names of files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from qwq_local.errors import QwqError
from qwq_local.events import Event, Finished, FinishReason, Planned, TurnStats
from qwq_local.paths import make_private
from qwq_local.planning.rates import Rates

FILE = "rates.json"
_FORMAT = 1
_MAX_BYTES = 2**18
_MAX_KEYS = 500
# What an earlier turn still counts when another one is added: about the last eight decide.
_FADING = 7 / 8
# A prompt within this many powers of two of a measured one is read and answered about as fast.
_NEAR = 2


@dataclass(frozen=True, slots=True)
class _Tally:
    """Tokens read and written, the seconds that took, and the turns that wrote; all of them fading."""

    read: float = 0.0
    read_s: float = 0.0
    written: float = 0.0
    written_s: float = 0.0
    turns: float = 0.0

    def with_turn(self, stats: TurnStats) -> _Tally:
        """The same with a turn more; reading counts where most of the prompt was read, not found cached."""
        read, read_s = self.read, self.read_s
        computed = stats.prompt_tokens - stats.cached_tokens
        if not stats.resumed_tokens and 2 * computed >= stats.prompt_tokens and stats.prefill_s > 0:
            read, read_s = read * _FADING + computed, read_s * _FADING + stats.prefill_s
        return _Tally(
            read,
            read_s,
            self.written * _FADING + stats.thinking_tokens + stats.answer_tokens - stats.resumed_tokens,
            self.written_s * _FADING + stats.decode_s,
            self.turns * _FADING + 1,
        )

    @property
    def rates(self) -> Rates | None:
        """The rates it comes to, where both kinds were measured."""
        if min(astuple(self)) <= 0:
            return None
        return Rates(self.read / self.read_s, self.written / self.written_s, self.written / self.turns, True)


class MeasuredRates:
    """The rates kept in a user's cache folder; with `is_private` they are used and nothing is added."""

    def __init__(self, cache: Path, *, is_private: bool = False) -> None:
        self._path = cache / FILE
        self._is_private = is_private
        self._new: list[tuple[str, TurnStats]] = []

    def noted(self, events: Iterable[Event], planned: Planned, threads: int) -> Iterator[Event]:
        """The events of a turn as they come; at their end it is taken in, and on disk only after `save`."""
        for event in events:
            if isinstance(event, Finished) and event.reason is not FinishReason.INTERRUPTED:
                key = f"{_setting(planned, threads)}:{_size(planned.prompt_tokens)}"
                self._new.append((key, event.stats))
            yield event

    def of(self, planned: Planned, threads: int) -> Rates | None:
        """What turns like the planned one took here, of the nearest length; None when there were none."""
        tallies, setting, size = self._with_new(), _setting(planned, threads), _size(planned.prompt_tokens)
        for distance in range(_NEAR + 1):
            for near in (size + distance, size - distance):
                tally = tallies.get(f"{setting}:{near}")
                if tally is not None and (rates := tally.rates) is not None:
                    return rates
        return None

    def save(self) -> None:
        """Write what was noted; a cache that cannot be written keeps nobody from anything."""
        if not self._new or self._is_private:
            return
        tallies = list(self._with_new().items())[-_MAX_KEYS:]
        text = json.dumps({"format": _FORMAT, "rates": {key: astuple(tally) for key, tally in tallies}})
        beside = self._path.with_suffix(f".{os.getpid()}.new")
        with suppress(OSError, QwqError):
            make_private(self._path.parent)
            try:
                beside.write_text(text, encoding="ascii")
                beside.replace(self._path)
            finally:
                beside.unlink(missing_ok=True)
        self._new.clear()

    def _with_new(self) -> dict[str, _Tally]:
        """Everything by key, what was used last at the end."""
        tallies = self._read()
        for key, stats in self._new:
            tallies[key] = tallies.pop(key, _Tally()).with_turn(stats)
        return tallies

    def _read(self) -> dict[str, _Tally]:
        try:
            if self._path.stat().st_size > _MAX_BYTES:
                return {}
            content = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return {}
        kept = content.get("rates")
        found = kept.items() if isinstance(kept, Mapping) else ()
        return {key: tally for key, figures in found if (tally := _tally(figures)) is not None}


def _tally(figures: object) -> _Tally | None:
    """A tally from JSON; nothing for anything but five finite amounts."""
    if not isinstance(figures, list) or len(figures) != 5:
        return None
    if not all(isinstance(each, float | int) and 0 <= each < math.inf for each in figures):
        return None
    return _Tally(*map(float, figures))


def _setting(planned: Planned, threads: int) -> str:
    """What decides the speed but the prompt, as a short digest."""
    places = [(device.name, device.weights) for device in planned.devices]
    told = (planned.model, places, planned.n_gpu_layers, planned.kv_type, planned.n_ubatch, threads)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _size(prompt_tokens: int) -> int:
    return max(prompt_tokens, 1).bit_length()
