"""The key-values of a conversion: their values, their sources, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from qwq_convert.gguf_file import GgufHeader, read_header
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.errors import ConvertError
from tests.checkpoints import ADDED, CHAT_TEMPLATE, edit_json, first_added_token, write_checkpoint, write_json

CARD = """---
license: apache-2.0
language:
- en
- no
base_model: Qwen/Qwen2.5-32B
pipeline_tag: text-generation
tags: [chat]
---
# A model
"""
END = first_added_token() + len(ADDED)

Edit = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "QwQ-32B")


def test_the_key_values_are_in_the_order_of_the_reference(folder: Path) -> None:
    """This is the order of llama.cpp's converter followed by llama-quantize; it was compared with both."""
    edit_json(folder / "generation_config.json", repetition_penalty=1.0, do_sample=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    assert header_of(folder).keys == (
        "general.architecture",
        "general.type",
        *(f"general.sampling.{key}" for key in ("top_k", "top_p", "temp", "penalty_repeat")),
        *(f"general.{key}" for key in ("name", "finetune", "basename", "size_label", "license")),
        *(f"general.base_model.{key}" for key in ("count", "0.name", "0.organization")),
        "general.base_model.0.repo_url",
        "general.tags",
        "general.languages",
        "qwen2.block_count",
        "qwen2.context_length",
        "qwen2.embedding_length",
        "qwen2.feed_forward_length",
        "qwen2.attention.head_count",
        "qwen2.attention.head_count_kv",
        "qwen2.rope.freq_base",
        "qwen2.attention.layer_norm_rms_epsilon",
        *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")),
        *(f"tokenizer.ggml.{key}_token_id" for key in ("eos", "padding", "bos")),
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.chat_template",
        "general.quantization_version",
        "general.file_type",
    )


def test_the_key_values_have_the_figures_of_the_config(folder: Path) -> None:
    header = header_of(folder)
    figures = {key: header.value(key) for key in header.keys if key.startswith("qwen2.")}
    assert figures == {
        "qwen2.block_count": 2,
        "qwen2.context_length": 4096,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1000000.0,
        "qwen2.attention.layer_norm_rms_epsilon": as_f32(1e-5),
    }
    assert (header.value("general.file_type"), header.value("general.quantization_version")) == (7, 2)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarn_in_the_config_becomes_rope_scaling_keys(place: str, folder: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn", "beta_fast": 32}
    edit_json(folder / "config.json", **{place: yarn})
    header = header_of(folder)
    assert {key: header.value(key) for key in header.keys if ".scaling." in key} == {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
        "qwen2.rope.scaling.yarn_beta_fast": 32.0,
    }


def test_the_rope_base_may_be_among_the_rope_parameters(folder: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    edit_json(folder / "config.json", rope_theta=..., rope_parameters=rope)
    header = header_of(folder)
    assert header.value("qwen2.rope.freq_base") == 5000.0
    assert "qwen2.rope.scaling.type" not in header.keys


def test_tokens_fill_the_vocabulary_size_and_have_their_types(folder: Path) -> None:
    """Learned pieces are 1, special or special-looking ones 3, other added ones 4, unused rows 5."""
    header = header_of(folder)
    tokens, types = header.value("tokenizer.ggml.tokens"), header.value("tokenizer.ggml.token_type")
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(types) == 320
    first = first_added_token()
    assert tokens[first:END] == [text for text, _ in ADDED]
    assert types[first:END] == [3, 3, 3, 4, 3, 4, 4]
    assert tokens[END:] == [f"[PAD{token}]" for token in range(END, 320)]
    assert set(types[:first]) == {1}
    assert set(types[END:]) == {5}


def test_a_token_that_only_the_tokenizer_config_knows_is_added(folder: Path) -> None:
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    decoder["310"] = {"content": "<late>", "special": False}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=decoder, pad_token="<late>")
    header = header_of(folder)
    tokens, types = header.value("tokenizer.ggml.tokens"), header.value("tokenizer.ggml.token_type")
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert (tokens[310], types[310]) == ("<late>", 4)
    assert header.value("tokenizer.ggml.padding_token_id") == 310


def test_spaces_inside_a_merge_become_their_byte_level_symbol(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].append(["a b", "c"])
    write_json(folder / "tokenizer.json", tokenizer)
    merges = header_of(folder).value("tokenizer.ggml.merges")
    assert isinstance(merges, list)
    assert merges[-1] == "a\u0120b c"


def test_a_role_is_taken_from_the_tokenizer_config_before_the_config(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"}, pad_token=None)
    edit_json(folder / "config.json", eos_token_id=[1, 2], pad_token_id=END - 1)
    header = header_of(folder)
    roles = [key for key in header.keys if key.endswith("_token_id")]
    assert roles == [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "bos", "padding")]
    assert header.value("tokenizer.ggml.eos_token_id") == first_added_token()
    assert header.value("tokenizer.ggml.padding_token_id") == END - 1
    edit_json(folder / "config.json", eos_token_id=END - 1)
    assert header_of(folder).value("tokenizer.ggml.eos_token_id") == first_added_token()


@pytest.mark.parametrize("source", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_the_chat_template_is_found_in_all_three_places(source: str, folder: Path) -> None:
    if source != "tokenizer_config.json":
        edit_json(folder / "tokenizer_config.json", chat_template=...)
    write_json(folder / "chat_template.json", {"chat_template": "from json"})
    if source != "chat_template.json":
        (folder / "chat_template.jinja").write_text("from jinja", encoding="utf-8")
    expected = {
        "tokenizer_config.json": CHAT_TEMPLATE,
        "chat_template.jinja": "from jinja",
        "chat_template.json": "from json",
    }
    assert header_of(folder).value("tokenizer.chat_template") == expected[source]


def test_named_chat_templates_are_kept_beside_the_default_one(folder: Path) -> None:
    templates = [{"name": "tool use", "template": "B"}, {"name": "default", "template": "A"}]
    edit_json(folder / "tokenizer_config.json", chat_template=templates)
    header = header_of(folder)
    assert header.value("tokenizer.chat_template") == "A"
    assert header.value("tokenizer.chat_template.tool_use") == "B"
    assert header.value("tokenizer.chat_templates") == ["tool_use"]


def test_the_name_comes_from_the_caller_the_card_the_config_or_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "QwQ-32B")
    assert header_of(folder).value("general.name") == "QwQ 32B"
    edit_json(folder / "config.json", _name_or_path="Qwen/Tiny-0.1M")
    assert header_of(folder).value("general.name") == "Tiny 0.1M"
    (folder / "README.md").write_text("---\nname: From the card\n---\n", encoding="utf-8")
    assert header_of(folder).value("general.name") == "From the card"
    assert header_of(folder, name="Mine").value("general.name") == "Mine"


def test_a_cache_snapshot_is_named_after_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / ("0a" * 20)
    header = header_of(write_checkpoint(folder))
    assert header.value("general.name") == "QwQ 32B"
    assert header.value("general.organization") == "Qwen"


def test_a_folder_named_by_a_hash_gives_no_name(tmp_path: Path) -> None:
    header = header_of(write_checkpoint(tmp_path / ("0a" * 20)))
    assert header.value("general.name") == "qwen2"
    assert header.value("general.size_label") == "103K"


def tokenizer_edit(**changes: object) -> Edit:
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def model_edit(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        edit_json(folder / "tokenizer.json", model=model | changes)

    return edit


def options_edit(**changes: object) -> Edit:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def config_edit(**changes: object) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **changes)


def card_edit(text: str) -> Edit:
    return lambda folder: (folder / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8")


def removal(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


REFUSED: dict[str, tuple[Edit, str]] = {
    "no config": (removal("config.json"), "config.json: missing from QwQ-32B. Download it."),
    "no tokenizer": (removal("tokenizer.json"), "tokenizer.json: missing from"),
    "no tokenizer config": (removal("tokenizer_config.json"), "tokenizer_config.json: missing from"),
    "no chat template": (options_edit(chat_template=...), "no chat_template there"),
    "a blank chat template": (options_edit(chat_template=" \n"), "no chat_template there"),
    "no default template": (options_edit(chat_template=[{"name": "x", "template": "y"}]), "no chat_template"),
    "another architecture": (
        config_edit(architectures=["LlamaForCausalLM"]),
        "'LlamaForCausalLM' is not supp",
    ),
    "no architecture": (config_edit(architectures=...), "architecture [] is not supported"),
    "quantized weights": (config_edit(quantization_config={"bits": 4}), "quantized already"),
    "another activation": (config_edit(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "no layers": (config_edit(num_hidden_layers=0), "num_hidden_layers is 0"),
    "a billion layers": (config_edit(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "a vocabulary of a billion": (config_edit(vocab_size=10**9), "vocab_size is 1000000000"),
    "a missing figure": (config_edit(rms_norm_eps=...), "rms_norm_eps is missing"),
    "a negative base": (config_edit(rope_theta=-1.0), "rope_theta is -1.0"),
    "heads that do not divide": (config_edit(num_key_value_heads=3), "4 attention heads do not divide"),
    "a head size that does not fit": (config_edit(head_dim=32), "is not 4 heads of an even head_dim"),
    "unknown rope scaling": (config_edit(rope_scaling={"type": "dynamic"}), "rope type 'dynamic'"),
    "YaRN without its origin": (
        config_edit(rope_scaling={"type": "yarn", "factor": 4}),
        "rope_scaling: original_max_position_embeddings is missing",
    ),
    "another shape": (config_edit(intermediate_size=128), "has shape [96, 64], config.json says [128, 64]"),
    "more layers than tensors": (
        config_edit(num_hidden_layers=3),
        "12 tensors are missing, first model.layers.2",
    ),
    "fewer layers than tensors": (config_edit(num_hidden_layers=1), "is not part of a qwen2 model"),
    "another model": (model_edit(type="Unigram"), "its model is 'Unigram'"),
    "byte fallback": (model_edit(byte_fallback=True), "its BPE has extras"),
    "another normalizer": (tokenizer_edit(normalizer={"type": "Lowercase"}), "its normalizer is not NFC"),
    "another split": (tokenizer_edit(pre_tokenizer={"type": "ByteLevel"}), "splits text in another way"),
    "another decoder": (tokenizer_edit(decoder={"type": "Metaspace"}), "its decoder is not ByteLevel"),
    "a post-processor": (tokenizer_edit(post_processor={"type": "TemplateProcessing"}), "adds tokens"),
    "no merges": (model_edit(merges=[]), "merges are missing"),
    "a merge of three": (model_edit(merges=["a b c"]), "merges[0] is 'a b c', expected a pair"),
    "a merge that is a number": (model_edit(merges=[["a", 1]]), "merges[0] is"),
    "an empty vocabulary": (model_edit(vocab={}), "vocab is missing"),
    "a token beyond the rows": (model_edit(vocab={"a": 320}), "'a' is token 320, config.json has 320"),
    "a token that is a fraction": (model_edit(vocab={"a": 0.5}), "'a' is token 0.5"),
    "two pieces of one token": (model_edit(vocab={"a": 1, "b": 1}), "token 1 is both 'a' and 'b'"),
    "a lone surrogate": (model_edit(vocab={"a\ud800": 1}), "a token is not valid Unicode text"),
    "an added token over a learned one": (
        tokenizer_edit(added_tokens=[{"id": 5, "content": "x", "special": False}]),
        "token 5 is both",
    ),
    "an added token with the text of a learned one": (
        tokenizer_edit(added_tokens=[{"id": 319, "content": "!", "special": False}]),
        "tokens 0 and 319 are both '!'",
    ),
    "an added token beyond the rows": (
        tokenizer_edit(added_tokens=[{"id": 320, "content": "x"}]),
        "id is 320, expected a whole number from 0 to 319",
    ),
    "two added texts of one token": (
        options_edit(added_tokens_decoder={"300": {"content": "<think>"}}),
        "contra",
    ),
    "no end token": (
        lambda folder: (options_edit(eos_token=None)(folder), config_edit(eos_token_id=...)(folder)),
        "eos_token is missing",
    ),
    "a role beyond the rows": (config_edit(bos_token_id=320), "bos_token_id is 320"),
    "a card that is no YAML": (card_edit("a: ["), "README.md: front matter cannot be read"),
    "a card with aliases": (card_edit("a: &x [1]\nb: *x"), "README.md: front matter cannot be read"),
    "a card with a number as version": (card_edit("version: 1.5"), "README.md: general.version is 1.5"),
    "a card with false among its tags": (card_edit("tags: [false]"), "README.md: general.tags is False"),
    "a card with nonsense": (card_edit("license: [1]"), "README.md: cannot be made sense of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_inconsistent_checkpoint_is_refused_in_one_line(case: str, folder: Path) -> None:
    """From headers alone: nothing is written, and the line names the file."""
    edit, message = REFUSED[case]
    edit(folder)
    with pytest.raises(ConvertError) as caught:
        header_of(folder)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert not list(folder.parent.glob("*.gguf*"))


def header_of(folder: Path, name: str | None = None) -> GgufHeader:
    """The header of a Q8_0 conversion."""
    out = folder.parent / "out.gguf"
    out.unlink(missing_ok=True)
    return read_header(run_conversion(ConvertRequest(folder, "Q8_0", out, name=name)))


def as_f32(number: float) -> float:
    """`number` rounded to a 32-bit float."""
    value: float = struct.unpack("<f", struct.pack("<f", number))[0]
    return value
