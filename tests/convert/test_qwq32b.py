"""A checkpoint of QwQ-32B's exact shapes, 65 GB of holes: the checks before a tensor is read."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.pipeline import ConversionPlanned, convert
from qwq_convert.plan import ConvertRequest, describe, open_source, sizes

from qwq_local.errors import ConvertError
from tests.checkpoints import (
    ADDED,
    INDEX,
    CheckpointSpec,
    byte_symbols,
    config,
    edit_json,
    tokenizer,
    tokenizer_config,
    write_json,
    write_sparse,
)
from tests.convert.watched import WatchedCheckpoint

QWQ_32B = CheckpointSpec(
    n_layers=64,
    hidden_size=5120,
    intermediate_size=27648,
    n_heads=40,
    n_kv_heads=8,
    vocab_size=152064,
    n_shards=14,
)
N_LEARNED = 151643
N_PARAMETERS = 32_763_876_352
FIRST = "model-00001-of-00014.safetensors"
LAST = "model-00014-of-00014.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, with a vocabulary as long as the real one."""
    folder = tmp_path_factory.mktemp("whole") / "QwQ-32B"
    folder.mkdir()
    write_json(
        folder / "config.json", config(QWQ_32B) | {"bos_token_id": N_LEARNED, "eos_token_id": N_LEARNED + 2}
    )
    write_json(folder / "generation_config.json", {"temperature": 0.6, "top_k": 40, "top_p": 0.95})
    added = [
        {"id": N_LEARNED + i, "content": text, "special": special} for i, (text, special) in enumerate(ADDED)
    ]
    pieces = [*byte_symbols(), *(f"piece{number}" for number in range(256, N_LEARNED))]
    written = tokenizer(QWQ_32B)
    model: dict[str, object] = {
        "type": "BPE",
        "vocab": {piece: token for token, piece in enumerate(pieces)},
        "merges": [["piece", str(number)] for number in range(256, N_LEARNED)],
    }
    write_json(folder / "tokenizer.json", {**written, "added_tokens": added, "model": model})
    decoder = {str(entry["id"]): entry for entry in added}
    write_json(folder / "tokenizer_config.json", tokenizer_config() | {"added_tokens_decoder": decoder})
    weight_map = {}
    for number, shapes in enumerate(shards()):
        name = f"model-{number + 1:05}-of-00014.safetensors"
        write_sparse(folder / name, shapes)
        weight_map.update(dict.fromkeys(shapes, name))
    write_json(folder / INDEX, {"metadata": {"total_size": 2 * N_PARAMETERS}, "weight_map": weight_map})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change: its shards are links, its documents are copies."""
    copy = tmp_path / "QwQ-32B"
    copy.mkdir()
    for path in whole.iterdir():
        (os.link if path.suffix == ".safetensors" else shutil.copy)(path, copy / path.name)
    return copy


def shards() -> list[dict[str, tuple[int, ...]]]:
    """The 771 shapes by shard, layer after layer as in the original."""
    hidden, wide, kv, vocabulary = 5120, 27648, 1024, 152064
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, wide),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{each}_proj.bias": (n,) for each, n in (("k", kv), ("q", hidden), ("v", kv))},
        **{f"self_attn.{each}_proj.weight": (n, hidden) for each, n in (("k", kv), ("q", hidden), ("v", kv))},
        "self_attn.o_proj.weight": (hidden, hidden),
    }
    split: list[dict[str, tuple[int, ...]]] = [{} for _ in range(14)]
    split[0]["model.embed_tokens.weight"] = (vocabulary, hidden)
    split[13]["lm_head.weight"] = (vocabulary, hidden)
    split[13]["model.norm.weight"] = (hidden,)
    for layer in range(64):
        for name, shape in block.items():
            split[layer * 14 // 64][f"model.layers.{layer}.{name}"] = shape
    return split


def test_771_tensors_are_checked_by_their_headers_alone(whole: Path, tmp_path: Path) -> None:
    """No tensor is read before the plan is complete."""
    with CheckpointFolder(whole) as inner:
        source = WatchedCheckpoint(inner)
        events = convert(ConvertRequest(whole, "Q4_K_M", tmp_path / "out.gguf"), source)
        planned = next(events)
        events.close()
    assert source.reads == []
    assert isinstance(planned, ConversionPlanned)
    assert planned.count == 771
    # The published Q4_K_M has 19.85 GB, header and vocabulary included.
    assert 19.83e9 < planned.bytes_total < 19.86e9
    assert list(tmp_path.iterdir()) == []


def test_every_type_has_the_published_size(whole: Path) -> None:
    """The GGUFs of the model's authors, in GB."""
    with open_source(whole) as source:
        gigabytes = {row.name: round((row.n_bytes or 0) / 1e9, 1) for row in sizes(describe(source))}
    published = {"Q4_K_M": 19.9, "Q5_0": 22.6, "Q5_K_M": 23.3, "Q6_K": 26.9, "Q8_0": 34.8}
    assert {name: gigabytes[name] for name in published} == published
    assert gigabytes["BF16"] == 65.5


