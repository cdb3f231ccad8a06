"""The references for prompts: published chat templates rendered by Jinja, and a vocabulary."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import jinja2
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwq_local.dialogue.conversation import Message

ROOT = Path(__file__).parent.parent.parent
MINIATURE = (ROOT / "miniature" / "chat_template.jinja").read_text(encoding="utf-8")
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
SPECIAL = TURNS + TAGS + DEEPSEEK
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "system\nuser\nassistant\n\nHow many letters are in the word? There are 12 of them, I think.\n\n",
    'tool_call tool_response {"name": "add", "arguments": {"a": 1}}\n</ > <| |> im_start im_end think\n',
    "Привет, как дела?\n量子纠缠 は何ですか。\n\n    def f(x):\n        return x\n\n```json\n```\n",
)


@cache
def published(name: str) -> str:
    """A model's chat template, from the source of llama-cpp-python that `make test` keeps."""
    for archive in sorted((Path(sys.prefix) / "sdist").glob("llama_cpp_python-*.tar.gz")):
        with tarfile.open(archive) as files:
            for member in files:
                if member.name.endswith(f"/vendor/llama.cpp/models/templates/{name}.jinja"):
                    file = files.extractfile(member)
                    assert file is not None
                    return file.read().decode("utf-8")
    reason = f"no source of llama-cpp-python with {name}.jinja in {sys.prefix}/sdist: run make test"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@cache
def compiled(template: str) -> jinja2.Template:
    """The template as transformers compiles it."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template)


def rendered(template: str, messages: Sequence[Mapping[str, object]], tools: Sequence[object] = ()) -> str:
    """The prompt as transformers renders it."""
    return compiled(template).render(
        messages=messages,
        tools=list(tools) or None,
        add_generation_prompt=True,
        enable_thinking=True,
        bos_token="<｜begin▁of▁sentence｜>",
    )


def as_variables(messages: Sequence[Message], *, empty_is_none: bool = False) -> list[dict[str, object]]:
    """Messages as transformers takes them. `empty_is_none`: a reply of calls alone has no content."""
    variables: list[dict[str, object]] = []
    for message in messages:
        values: dict[str, object] = {"role": message.role.value, "content": message.content}
        if message.tool_calls:
            values["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
            if empty_is_none and not message.content:
                values["content"] = None
        variables.append(values)
    return variables


class BpeVocabulary:
    """A small byte-level BPE of the `tokenizers` library, with the special tokens of all formats.

    `plain` has no special tokens; `whole` finds them in a text, like llama.cpp with special parsing.
    """

    def __init__(self) -> None:
        self.plain = Tokenizer(models.BPE())
        self.plain.normalizer = normalizers.NFC()
        self.plain.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.plain.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=480, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        self.plain.train_from_iterator(_CORPUS * 4, trainer)
        self.whole = Tokenizer.from_str(self.plain.to_str())
        for pieces, is_special in ((TURNS + DEEPSEEK, True), (TAGS, False)):
            tokens = [AddedToken(piece, normalized=False, special=is_special) for piece in pieces]
            (self.whole.add_special_tokens if is_special else self.whole.add_tokens)(tokens)
        self._special = {piece: self.whole.token_to_id(piece) or 0 for piece in SPECIAL}

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special

    def encode_text(self, text: str) -> list[int]:
        return list(self.plain.encode(text).ids)

    def piece(self, token: int) -> bytes:
        return str(self.whole.decode([token], skip_special_tokens=False)).encode()

    def is_end(self, token: int) -> bool:
        return token in (self._special["<|im_end|>"], self._special["<|endoftext|>"])


@cache
def vocabulary() -> BpeVocabulary:
    return BpeVocabulary()
