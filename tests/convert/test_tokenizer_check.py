"""llama.cpp's tokenizer and that of the tokenizers library, both real."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import cast

import pytest
from qwq_convert.gguf_file import read_header
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest
from qwq_convert.tokenizer_check import TokenizerReport, compare_tokenizers, corpus, texts_with
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from qwq_local.engine.model import LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag, ConvertError
from tests.checkpoints import ADDED, CheckpointSpec, edit_json, tokenizer, write_checkpoint, write_json


def test_the_corpus_is_broad_and_in_normal_form() -> None:
    """llama.cpp does not normalize, so only text in NFC can give the same tokens."""
    assert sum(map(len, corpus().values())) >= 150
    for texts in corpus().values():
        assert len(set(texts)) == len(texts)
        assert [text for text in texts if unicodedata.normalize("NFC", text) != text] == []
    categories = {unicodedata.category(c) for texts in corpus().values() for text in texts for c in text}
    assert categories >= {"Cc", "Cf", "Cn", "Co", "Ll", "Lm", "Lo", "Lt", "Lu", "Mc", "Me", "Mn"}
    assert categories >= {"Nd", "Nl", "No", "Pd", "Sc", "Sk", "Sm", "So", "Zl", "Zp", "Zs"}


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A GGUF and the tokenizer.json of a vocabulary that was trained without splitting text into words.

    Its merges cross word boundaries, so tokens differ wherever the two sides split differently.
    """
    folder = tmp_path_factory.mktemp("tokenized")
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    # The lookalikes are left out: a special token must not be a trained one too.
    texts = [text for about, texts in corpus().items() for text in texts if "lookalikes" not in about]
    learned.train_from_iterator(texts, trainer)
    model = json.loads(learned.to_str())["model"]
    n_tokens = len(model["vocab"])
    spec = CheckpointSpec(n_layers=1, vocab_size=n_tokens + len(ADDED))
    checkpoint = write_checkpoint(folder / "model", spec)
    document = tokenizer(spec)
    document["model"] = {
        "type": "BPE",
        "byte_fallback": False,
        "vocab": model["vocab"],
        "merges": model["merges"],
    }
    document["added_tokens"] = [
        {**entry, "id": n_tokens + place}
        for place, entry in enumerate(cast(list[dict[str, object]], document["added_tokens"]))
    ]
    write_json(checkpoint / "tokenizer.json", document)
    edit_json(checkpoint / "tokenizer_config.json", added_tokens_decoder=...)
    edit_json(checkpoint / "config.json", bos_token_id=n_tokens, eos_token_id=n_tokens + 2)
    path = folder / "model.gguf"
    run_conversion(ConvertRequest(checkpoint, "Q8_0", path))
    return path, (checkpoint / "tokenizer.json").read_bytes()


def tokenizer_report(path: Path, document: bytes) -> TokenizerReport:
    types = read_header(path).value("tokenizer.ggml.token_type")
    assert isinstance(types, list)
    model = drained(load_model(path, LoadSettings(vocab_only=True), AbortFlag()))
    try:
        return compare_tokenizers(model.vocabulary.encode_raw, document, [int(kind) for kind in types])
    finally:
        model.close()


def test_llama_cpp_and_the_tokenizers_library_agree_on_every_text(tokenized: tuple[Path, bytes]) -> None:
    report = tokenizer_report(*tokenized)
    assert report.differences == ()
    assert report.n_plain >= 150
    assert report.n_special == len(ADDED) * len(list(texts_with("x")))


def test_merges_in_another_order_are_found(tokenized: tuple[Path, bytes]) -> None:
    path, content = tokenized
    document = json.loads(content)
    document["model"]["merges"].reverse()
    report = tokenizer_report(path, json.dumps(document).encode())
    assert report.differences
    first = report.differences[0]
    assert first.text in corpus()[first.about]
    assert first.ids != first.expected


def test_a_special_token_that_is_text_in_the_gguf_is_found(tokenized: tuple[Path, bytes]) -> None:
    """Type 1 (normal) instead of 3: llama.cpp would never see the end of a turn in a prompt."""
    path, content = tokenized
    types = read_header(path).value("tokenizer.ggml.token_type")
    assert isinstance(types, list)
    document = json.loads(content)
    extra = dict(document["added_tokens"][1], id=len(types) - 1, content="</think>", special=True)
    document["added_tokens"][-1] = dict(extra, content="<|another|>")
    report = tokenizer_report(path, json.dumps(document).encode())
    assert {difference.about for difference in report.differences} >= {"<|another|>"}


def test_a_broken_tokenizer_is_one_line(tokenized: tuple[Path, bytes]) -> None:
    path, content = tokenized
    document = json.loads(content)
    for broken in (
        b"",
        b"[]",
        b'{"model": null}',
        json.dumps({**document, "normalizer": {"type": "NFC", "x": 1}, "truncation": 7}).encode(),
        json.dumps({**document, "model": {**document["model"], "merges": [["a", "never"]]}}).encode(),
    ):
        with pytest.raises(ConvertError) as caught:
            tokenizer_report(path, broken)
        assert str(caught.value).startswith("tokenizer.json")
        assert "\n" not in str(caught.value)