def _cut(folder: Path) -> None:
    """A cut copy, because the shard itself is the whole checkpoint's file."""
    path = folder / LAST
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(2**16)
    path.unlink()
    with path.open("wb") as file:
        file.write(header)
        file.truncate(n_bytes - 1)


def _edited(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    write_json(folder / name, content)


def _replaced(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    """Another shape for one of the tensors of the last shard."""
    (folder / LAST).unlink()
    write_sparse(folder / LAST, shards()[13] | {name: shape})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        lambda f: (f / "model-00007-of-00014.safetensors").unlink(),
        "{folder}: model-00007-of-00014.safetensors missing. Download the missing files.",
    ),
    "a shard is cut": (
        _cut,
        LAST + ": has 5457993733 bytes, its header describes 5457993734. Download the file again.",
    ),
    "the index is missing": (
        lambda f: (f / INDEX).unlink(),
        "{folder}: model.safetensors.index.json is missing for 14 shards. Download it.",
    ),
    "the index places a tensor elsewhere": (
        lambda f: _edited(f, INDEX, lambda c: c["weight_map"].update({"lm_head.weight": FIRST})),
        "model.safetensors.index.json: does not place 'lm_head.weight' in " + LAST + ". Download it again.",
    ),
    "a tensor is missing": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=65),
        "config.json: 12 tensors are missing, first model.layers.64.input_layernorm.weight. "
        "Download the checkpoint again.",
    ),
    "there is one tensor too many": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=63),
        LAST + ": tensor 'model.layers.63.input_layernorm.weight' is not part of a ",
    ),
    "a shape does not fit": (
        lambda f: _replaced(f, "lm_head.weight", (152065, 5120)),
        LAST + ": lm_head.weight has shape [152065, 5120], config.json says [152064, 5120]. "
        "The two do not belong together: download both again.",
    ),
    "another architecture": (
        lambda f: edit_json(f / "config.json", architectures=["LlamaForCausalLM"]),
        "config.json: architecture 'LlamaForCausalLM' is not supported, only Qwen2ForCausalLM",
    ),
    "quantized weights": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "awq"}),
        "config.json: the weights are quantized already. Use the original F32, F16 or BF16 checkpoint.",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "config.json: missing from QwQ-32B. Download it.",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "tokenizer.json: missing from QwQ-32B. Download it.",
    ),
    "no tokenizer settings": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        "tokenizer_config.json: missing from QwQ-32B. Download it.",
    ),
    "no template": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=...),
        "template",
    ),
    "another tokenizer": (
        lambda f: edit_json(f / "tokenizer.json", pre_tokenizer={"type": "ByteLevel"}),
        "splits text in another way",
    ),
    "more tokens than rows": (
        lambda f: _edited(f, "tokenizer.json", lambda c: c["model"]["vocab"].update(more=152064)),
        "'more' is token 152064, config.json has 152064 tokens",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_before_anything_is_written(fault: str, folder: Path, tmp_path: Path) -> None:
    make, expected = FAULTS[fault]
    make(folder)
    with pytest.raises(ConvertError) as caught:
        next(convert(ConvertRequest(folder, "Q4_K_M", tmp_path / "out.gguf")))
    assert expected.format(folder=folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["QwQ-32B"]


def test_a_file_that_another_process_writes_is_an_error_before_a_tensor_is_read(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    with out.with_name("out.gguf.partial").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        events = convert(ConvertRequest(whole, "Q4_K_M", out))
        assert isinstance(next(events), ConversionPlanned)
        with pytest.raises(ConvertError, match=r"out\.gguf\.partial: another process is writing it\. Wait"):
            next(events)
