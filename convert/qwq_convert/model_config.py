"""config.json in, the figures of a model out, checked against each other.

Knows neither tensors nor GGUF. What llama.cpp would answer with an abort is refused here with a message.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_convert.architecture import Architecture
from qwq_convert.architectures import find_architecture
from qwq_convert.strict_json import Fields, shown

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS: more aborts the process
MAX_DIMENSION = 2**24  # so that one row of any tensor stays a small piece of memory
MAX_VOCABULARY = 2**22


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """How the checkpoint stretches its positions: `kind` is "linear" or "yarn"."""

    kind: str
    factor: float
    original_context: int | None
    extrapolation_factor: float | None
    attention_factor: float | None
    beta_fast: float | None
    beta_slow: float | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture, and the figures that tensors and key-values of the GGUF depend on."""

    architecture: Architecture
    n_layers: int
    n_ctx: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    states_head_dim: bool
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeParameters | None
    tied: bool

    @property
    def kv_size(self) -> int:
        """Rows of the K and the V projection."""
        return self.n_kv_heads * self.head_dim


def read_config(config: Fields) -> ModelConfig:
    """The figures of `config`; ConvertError for another architecture or figures that contradict."""
    architecture = find_architecture(config)
    _check_supported(config)
    n_heads = config.integer("num_attention_heads", 1, MAX_DIMENSION)
    n_kv_heads = config.integer("num_key_value_heads", 1, MAX_DIMENSION)
    hidden_size = config.integer("hidden_size", 1, MAX_DIMENSION)
    head_dim = config.optional_integer("head_dim", 1, MAX_DIMENSION)
    if n_heads % n_kv_heads:
        config.fail(f"{n_heads} attention heads do not divide among {n_kv_heads} key-value heads.")
    # llama.cpp's qwen2 has an attn_output of hidden_size x hidden_size, and rotates pairs.
    if hidden_size != n_heads * (head_dim or hidden_size // n_heads) or hidden_size // n_heads % 2:
        config.fail(f"hidden_size {hidden_size} is not {n_heads} heads of an even head_dim.")
    rope = config.optional_object("rope_parameters") or config.optional_object("rope_scaling")
    return ModelConfig(
        architecture=architecture,
        n_layers=config.integer("num_hidden_layers", 1, MAX_LAYERS),
        n_ctx=config.integer("max_position_embeddings", 1),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", 1, MAX_DIMENSION),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=hidden_size // n_heads,
        states_head_dim=head_dim is not None,
        vocab_size=config.integer("vocab_size", 1, MAX_VOCABULARY),
        rms_norm_eps=config.positive("rms_norm_eps"),
        rope_theta=_rope_theta(config, rope),
        rope_scaling=_rope_scaling(config, rope),
        tied=config.flag("tie_word_embeddings"),
    )


def _check_supported(config: Fields) -> None:
    if config.values.get("quantization_config") is not None:
        config.fail("the weights are quantized already. Use the original F32, F16 or BF16 checkpoint.")
    if (activation := config.optional_text("hidden_act")) not in (None, "silu"):
        config.fail(f"hidden_act {shown(activation)} is not supported, only silu is.")


def _rope_theta(config: Fields, rope: Fields | None) -> float:
    # transformers 5 moved rope_theta from the root into rope_parameters.
    if rope is not None and rope.values.get("rope_theta") is not None:
        return rope.positive("rope_theta")
    return config.positive("rope_theta")


def _rope_scaling(config: Fields, rope: Fields | None) -> RopeParameters | None:
    if rope is None:
        return None
    kind = rope.optional_text("rope_type") or rope.optional_text("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "yarn"):
        rope.fail(f"rope type {shown(kind)} is not supported, only linear and yarn are.")
    original = rope.optional_integer("original_max_position_embeddings", 1)
    if original is None:
        original = config.optional_integer("original_max_position_embeddings", 1)
    if kind == "yarn" and original is None:
        rope.fail("original_max_position_embeddings is missing; for QwQ-32B it is 32768.")
    attention_factor = rope.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = rope.optional_number("attn_factor")
    return RopeParameters(
        kind=kind,
        factor=rope.positive("factor"),
        original_context=original if kind == "yarn" else None,
        extrapolation_factor=rope.optional_number("extrapolation_factor"),
        attention_factor=attention_factor,
        beta_fast=rope.optional_number("beta_fast"),
        beta_slow=rope.optional_number("beta_slow"),
    )
