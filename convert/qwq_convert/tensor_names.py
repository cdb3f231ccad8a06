"""The tensors of a Qwen2 checkpoint in, the same tensors under their GGUF names out, in file order.

Names follow llama.cpp's qwen2 (gguf-py's tensor_mapping.py); the table says each tensor's shape in the
words of config.json, so that a checkpoint that does not fit its config is refused before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwq_convert.model_config import ModelConfig
from qwq_convert.shard import SourceTensor
from qwq_convert.strict_json import shown
from qwq_local.errors import ConvertError

Shape = tuple[str, ...]

# Hugging Face name: (GGUF name, rows and columns).
OUTER_TENSORS: dict[str, tuple[str, Shape]] = {
    "model.embed_tokens.weight": ("token_embd.weight", ("vocab", "hidden")),
    "model.norm.weight": ("output_norm.weight", ("hidden",)),
    "lm_head.weight": ("output.weight", ("vocab", "hidden")),
}
# The same below "model.layers.N." and "blk.N.".
LAYER_TENSORS: dict[str, tuple[str, Shape]] = {
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
}
# Buffers that older checkpoints carry and that follow from the config.
IGNORED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
READABLE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of the checkpoint and the name it has in the GGUF; `layer` is -1 outside the blocks."""

    name: str
    layer: int
    source: SourceTensor


@dataclass(frozen=True, slots=True)
class _Expected:
    name: str
    layer: int
    shape: tuple[int, ...]


def name_tensors(tensors: Mapping[str, SourceTensor], config: ModelConfig) -> tuple[NamedTensor, ...]:
    """Every tensor that goes into the GGUF, in the order of llama-quantize: by layer, then by name.

    ConvertError when one is missing, unknown, of another shape than config.json says, or not F32/F16/BF16.
    """
    expected = _expected_tensors(config)
    if config.tied and "lm_head.weight" not in tensors:
        del expected["lm_head.weight"]
    missing = [name for name in expected if name not in tensors]
    if missing:
        count = f"{len(missing)} tensors are missing, first" if len(missing) > 1 else "1 tensor is missing,"
        raise ConvertError(f"config.json: {count} {missing[0]}. Download the checkpoint again.")
    for tensor in tensors.values():
        if tensor.name not in expected and not tensor.name.endswith(IGNORED_SUFFIXES):
            raise ConvertError(f"{tensor.shard}: tensor {shown(tensor.name)} is not part of a Qwen2 model.")
    named = [_match(entry, tensors[name]) for name, entry in expected.items()]
    return tuple(sorted(named, key=lambda tensor: (tensor.layer, tensor.name)))


def _expected_tensors(config: ModelConfig) -> dict[str, _Expected]:
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "kv": config.kv_size,
        "intermediate": config.intermediate_size,
    }

    def shaped(shape: Shape) -> tuple[int, ...]:
        return tuple(sizes[word] for word in shape)

    expected = {source: _Expected(name, -1, shaped(shape)) for source, (name, shape) in OUTER_TENSORS.items()}
    for layer in range(config.n_layers):
        for source, (name, shape) in LAYER_TENSORS.items():
            entry = _Expected(f"blk.{layer}.{name}", layer, shaped(shape))
            expected[f"model.layers.{layer}.{source}"] = entry
    return expected


def _match(expected: _Expected, source: SourceTensor) -> NamedTensor:
    place = f"{source.shard}: {source.name}"
    if source.shape != expected.shape:
        raise ConvertError(
            f"{place} has shape {list(source.shape)}, config.json says {list(expected.shape)}. "
            "The two do not belong together: download both again."
        )
    if source.dtype not in READABLE_DTYPES:
        raise ConvertError(f"{place} is {source.dtype}. Use the original F32, F16 or BF16 weights.")
    return NamedTensor(expected.name, expected.layer, source)
