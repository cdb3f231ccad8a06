"""Messages in, token ids out: the prompt that the engine prefills.

Only what the template itself wrote is parsed for control tokens. Everything between two of them, the
template's plain writing and foreign text alike, is encoded as one stretch of plain text, because byte pairs
merge across the border: the ids of harmless text are those of tokenizing the whole prompt at once. Knows
no Jinja and no engine, only a Vocabulary.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwq_local.dialogue.conversation import Message, check_conversation
from qwq_local.dialogue.foreign import Part
from qwq_local.dialogue.template import ChatTemplate
from qwq_local.engine.api import Vocabulary


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of a prompt, a line for each correction of its template, and its text."""

    tokens: tuple[int, ...]
    notices: tuple[str, ...]
    text: str


def encode_prompt(
    template: ChatTemplate,
    messages: Sequence[Message],
    vocabulary: Vocabulary,
    tools: Sequence[Mapping[str, object]] = (),
) -> Prompt:
    """The prompt for the next reply, which ends inside the thinking it opens.

    Raises UsageError for messages or tools that make no conversation, TemplateError for a bad template.
    """
    check_conversation(messages)
    rendered = template.render(messages, tools)
    tokens = encode_parts(rendered.parts, vocabulary)
    return Prompt(tuple(tokens), rendered.notices, "".join(part.text for part in rendered.parts))


def encode_parts(parts: Sequence[Part], vocabulary: Vocabulary) -> list[int]:
    """Token ids of the parts: special pieces only where the template wrote them, the longest that fits."""
    special_tokens = vocabulary.special_tokens
    pieces = sorted(filter(None, special_tokens), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, pieces)) or r"(?!)")
    tokens: list[int] = []
    plain: list[str] = []

    def close_stretch() -> None:
        if stretch := "".join(plain):
            tokens.extend(encode_plain(stretch, vocabulary))
        plain.clear()

    for part in parts:
        position = 0
        for match in () if part.foreign else special.finditer(part.text):
            plain.append(part.text[position : match.start()])
            close_stretch()
            tokens.append(special_tokens[match.group()])
            position = match.end()
        plain.append(part.text[position:])
    close_stretch()
    return tokens


def encode_plain(text: str, vocabulary: Vocabulary) -> list[int]:
    """Token ids of plain text as the model was trained on it: in Unicode's composed form, NFC.

    Qwen's tokenizer.json normalises so, llama.cpp does not: a decomposed é would be other tokens.
    """
    return vocabulary.encode_text(unicodedata.normalize("NFC", text))
