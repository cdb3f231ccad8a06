"""Qwen2, the architecture of QwQ-32B: names and shapes as in llama.cpp (src/models/qwen2.cpp)."""

from __future__ import annotations

from qwq_convert.architecture import Architecture, TensorSpec

ARCHITECTURE = Architecture(
    class_name="Qwen2ForCausalLM",
    name="qwen2",
    outer_tensors=(
        TensorSpec("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
        TensorSpec("model.norm.weight", "output_norm.weight", ("hidden",)),
        TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), is_optional=True),
        TensorSpec("lm_head.bias", "output.bias", ("vocab",), is_optional=True),
    ),
    layer_tensors=(
        TensorSpec("input_layernorm.weight", "attn_norm.weight", ("hidden",)),
        TensorSpec("self_attn.q_proj.weight", "attn_q.weight", ("q", "hidden")),
        TensorSpec("self_attn.q_proj.bias", "attn_q.bias", ("q",)),
        TensorSpec("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden")),
        TensorSpec("self_attn.k_proj.bias", "attn_k.bias", ("kv",)),
        TensorSpec("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
        TensorSpec("self_attn.v_proj.bias", "attn_v.bias", ("kv",)),
        TensorSpec("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "q")),
        TensorSpec("post_attention_layernorm.weight", "ffn_norm.weight", ("hidden",)),
        TensorSpec("mlp.gate_proj.weight", "ffn_gate.weight", ("intermediate", "hidden")),
        TensorSpec("mlp.up_proj.weight", "ffn_up.weight", ("intermediate", "hidden")),
        TensorSpec("mlp.down_proj.weight", "ffn_down.weight", ("hidden", "intermediate")),
    ),
    # Buffers that older checkpoints carry.
    ignored_suffixes=(".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"),
    layers_of_70b=80,
)
