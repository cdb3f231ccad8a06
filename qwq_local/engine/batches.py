"""How many prompt tokens go into one llama_decode, so that the user is heard soon enough."""

from __future__ import annotations

LONGEST_S = 0.25
_FIRST, _SMALLEST = 64, 16


class BatchSizer:
    """The batch size: fixed, or adapted to the measured speed so that one batch takes LONGEST_S at most."""

    def __init__(self, n_batch: int, *, adaptive: bool) -> None:
        self._n_batch = n_batch
        self._adaptive = adaptive
        self.size = min(_FIRST, n_batch) if adaptive else n_batch

    def measured(self, n_tokens: int, elapsed_s: float) -> None:
        """Take note of a batch; the next is at most twice as large."""
        if not self._adaptive or n_tokens < min(self.size, _SMALLEST):
            return
        fitting = int(n_tokens * LONGEST_S / max(elapsed_s, 1e-6))
        self.size = max(min(_SMALLEST, self._n_batch), min(fitting, self.size * 2, self._n_batch))
