"""Qwen3, dense: no bias, a norm for each head's query and key, heads of a size of their own.

Names and shapes are those of llama.cpp (src/models/qwen3.cpp).
"""

from __future__ import annotations

from qwq_convert.architecture import Architecture, TensorSpec

ARCHITECTURE = Architecture(
    class_name="Qwen3ForCausalLM",
    name="qwen3",
    outer_tensors=(
        TensorSpec("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
        TensorSpec("model.norm.weight", "output_norm.weight", ("hidden",)),
        TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), is_optional=True),
    ),
    layer_tensors=(
        TensorSpec("input_layernorm.weight", "attn_norm.weight", ("hidden",)),
        TensorSpec("self_attn.q_proj.weight", "attn_q.weight", ("q", "hidden")),
        TensorSpec("self_attn.q_norm.weight", "attn_q_norm.weight", ("head",)),
        TensorSpec("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden")),
        TensorSpec("self_attn.k_norm.weight", "attn_k_norm.weight", ("head",)),
        TensorSpec("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
        TensorSpec("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "q")),
        TensorSpec("post_attention_layernorm.weight", "ffn_norm.weight", ("hidden",)),
        TensorSpec("mlp.gate_proj.weight", "ffn_gate.weight", ("intermediate", "hidden")),
        TensorSpec("mlp.up_proj.weight", "ffn_up.weight", ("intermediate", "hidden")),
        TensorSpec("mlp.down_proj.weight", "ffn_down.weight", ("hidden", "intermediate")),
    ),
    states_head_dim=True,
    ignored_suffixes=(".rotary_emb.inv_freq",),
)
