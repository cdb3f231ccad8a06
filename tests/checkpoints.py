"""Small random Qwen2 and Qwen3 checkpoints for tests, in folders as Hugging Face lays them out.

Weights come from a seeded generator. The tokenizer is a real byte-level BPE with Qwen2's splitting pattern,
so that the `tokenizers` library and llama.cpp both load it. Imports nothing from the converter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{%- endfor %}<|im_start|>assistant\n<think>\n"
)
WORDS = ("the", "Ġthe", "Ġand", "ing", "ĠĠ", "ĠĠĠĠ", "éĩı", "ĊĊ")
# (text, special): ends of text and turns are special in tokenizer.json, thinking and tools are not.
ADDED = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<think>", False),
    ("</think>", False),
)

Array = NDArray[np.float32]
Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """The shape and storage of a checkpoint."""

    n_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 96
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 320
    dtype: str = "BF16"
    tied: bool = False
    n_shards: int = 1
    merges_as_pairs: bool = True
    architecture: str = "qwen2"
    head_dim: int | None = None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def write_checkpoint(folder: Path, spec: CheckpointSpec | None = None) -> Path:
    """Write a whole checkpoint into the new `folder`; returns it."""
    spec = spec or CheckpointSpec()
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(spec))
    write_json(folder / "generation_config.json", {"temperature": 0.6, "top_k": 40, "top_p": 0.95})
    write_json(folder / "tokenizer.json", tokenizer(spec))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    stored = {name: store(values, spec.dtype) for name, values in weights(spec).items()}
    if spec.n_shards == 1:
        write_safetensors(folder / "model.safetensors", stored)
        return folder
    names = list(stored)
    weight_map = {}
    for shard in range(spec.n_shards):
        file_name = f"model-{shard + 1:05}-of-{spec.n_shards:05}.safetensors"
        members = names[shard :: spec.n_shards]
        write_safetensors(folder / file_name, {name: stored[name] for name in members})
        weight_map.update(dict.fromkeys(members, file_name))
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    return folder


def weights(spec: CheckpointSpec) -> dict[str, Array]:
    """Random weights under their Hugging Face names; neither sorted nor in GGUF order."""
    random = np.random.default_rng(seed=7)
    hidden, wide = spec.hidden_size, spec.intermediate_size
    head = spec.head_dim or hidden // spec.n_heads
    q, kv = head * spec.n_heads, head * spec.n_kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer in range(spec.n_layers):
        block = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, wide),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
        }
        if spec.architecture == "qwen3":
            block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        else:
            block |= {f"self_attn.{each}_proj.bias": (n,) for each, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def store(values: Array, dtype: str) -> StoredTensor:
    """`values` in `dtype`; BF16 by cutting off the lower half of the bits."""
    if dtype == "BF16":
        content = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        content = values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
    return StoredTensor(dtype, values.shape, content)


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write the tensors as a safetensors file, one after the other."""
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.content)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    content = b"".join(tensor.content for tensor in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a BF16 safetensors file that is all zeros and takes no room."""
    header: Json = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def config(spec: CheckpointSpec) -> Json:
    """config.json with the keys of QwQ-32B's; that of Qwen3 states head_dim and that there is no bias."""
    qwen3: Json = {"attention_bias": False, "head_dim": spec.head_dim or spec.hidden_size // spec.n_heads}
    return {
        **(qwen3 if spec.architecture == "qwen3" else {}),
        "architectures": ["Qwen3ForCausalLM" if spec.architecture == "qwen3" else "Qwen2ForCausalLM"],
        "bos_token_id": first_added_token(),
        "eos_token_id": first_added_token() + 2,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": 4096,
        "model_type": spec.architecture,
        "num_attention_heads": spec.n_heads,
        "num_hidden_layers": spec.n_layers,
        "num_key_value_heads": spec.n_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": spec.vocab_size,
    }


def byte_symbols() -> list[str]:
    """The characters that stand for the bytes 0 to 255 in a byte-level vocabulary."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(moved)) for byte in range(256)]


def merges() -> list[tuple[str, str]]:
    """Rules that build each of WORDS from the left."""
    rules = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    return list(dict.fromkeys(rules))


def vocabulary() -> dict[str, int]:
    """The byte symbols and what the merges make of them."""
    pieces = sorted(byte_symbols()) + [left + right for left, right in merges()]
    return {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}


def first_added_token() -> int:
    """The token of the first added text."""
    return len(vocabulary())


def tokenizer(spec: CheckpointSpec) -> Json:
    """tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    rules = [list(pair) if spec.merges_as_pairs else " ".join(pair) for pair in merges()]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": first_added_token() + place, "content": text, **_added_flags(special)}
            for place, (text, special) in enumerate(ADDED)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "byte_fallback": False, "vocab": vocabulary(), "merges": rules},
    }


def tokenizer_config() -> Json:
    """tokenizer_config.json, chat template included."""
    return {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(first_added_token() + place): {"content": text, **_added_flags(special)}
            for place, (text, special) in enumerate(ADDED)
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write `content` as JSON."""
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Replace fields of a JSON file; `...` removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value is not ...})


def _added_flags(special: bool) -> Json:
    return {**dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False), "special": special}
