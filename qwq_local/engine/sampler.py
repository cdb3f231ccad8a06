"""Sampler settings in, a llama.cpp sampler chain out, its steps in the order that the settings name.

A step at its neutral value is left out. A temperature of 0 is greedy: only the penalties come before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from qwq_local.engine.api import SamplerSettings
from qwq_local.engine.library import library

# Where DRY's repeated sequences must not reach across; llama.cpp's own defaults.
DRY_BREAKERS = (b"\n", b":", b'"', b"*")
_MIN_KEEP = 1
_WITH_MEMORY = ("penalties", "dry")


class SamplerChain:
    """A chain of sampling steps over the logits of a context; free it with `close`."""

    def __init__(self, settings: SamplerSettings, vocab: Any, n_vocab: int, n_ctx: int) -> None:
        self._lib = library()
        self.handle = self._lib.llama_sampler_chain_init(self._lib.llama_sampler_chain_default_params())
        makers = self._makers(settings, vocab, n_vocab, n_ctx)
        self.remembers = False
        """Whether what was sampled before changes what is sampled next."""
        greedy = settings.temperature == 0
        for step in settings.order:
            if greedy and step not in _WITH_MEMORY:
                continue
            made = makers[step]()
            if made is not None:
                self._lib.llama_sampler_chain_add(self.handle, made)
                self.remembers |= step in _WITH_MEMORY
        last = self._lib.llama_sampler_init_greedy() if greedy else self._dist(settings.seed)
        self._lib.llama_sampler_chain_add(self.handle, last)

    @property
    def steps(self) -> list[str]:
        """The names of the steps in the chain, first to last."""
        count = self._lib.llama_sampler_chain_n(self.handle)
        members = (self._lib.llama_sampler_chain_get(self.handle, i) for i in range(count))
        return [self._lib.llama_sampler_name(member).decode() for member in members]

    def close(self) -> None:
        """Free the chain; closing twice is harmless."""
        if self.handle is not None:
            self._lib.llama_sampler_free(self.handle)
            self.handle = None

    def _dist(self, seed: int) -> Any:
        return self._lib.llama_sampler_init_dist(seed & 0xFFFFFFFF)

    def _makers(
        self, settings: SamplerSettings, vocab: Any, n_vocab: int, n_ctx: int
    ) -> dict[str, Callable[[], Any]]:
        lib, s = self._lib, settings
        # A window of -1 means the whole context; llama.cpp itself would take it as none.
        penalty_window = n_ctx if s.penalty_window < 0 else s.penalty_window
        dry_window = n_ctx if s.dry_window < 0 else s.dry_window
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
