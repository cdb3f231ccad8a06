"""Whether llama.cpp, with a GGUF's vocabulary, gives the ids that the `tokenizers` library gives.

llama.cpp's side comes in as a function, the other as tokenizer.json. Plain text means the same on both: in a
GGUF, tokens of type 3 (control) are text then, those of type 4 (user-defined) are tokens all the same; the
library is told so. Knows no files and no llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gguf import TokenType

from qwq_convert.reading.strict_json import Fields, parse_object
from qwq_convert.verification.tokenizer_corpus import TEXTS, texts_with
from qwq_convert.vocab import read_vocabulary
from qwq_local.errors import ConvertError

TOKENIZER = "tokenizer.json"

Encode = Callable[[str, bool], Sequence[int]]
"""Text and whether control tokens are parsed in it; token ids."""


class TokenizersMissing(ConvertError):
    """The `tokenizers` library is not installed."""


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Reference(Protocol):
    encode_special_tokens: bool

    def encode(self, sequence: str, /) -> _Encoding: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """A text of the corpus part `about` that the two tokenize differently."""

    about: str
    text: str
    ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """How many texts were compared, plain ones and with special tokens to parse, and those that differ."""

    n_plain: int
    n_special: int
    differences: tuple[Difference, ...]


def compare_tokenizers(encode: Encode, tokenizer: bytes, token_types: Sequence[int]) -> TokenizerReport:
    """What `encode` and the tokenizer.json in `tokenizer` make of every text of the corpus.

    `token_types` are the GGUF's, by token. Raises TokenizersMissing when there is nothing to compare with,
    ConvertError when tokenizer.json is damaged or not Qwen2's.
    """
    # First the converter's own reading, which refuses what the library would choke on.
    document = parse_object(tokenizer, TOKENIZER)
    added = read_vocabulary(document, Fields(TOKENIZER, {}), len(token_types)).added
    reference = _reference(_typed_as_the_gguf(document, token_types))
    plain = [(about, text) for about, texts in TEXTS.items() for text in texts]
    special = [(token, text) for token in added for text in texts_with(token)]
    differences = []
    for texts, parse_special in ((plain, False), (special, True)):
        reference.encode_special_tokens = not parse_special
        for about, text in texts:
            ids, expected = tuple(encode(text, parse_special)), tuple(reference.encode(text).ids)
            if ids != expected:
                differences.append(Difference(about, text, ids, expected))
    return TokenizerReport(len(plain), len(special), tuple(differences))


def _typed_as_the_gguf(document: Fields, token_types: Sequence[int]) -> dict[str, object]:
    """tokenizer.json with those added tokens special, so text when plain, that are control tokens there."""
    added = [
        {**entry.values, "special": token_types[entry.integer("id")] == TokenType.CONTROL}
        for entry in document.objects("added_tokens")
    ]
    return {**document.values, "added_tokens": added}


def _reference(document: object) -> _Reference:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TokenizersMissing(
            "the tokenizer was not compared: the `tokenizers` library is not installed. "
            "Run: pip install tokenizers"
        ) from None
    try:
        reference: _Reference = Tokenizer.from_str(json.dumps(document))
    except Exception as error:
        # The library raises bare Exceptions for whatever it cannot read.
        raise ConvertError(f"{TOKENIZER}: the tokenizers library refuses it ({error}).") from None
    return reference
