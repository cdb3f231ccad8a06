"""tokenizer.json and tokenizer_config.json in; the GGUF's tokens, token types and merges out.

Only Qwen2's tokenizer is understood: byte-level BPE behind one splitting pattern. Any other would convert
and then split text wrongly, without a word, so it is refused. Follows llama.cpp's converter
(conversion/base.py `get_vocab_base`, gguf-py's vocab.py); knows no special roles (see special_tokens.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf import TokenType

from qwq_convert.reading.strict_json import Fields, checked_text, shown

# What llama.cpp's pre-tokenizer "qwen2" implements (src/llama-vocab.cpp), as tokenizer.json spells it.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE_SYMBOL = "\u0120"  # a space in the byte-level alphabet
SENTENCEPIECE_SPACE = "\u2581"
LOOKS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
SPECIAL_BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens 0 to vocab_size - 1 with their types, the merges best first, and added texts by token."""

    pieces: list[str]
    types: list[int]
    merges: list[str]
    added: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _AddedToken:
    text: str
    special: bool


def read_vocabulary(tokenizer: Fields, tokenizer_config: Fields, vocab_size: int) -> Vocabulary:
    """The vocabulary with unused rows as `[PAD{i}]`; ConvertError when it is not Qwen2's or contradicts."""
    model = tokenizer.optional_object("model")
    if model is None:
        tokenizer.fail("model is missing. Download the file again.")
    _check_understood(tokenizer, model)
    added = _added_tokens(tokenizer, tokenizer_config, vocab_size)
    pieces = _learned_pieces(model, vocab_size)
    for token, entry in added.items():
        if pieces.get(token, entry.text) != entry.text:
            both = f"{shown(pieces[token])} and {shown(entry.text)}"
            tokenizer.fail(f"token {token} is both {both}. Download the file again.")
    texts, types = [], []
    for token in range(vocab_size):
        if token in added:
            text, kind = _typed(added[token])
        elif token in pieces:
            text, kind = pieces[token], TokenType.NORMAL
        else:
            text, kind = f"[PAD{token}]", TokenType.UNUSED
        texts.append(text)
        types.append(int(kind))
    checked_text("".join(texts), f"{tokenizer.source}: a token")
    _check_distinct(tokenizer, texts)
    return Vocabulary(texts, types, _merges(model), {entry.text: token for token, entry in added.items()})


def _check_distinct(tokenizer: Fields, texts: list[str]) -> None:
    """llama.cpp ends the process over a vocabulary in which two tokens are the same text."""
    seen: dict[str, int] = {}
    for token, text in enumerate(texts):
        if (first := seen.setdefault(text, token)) != token:
            tokenizer.fail(f"tokens {first} and {token} are both {shown(text)}. Download the file again.")


def _typed(entry: _AddedToken) -> tuple[str, TokenType]:
    # The reference takes tokens such as <|fim_prefix|> for control tokens by their looks.
    text = entry.text
    looks_special = text in LOOKS_SPECIAL or any(
        text.startswith(opening) and text.endswith(closing) for opening, closing in SPECIAL_BRACKETS
    )
    if entry.special or looks_special:
        return text, TokenType.CONTROL
    return text.replace(SENTENCEPIECE_SPACE, " "), TokenType.USER_DEFINED


def _learned_pieces(model: Fields, vocab_size: int) -> dict[int, str]:
    vocabulary = model.optional_object("vocab")
    if vocabulary is None or not vocabulary.values:
        model.fail("vocab is missing. Download the file again.")
    pieces: dict[int, str] = {}
    for piece, token in vocabulary.values.items():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            vocabulary.fail(f"{shown(piece)} is token {shown(token)}, config.json has {vocab_size} tokens.")
        if token in pieces:
            vocabulary.fail(f"token {token} is both {shown(pieces[token])} and {shown(piece)}.")
        pieces[token] = piece
    return pieces


def _added_tokens(tokenizer: Fields, config: Fields, vocab_size: int) -> dict[int, _AddedToken]:
    """Added tokens by id: tokenizer.json's first, then what only added_tokens_decoder knows."""
    stated = [(entry.integer("id", 0, vocab_size - 1), entry) for entry in tokenizer.objects("added_tokens")]
    decoder = config.optional_object("added_tokens_decoder")
    for key in decoder.values if decoder else ():
        if decoder is None or not key.isdecimal() or len(key) > 9 or int(key) >= vocab_size:
            config.fail(f"added_tokens_decoder has token {shown(key)}, config.json has {vocab_size} tokens.")
        entry = decoder.optional_object(key)
        if entry is not None:
            stated.append((int(key), entry))
    added: dict[int, _AddedToken] = {}
    tokens: dict[str, int] = {}
    for token, entry in stated:
        text = entry.optional_text("content")
        if not text:
            entry.fail("content is missing. Download the file again.")
        if tokens.setdefault(text, token) != token or added.get(token, _AddedToken(text, False)).text != text:
            entry.fail(f"{shown(text)} as token {token} contradicts an earlier entry. Download it again.")
        added.setdefault(token, _AddedToken(text, entry.flag("special")))
    return added


def _merges(model: Fields) -> list[str]:
    merges = model.items("merges")
    if not merges:
        model.fail("merges are missing. Download the file again.")
    written = []
    for place, merge in enumerate(merges):
        # Up to transformers 4.44 a merge was one text, since then it is a pair.
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(s, str) and s for s in pair):
            model.fail(f"merges[{place}] is {shown(merge)}, expected a pair. Download the file again.")
        written.append(" ".join(side.replace(" ", SPACE_SYMBOL) for side in pair))
    checked_text("".join(written), f"{model.source}: a merge")
    return written


def _check_understood(tokenizer: Fields, model: Fields) -> None:
    """Refuse every setting of tokenizer.json that llama.cpp's "qwen2" would not follow."""
    kind = model.optional_text("type")
    bpe_extras = ("byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    normalizer = tokenizer.optional_object("normalizer")
    decoder = tokenizer.optional_object("decoder")
    pattern = _split_pattern(tokenizer)
    reasons = {
        f"its model is {shown(kind)}": kind != "BPE",
        "its BPE has extras": any(model.values.get(key) for key in bpe_extras),
        "its normalizer is not NFC": normalizer is not None and normalizer.optional_text("type") != "NFC",
        "it splits text in another way": pattern != QWEN2_PATTERN,
        "its decoder is not ByteLevel": decoder is None or decoder.optional_text("type") != "ByteLevel",
        "its post-processor adds tokens": not _post_processor_adds_nothing(tokenizer),
    }
    for reason, applies in reasons.items():
        if applies:
            tokenizer.fail(f"is not Qwen2's tokenizer: {reason}. llama.cpp would split text differently.")


def _split_pattern(tokenizer: Fields) -> str | None:
    pre_tokenizer = tokenizer.optional_object("pre_tokenizer")
    steps = pre_tokenizer.objects("pretokenizers") if pre_tokenizer else []
    if [step.optional_text("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    pattern = split.optional_object("pattern")
    plain = split.optional_text("behavior") == "Isolated" and not split.flag("invert")
    if pattern is None or not plain or byte_level.flag("use_regex") or byte_level.flag("add_prefix_space"):
        return None
    return pattern.optional_text("Regex")


def _post_processor_adds_nothing(tokenizer: Fields) -> bool:
    processor = tokenizer.optional_object("post_processor")
    if processor is None:
        return True
    steps = processor.objects("processors") or [processor]
    return all(step.optional_text("type") == "ByteLevel" for step in steps)
