"""How many tokens of context fit beside a model, estimated before the model is downloaded.

The estimate adds the weights, the KV cache and a reserve for everything else, in one memory. The reserve is
what llama.cpp took on a 24 GB card.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_convert.architecture import ModelShape

from qwq_local.models.architecture import QWQ_32B
from qwq_local.planning.shape import GRANULE, kv_token_bytes
from qwq_local.text import GIB

COMPUTE_RESERVE_BYTES = int(0.8 * GIB)
MIN_CONTEXT = 16_384


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes that a model may take, and the name of that memory for the user."""

    free_bytes: int
    place: str


@dataclass(frozen=True, slots=True)
class Fit:
    """The memory for a model, and the type of its KV cache.

    `native` is the trained window in tokens, `window` is the window with YaRN.
    """

    memory: Memory
    kv_type: str
    native: int
    window: int

    def context(self, weight_bytes: int, shape: ModelShape = QWQ_32B) -> int:
        """The tokens of context that fit beside the weights; 0 when the weights do not fit."""
        left = self.memory.free_bytes - weight_bytes - COMPUTE_RESERVE_BYTES
        tokens = left // kv_bytes_per_token(shape, self.kv_type)
        # QwQ's header states more than the trained window. One that states less is of a smaller model.
        window = self.window if shape.context_length >= self.native else shape.context_length
        return max(0, min(tokens, window) // GRANULE * GRANULE)


def kv_bytes_per_token(shape: ModelShape, kv_type: str) -> int:
    """The bytes of K and V in all layers for one token. `kv_type` as in a profile."""
    return shape.n_layers * kv_token_bytes(shape, kv_type, kv_type)
