"""Compares llama.cpp's tokenizer, with a GGUF's vocabulary, with the `tokenizers` library.

The texts in tokenizer_texts.json are written for this check: where words end, which digits count as digits,
what joins an emoji, what a run of spaces leaves to the next word. All are in normalization form NFC, because
the library normalizes and llama.cpp does not. In plain text llama.cpp reads control tokens (type 3) as text
and user-defined ones (type 4) as tokens; the library is set up in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gguf import TokenType

from qwq_convert.strict_json import Fields, parse_object
from qwq_convert.tokenizer import read_vocabulary
from qwq_local.errors import ConvertError

TOKENIZER = "tokenizer.json"

Encode = Callable[[str, bool], Sequence[int]]
"""Text and whether control tokens are parsed in it; token ids."""


class TokenizersMissing(ConvertError):
    """The `tokenizers` library is not installed."""


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """A text about the subject `about` that the two tokenize differently."""

    about: str
    text: str
    ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """How many plain texts and texts with special tokens were compared, and those that differ."""

    n_plain: int
    n_special: int
    differences: tuple[TokenDifference, ...]


def compare_tokenizers(encode: Encode, tokenizer: bytes, token_types: Sequence[int]) -> TokenizerReport:
    """Compare `encode` with the tokenizer.json in `tokenizer` on every text.

    `token_types` are the GGUF's, by token. Raises TokenizersMissing when the library is not installed, and
    ConvertError when tokenizer.json is damaged or not Qwen's.
    """
    # First the converter's own reading, which refuses what the library would choke on.
    document = parse_object(tokenizer, TOKENIZER)
    added = read_vocabulary(document, Fields(TOKENIZER, {}), len(token_types)).added
    # In the reference, the GGUF's control tokens are the special ones.
    typed = [
        {**entry.values, "special": token_types[entry.integer("id")] == TokenType.CONTROL}
        for entry in document.objects("added_tokens")
    ]
    reference = _reference({**document.values, "added_tokens": typed})
    plain = [(about, text) for about, texts in corpus().items() for text in texts]
    special = [(token, text) for token in added for text in texts_with(token)]
    differences = []
    for texts, parse_special in ((plain, False), (special, True)):
        reference.encode_special_tokens = not parse_special
        for about, text in texts:
            ids, expected = tuple(encode(text, parse_special)), tuple(reference.encode(text).ids)
            if ids != expected:
                differences.append(TokenDifference(about, text, ids, expected))
    return TokenizerReport(len(plain), len(special), tuple(differences))


def _reference(document: object) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TokenizersMissing(
            "the tokenizer was not compared: the `tokenizers` library is not installed. "
            "Run: pip install tokenizers"
        ) from None
    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:
        # The library raises bare Exceptions for whatever it cannot read.
        raise ConvertError(f"{TOKENIZER}: the tokenizers library refuses it ({error}).") from None


@cache
def corpus() -> Mapping[str, Sequence[str]]:
    """The texts to compare, by subject."""
    content = files("qwq_convert").joinpath("tokenizer_texts.json").read_text(encoding="utf-8")
    texts: dict[str, list[str]] = json.loads(content)
    return texts


def texts_with(token: str) -> Iterator[str]:
    """A special token alone and in the contexts where tokenizers have differed."""
    yield token
    yield token + token
    yield f"a{token}b"
    yield f" {token} "
    yield f"word {token}\n\n{token} 's"
    yield f"\n{token}\n你好{token}é{token}1{token}<|"
