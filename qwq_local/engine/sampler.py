"""Sampler settings in, a llama.cpp sampler chain out, its steps in the order that the settings name.

A step at its neutral value is left out. A temperature of 0 is greedy: only the penalties come before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwq_local.engine.api import SamplerSettings
from qwq_local.engine.library import library

# Where DRY's repeated sequences must not reach across; llama.cpp's own defaults.
DRY_BREAKERS = (b"\n", b":", b'"', b"*")
_MIN_KEEP = 1


class SamplerChain:
    """A chain of sampling steps over the logits of a context; free it with `close`."""

    def __init__(self, settings: SamplerSettings, vocab: Any, n_vocab: int, n_ctx: int) -> None:
        self._lib = library()
        self.handle = self._lib.llama_sampler_chain_init(self._lib.llama_sampler_chain_default_params())
        windows = _windows(settings, n_ctx)
        makers = self._makers(settings, vocab, n_vocab, windows)
        self._memories: list[tuple[Any, int]] = []  # what looks back, and how many tokens
        greedy = settings.temperature == 0
        for step in settings.sampler_order:
            if greedy and step not in windows:
                continue
            made = makers[step]()
            if made is not None:
                self._lib.llama_sampler_chain_add(self.handle, made)
                if step in windows:
                    self._memories.append((made, windows[step]))
        last = self._lib.llama_sampler_init_greedy() if greedy else self._dist(settings.seed)
        self._lib.llama_sampler_chain_add(self.handle, last)

    @property
    def steps(self) -> list[str]:
        """The names of the steps in the chain, first to last."""
        count = self._lib.llama_sampler_chain_n(self.handle)
        members = (self._lib.llama_sampler_chain_get(self.handle, i) for i in range(count))
        return [self._lib.llama_sampler_name(member).decode() for member in members]

    def remember(self, tokens: Sequence[int]) -> None:
        """Make penalties and DRY look back at these tokens alone; the seed continues."""
        for step, window in self._memories:
            self._lib.llama_sampler_reset(step)
            for token in tokens[max(0, len(tokens) - window) :]:
                self._lib.llama_sampler_accept(step, token)

    def close(self) -> None:
        """Free the chain; closing twice is harmless."""
        if self.handle is not None:
            self._lib.llama_sampler_free(self.handle)
            self.handle = None
            self._memories.clear()

    def _dist(self, seed: int) -> Any:
        return self._lib.llama_sampler_init_dist(seed & 0xFFFFFFFF)

    def _makers(
        self, settings: SamplerSettings, vocab: Any, n_vocab: int, windows: Mapping[str, int]
    ) -> dict[str, Callable[[], Any]]:
        lib, s = self._lib, settings
        penalty_window, dry_window = windows["penalties"], windows["dry"]
        penalized = s.repeat_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0
        breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
        return {
            "penalties": lambda: (
                lib.llama_sampler_init_penalties(
                    n_vocab, penalty_window, s.repeat_penalty, s.frequency_penalty, s.presence_penalty
                )
                if penalized and penalty_window
                else None
            ),
            "dry": lambda: (
                lib.llama_sampler_init_dry(
                    vocab,
                    s.dry_multiplier,
                    s.dry_base,
                    s.dry_allowed_length,
                    dry_window,
                    breakers,
                    len(breakers),
                )
                if s.dry_multiplier and dry_window
                else None
            ),
            "top_k": lambda: lib.llama_sampler_init_top_k(s.top_k) if s.top_k > 0 else None,
            "top_p": lambda: lib.llama_sampler_init_top_p(s.top_p, _MIN_KEEP) if s.top_p < 1 else None,
            "min_p": lambda: lib.llama_sampler_init_min_p(s.min_p, _MIN_KEEP) if s.min_p > 0 else None,
            "typical": lambda: (
                lib.llama_sampler_init_typical(s.typical, _MIN_KEEP) if s.typical < 1 else None
            ),
            "xtc": lambda: (
                lib.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, _MIN_KEEP, s.seed & 0xFFFFFFFF)
                if s.xtc_probability > 0
                else None
            ),
            "temperature": lambda: lib.llama_sampler_init_temp(s.temperature) if s.temperature != 1 else None,
        }


def _windows(settings: SamplerSettings, n_ctx: int) -> dict[str, int]:
    """How many tokens each step that has a memory looks back at.

    A window of -1 means the whole context; llama.cpp itself would take it as none.
    """
    windows = {"penalties": settings.penalty_window, "dry": settings.dry_window}
    return {step: n_ctx if window < 0 else window for step, window in windows.items()}
