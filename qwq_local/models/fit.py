"""Free memory and a model's size in, how many tokens of context fit out.

A plain estimate, until a plan of the real buffers replaces it: weights, KV cache and a reserve for everything
else, all in one memory. Block sizes: ggml-common.h; the reserve is what llama.cpp took on a 24 GB card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwq_local.models.architecture import Shape

COMPUTE_RESERVE_BYTES = int(0.8 * 1024**3)
GRANULE = 256
LEAST_CONTEXT = 16_384
# Bytes of a block of 32 values; f16 counts as one such block.
_BLOCK_OF_32: Mapping[str, int] = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}
QWQ_32B = Shape(64, 5120, 27648, 40, 8, 152064, 131072)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model may take, and where, in words for the user."""

    free_bytes: int
    place: str


@dataclass(frozen=True, slots=True)
class Fit:
    """What a machine gives a model: memory and the KV cache's type.

    `native` is the window of the model as trained, `window` what YaRN can stretch it to.
    """

    memory: Memory
    kv_type: str
    native: int
    window: int

    def context(self, weight_bytes: int, shape: Shape = QWQ_32B) -> int:
        """The tokens of context that fit beside the weights, 0 when not even the weights do."""
        left = self.memory.free_bytes - weight_bytes - COMPUTE_RESERVE_BYTES
        tokens = left // kv_bytes_per_token(shape, self.kv_type)
        # A header says more than was trained, never less: then it is another, smaller model.
        window = self.window if shape.context_length >= self.native else shape.context_length
        return max(0, min(tokens, window) // GRANULE * GRANULE)


def kv_bytes_per_token(shape: Shape, kv_type: str) -> int:
    """The bytes of K and V in all layers for one token. `kv_type` as in a profile."""
    values = shape.n_layers * shape.n_kv_heads * shape.head_dim * 2
    return values * _BLOCK_OF_32[kv_type] // 32
