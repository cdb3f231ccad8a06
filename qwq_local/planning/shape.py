"""The sizes that plans are made of: the bytes of a model's layers, the shape of a context, KV types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qwq_convert.architecture import ModelShape

# llama.cpp pads the KV cache to this many tokens.
GRANULE = 256


@dataclass(frozen=True, slots=True)
class KvType:
    """A type of KV cache: its number in ggml's enum ggml_type, a block's values and its bytes."""

    ggml: int
    block_values: int
    block_bytes: int


KV_TYPES: Mapping[str, KvType] = MappingProxyType(
    {
        "f16": KvType(1, 1, 2),
        "bf16": KvType(30, 1, 2),
        "f32": KvType(0, 1, 4),
        "q8_0": KvType(8, 32, 34),
        "q5_1": KvType(7, 32, 24),
        "q5_0": KvType(6, 32, 22),
        "q4_1": KvType(3, 32, 20),
        "q4_0": KvType(2, 32, 18),
        "iq4_nl": KvType(20, 32, 18),
    }
)


def is_quantized(kv_type: str) -> bool:
    """Whether the type stores blocks; such a V cache needs flash attention."""
    return KV_TYPES[kv_type].block_values > 1


def can_store(shape: ModelShape, kv_type: str) -> bool:
    """Whether a head divides into the blocks of a KV type."""
    return shape.head_dim % KV_TYPES[kv_type].block_values == 0


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model file in bytes: each layer, what comes before the layers, and what comes after them.

    `tied_bytes` is what the output needs again on a GPU when it shares the embedding's tensor.
    """

    shape: ModelShape
    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    tied_bytes: int = 0
    file_type: str = ""

    @property
    def total_bytes(self) -> int:
        """All tensors of the file."""
        return self.input_bytes + sum(self.layer_bytes) + self.output_bytes

    @property
    def n_offloadable(self) -> int:
        """What n_gpu_layers counts: the layers, and the output as one more."""
        return self.shape.n_layers + 1


@dataclass(frozen=True, slots=True)
class ContextShape:
    """What of a context takes memory: `n_ubatch` tokens are computed at once."""

    n_ctx: int
    n_batch: int = 512
    n_ubatch: int = 512
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True

    @property
    def padded_n_ctx(self) -> int:
        """The tokens that the KV cache really has room for."""
        return padded(self.n_ctx)

    @property
    def n_tokens(self) -> int:
        """Tokens of the largest batch that is computed at once."""
        return min(self.n_ubatch, self.n_batch, self.n_ctx)


def padded(n_tokens: int) -> int:
    """The next number of tokens that llama.cpp makes a KV cache for."""
    return -(-n_tokens // GRANULE) * GRANULE


def kv_layer_bytes(shape: ModelShape, context: ContextShape) -> int:
    """Bytes of one layer's keys and values over the whole context."""
    return context.padded_n_ctx * kv_token_bytes(shape, context.kv_type_k, context.kv_type_v)


def kv_token_bytes(shape: ModelShape, kv_type_k: str, kv_type_v: str) -> int:
    """Bytes of one token's key and value in one layer."""
    total = 0
    for kv_type in (kv_type_k, kv_type_v):
        kind = KV_TYPES[kv_type]
        total += shape.kv_width // kind.block_values * kind.block_bytes
    return total
