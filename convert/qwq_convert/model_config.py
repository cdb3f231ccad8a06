"""The config.json of a checkpoint. What would make llama.cpp abort is refused with a message."""

from __future__ import annotations

from dataclasses import dataclass

from qwq_convert.architecture import FIGURES, Architecture, ModelShape, shape_of
from qwq_convert.architectures import architectures
from qwq_convert.strict_json import Fields, shown

MAX_HEAD_DIM = 1 << 14
MAX_VOCABULARY = 1 << 22


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
    """The shape of a model and what else of config.json its tensors and key-values depend on.

    `states_head_dim` says that config.json has a head_dim, `tied` that lm_head.weight may be missing.
    """

    shape: ModelShape
    states_head_dim: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeParameters | None
    tied: bool


def read_config(config: Fields) -> ModelConfig:
    """Read `config`. Raises ConvertError for another architecture or figures that contradict each other."""
    architecture = _architecture(config)
    _check_supported(config)
    figures = {figure.field: config.integer(figure.config_key, 1, figure.most) for figure in FIGURES}
    head_dim = config.optional_integer("head_dim", 1, MAX_HEAD_DIM)
    n_vocab = config.integer("vocab_size", 1, MAX_VOCABULARY)
    try:
        shape = shape_of(architecture, figures, head_dim, n_vocab)
    except ValueError as error:
        config.fail(f"{error}.")
    rope = config.optional_object("rope_parameters") or config.optional_object("rope_scaling")
    return ModelConfig(
        shape=shape,
        states_head_dim=head_dim is not None,
        rms_norm_eps=config.positive("rms_norm_eps"),
        rope_theta=_rope_theta(config, rope),
        rope_scaling=_rope_scaling(config, rope),
        tied=config.flag("tie_word_embeddings"),
    )


def _architecture(config: Fields) -> Architecture:
    names = config.items("architectures")
    by_class_name = {architecture.class_name: architecture for architecture in architectures()}
    match names:
        case [str() as class_name] if class_name in by_class_name:
            return by_class_name[class_name]
        case [other]:
            text = shown(other)
        case _:
            text = shown(names)
    return config.fail(f"architecture {text} is not supported, only {', '.join(by_class_name)}.")


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
