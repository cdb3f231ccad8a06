"""The segments of a prompt: control tokens, and text that is only ever text.

A prompt format writes its control tokens as `Control`. Everything else is a str, whoever wrote it, and is
encoded as plain text. So text from a file, a question or a tool cannot become a control token.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwq_local.engine.api import Vocabulary

Tools = Sequence[Mapping[str, object]]
"""Tool definitions, as an OpenAI-style API takes them."""

_TAGS = re.compile(r"</?(?:think|tool_call|tool_response)>")


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by its text; plain text where a vocabulary has no such token."""

    text: str


Segment = Control | str


def fixed(text: str) -> Iterator[Segment]:
    """The segments of a prompt format's own text, whose tags are control tokens. Never for other text."""
    start = 0
    for tag in _TAGS.finditer(text):
        yield text[start : tag.start()]
        yield Control(tag.group())
        start = tag.end()
    yield text[start:]


def encode_segments(segments: Iterable[Segment], vocabulary: Vocabulary) -> list[int]:
    """Token ids of the segments.

    Byte pairs merge across the border of two texts, as they did in training: adjacent texts are encoded
    as one.
    """
    tokens: list[int] = []
    texts: list[str] = []
    for segment in segments:
        control = vocabulary.special_tokens.get(segment.text) if isinstance(segment, Control) else None
        if control is None:
            texts.append(segment if isinstance(segment, str) else segment.text)
            continue
        tokens += encode_plain("".join(texts), vocabulary)
        tokens.append(control)
        texts.clear()
    return tokens + encode_plain("".join(texts), vocabulary)


def encode_plain(text: str, vocabulary: Vocabulary) -> list[int]:
    """Token ids of plain text in Unicode's composed form, NFC, in which the models were trained.

    Qwen's tokenizer.json normalises so, llama.cpp does not: a decomposed é would be other tokens.
    """
    return vocabulary.encode_text(unicodedata.normalize("NFC", text)) if text else []


def json_text(value: object) -> str:
    """JSON as the tojson filter of transformers writes it."""
    return json.dumps(value, ensure_ascii=False, default=dict)  # other mappings are objects too
