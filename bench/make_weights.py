"""A random Qwen2 checkpoint to time conversions with: config, tokenizer, BF16 shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHECKPOINT = Path(__file__).resolve().parent.parent / "miniature" / "checkpoint"
N_LAYERS, HIDDEN, INTERMEDIATE, N_HEADS, N_KV_HEADS = 10, 2048, 8192, 16, 4
N_SHARDS = 6


def write_weights(folder: Path) -> None:
    """Write the checkpoint into a new folder; with the miniature's tokenizer."""
    folder.mkdir(parents=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder / name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {
        "num_hidden_layers": N_LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "tie_word_embeddings": False,
    }
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = list(_shapes(config["vocab_size"]))
    per_shard = -(-len(shapes) // N_SHARDS)
    weight_map: dict[str, str] = {}
    for number in range(N_SHARDS):
        members = shapes[number * per_shard : (number + 1) * per_shard]
        name = f"model-{number + 1:05}-of-{N_SHARDS:05}.safetensors"
        _write_shard(folder / name, members, seed=number)
        weight_map |= dict.fromkeys((tensor for tensor, _ in members), name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def _shapes(n_vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    kv = HIDDEN // N_HEADS * N_KV_HEADS
    yield "model.embed_tokens.weight", (n_vocab, HIDDEN)
    for layer in range(N_LAYERS):
        block = f"model.layers.{layer}"
        for name, width in (("q", HIDDEN), ("k", kv), ("v", kv)):
            yield f"{block}.self_attn.{name}_proj.weight", (width, HIDDEN)
            yield f"{block}.self_attn.{name}_proj.bias", (width,)
        yield f"{block}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{block}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{block}.input_layernorm.weight", (HIDDEN,)
        yield f"{block}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (n_vocab, HIDDEN)


def _write_shard(path: Path, members: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    random, offset, header = np.random.default_rng(seed), 0, {}
    for name, shape in members:
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, shape in members:
            values = random.normal(0, 0.02, shape).astype(np.float32)
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
