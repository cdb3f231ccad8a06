"""A GGUF with random weights, of any shape, made by our own converter.

    python bench/make_model.py OUT.gguf [--shape standard|wide] [--type Q8_0]

`standard` has 0.58 billion parameters, `wide` 2 layers of 256: both have QwQ's vocabulary of 152,064 tokens,
whose words are made of letters by merges as in a trained tokenizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "miniature" / "checkpoint"
WORK = ROOT / "bench" / ".work"
VOCABULARY = 152_064
FIRST_SPECIAL = 151_643
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a Qwen2 decoder."""

    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_dim: int = 64


SHAPES = {"standard": Shape(24, 1024, 2816, 4), "wide": Shape(2, 256, 512, 1)}


def bench_model(shape: str = "standard", file_type: str = "Q8_0") -> Path:
    """The model of that name and type under bench/.work; made if it does not exist."""
    path = WORK / f"{shape}-{file_type}.gguf"
    if not path.is_file():
        make(path, SHAPES[shape], file_type)
    return path


def make(out: Path, shape: Shape, file_type: str) -> None:
    """Write a random checkpoint beside `out`, convert it, and remove it."""
    folder = out.with_suffix(".checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_checkpoint(folder, shape)
    run_conversion(ConvertRequest(folder, file_type, out, name="Random"))
    shutil.rmtree(folder)


def write_checkpoint(folder: Path, shape: Shape, n_shards: int = 1) -> None:
    """Fill the empty `folder` with a checkpoint of random weights, in one shard or several with an index."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.hidden // shape.head_dim,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32_768,
    }
    first = special_tokens_moved(folder)
    (folder / "config.json").write_text(json.dumps(config | first))
    (folder / "generation_config.json").write_text(json.dumps(first))
    shapes = tensor_shapes(shape)
    if n_shards == 1:
        write_weights(folder / "model.safetensors", shapes)
        return
    placed = {
        name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" for i, name in enumerate(shapes)
    }
    for shard in sorted(set(placed.values())):
        write_weights(folder / shard, {name: shapes[name] for name in shapes if placed[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def special_tokens_moved(folder: Path) -> dict[str, int]:
    """Write a tokenizer of 152,064 tokens, the special ones last; the ids that the configs must name."""
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    vocab = {piece: i for i, piece in enumerate(p for p in tokenizer["model"]["vocab"] if len(p) == 1)}
    merges = []
    for left, right in itertools.islice(letter_merges(), FIRST_SPECIAL - len(vocab)):
        merges.append([left, right])
        vocab[left + right] = len(vocab)
    moved = {}
    for number, added in enumerate(tokenizer["added_tokens"]):
        moved[str(added["id"])] = added["id"] = FIRST_SPECIAL + number
    tokenizer["model"] |= {"vocab": vocab, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(moved[old]): value for old, value in settings["added_tokens_decoder"].items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    return {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}


def letter_merges() -> Iterator[tuple[str, str]]:
    """Pairs that make every word of two letters, then of three, then of four."""
    for length in (2, 3, 4):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            word = "".join(letters)
            yield word[:-1], word[-1]


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Normally distributed bf16 weights, norms of one, from a fixed seed."""
    layout, offset = {}, 0
    for name, dims in shapes.items():
        size = 2 * prod(dims)
        layout[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(layout).encode()
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, dims in shapes.items():
            for start in range(0, prod(dims), _CHUNK):
                count = min(_CHUNK, prod(dims) - start)
                if name.endswith("norm.weight"):
                    values = np.ones(count, np.float32)
                else:
                    values = rng.standard_normal(count, np.float32) * 0.02
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes, outermost dimension first."""
    hidden, inner, kv_width = shape.hidden, shape.intermediate, shape.head_dim * shape.kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "lm_head.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        for name, width in (("q", hidden), ("k", kv_width), ("v", kv_width)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (width, hidden)
            shapes[f"{block}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{block}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def main() -> None:
    """Make one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="standard")
    parser.add_argument("--type", default="Q8_0")
    arguments = parser.parse_args()
    make(arguments.out, SHAPES[arguments.shape], arguments.type)


if __name__ == "__main__":
    main()
