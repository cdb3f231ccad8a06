"""Models that always say the same, for behaviour that a trained model shows only by chance.

Every embedding is the same vector, attention and feed-forward add nothing, and the output layer points one
token at that vector, so that token is sampled for ever.
"""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

CHECKPOINT = Path(__file__).parent.parent / "miniature" / "checkpoint"


def constant_model(
    folder: Path, piece: str, *, layers: int = 2, hidden: int = 64, window: int = 1024
) -> Path:
    """A GGUF of the miniature's vocabulary that always says `piece`, one token's text."""
    checkpoint = folder / "constant"
    checkpoint.mkdir(parents=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, checkpoint / name)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": window,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    config.pop("head_dim", None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    _write_weights(checkpoint / "model.safetensors", config, token_id(piece))
    out = folder / "constant.gguf"
    run_conversion(ConvertRequest(checkpoint, "Q8_0", out))
    shutil.rmtree(checkpoint)
    return out


def token_id(piece: str) -> int:
    """The miniature's token for a piece of text."""
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    for added in tokenizer["added_tokens"]:
        if added["content"] == piece:
            return int(added["id"])
    return int(tokenizer["model"]["vocab"][_symbols(piece)])


def _symbols(piece: str) -> str:
    """The piece in the byte-level alphabet: bytes that do not print are shifted past U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = [byte for byte in range(256) if byte not in printable]
    return "".join(
        chr(byte) if byte in printable else chr(0x100 + shifted.index(byte)) for byte in piece.encode()
    )


def _write_weights(path: Path, config: dict[str, int], token: int) -> None:
    """Write the weights: zeros as holes of a sparse file, and the ones."""
    import numpy as np

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    ones = np.ones(hidden, np.float32).tobytes()
    shapes, offset = _shapes(config), 0
    layout: dict[str, dict[str, object]] = {}
    starts: dict[str, int] = {}
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        layout[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        starts[name], offset = offset, offset + size
    header = json.dumps(layout).encode()
    start = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in shapes:
            at = start + starts[name]
            file.seek(at)
            if name == "model.embed_tokens.weight":
                file.write(ones * vocab)
            elif name == "lm_head.weight":
                file.seek(at + token * len(ones))
                file.write(ones)
            elif name.endswith("norm.weight"):
                file.write(ones)
        file.truncate(start + offset)


def _shapes(config: dict[str, int]) -> dict[str, list[int]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name in "qkv":
            shapes[f"{block}.self_attn.{name}_proj.weight"] = [hidden, hidden]
            shapes[f"{block}.self_attn.{name}_proj.bias"] = [hidden]
        shapes[f"{block}.self_attn.o_proj.weight"] = [hidden, hidden]
        shapes[f"{block}.mlp.gate_proj.weight"] = [inner, hidden]
        shapes[f"{block}.mlp.up_proj.weight"] = [inner, hidden]
        shapes[f"{block}.mlp.down_proj.weight"] = [hidden, inner]
        shapes[f"{block}.input_layernorm.weight"] = [hidden]
        shapes[f"{block}.post_attention_layernorm.weight"] = [hidden]
    return shapes
