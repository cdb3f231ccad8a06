"""Qwen2, the architecture of QwQ-32B: names after llama.cpp's qwen2 (gguf-py's tensor_mapping.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import GGUFWriter, RopeScalingType

from qwq_convert.architecture import Architecture

if TYPE_CHECKING:
    from qwq_convert.model_config import ModelConfig, RopeParameters


def add_keys(writer: GGUFWriter, config: ModelConfig) -> None:
    """The figures of a model, in the reference's order."""
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    if config.rope_scaling is not None:
        _add_rope_scaling(writer, config.rope_scaling)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.states_head_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _add_rope_scaling(writer: GGUFWriter, scaling: RopeParameters) -> None:
    writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
    for value, add in (
        (scaling.extrapolation_factor, writer.add_rope_scaling_yarn_ext_factor),
        (scaling.attention_factor, writer.add_rope_scaling_yarn_attn_factor),
        (scaling.beta_fast, writer.add_rope_scaling_yarn_beta_fast),
        (scaling.beta_slow, writer.add_rope_scaling_yarn_beta_slow),
    ):
        if value is not None and scaling.kind == "yarn":
            add(value)


ARCHITECTURE = Architecture(
    class_name="Qwen2ForCausalLM",
    name="qwen2",
    outer_tensors={
        "model.embed_tokens.weight": ("token_embd.weight", ("vocab", "hidden")),
        "model.norm.weight": ("output_norm.weight", ("hidden",)),
        "lm_head.weight": ("output.weight", ("vocab", "hidden")),
    },
    layer_tensors={
        "input_layernorm.weight": ("attn_norm.weight", ("hidden",)),
        "post_attention_layernorm.weight": ("ffn_norm.weight", ("hidden",)),
        "self_attn.q_proj.weight": ("attn_q.weight", ("hidden", "hidden")),
        "self_attn.q_proj.bias": ("attn_q.bias", ("hidden",)),
        "self_attn.k_proj.weight": ("attn_k.weight", ("kv", "hidden")),
        "self_attn.k_proj.bias": ("attn_k.bias", ("kv",)),
        "self_attn.v_proj.weight": ("attn_v.weight", ("kv", "hidden")),
        "self_attn.v_proj.bias": ("attn_v.bias", ("kv",)),
        "self_attn.o_proj.weight": ("attn_output.weight", ("hidden", "hidden")),
        "mlp.gate_proj.weight": ("ffn_gate.weight", ("intermediate", "hidden")),
        "mlp.up_proj.weight": ("ffn_up.weight", ("intermediate", "hidden")),
        "mlp.down_proj.weight": ("ffn_down.weight", ("hidden", "intermediate")),
    },
    # Buffers that older checkpoints carry.
    ignored_suffixes=(".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"),
    add_keys=add_keys,
)
