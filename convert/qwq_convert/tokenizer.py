"""A checkpoint's tokenizer as the GGUF has it: tokens, types, merges, special tokens, chat template.

Only Qwen's tokenizer is accepted: byte-level BPE with one splitting pattern. Any other would convert and then
silently split text differently. Tokens follow llama.cpp's converter (conversion/base.py `get_vocab_base`,
gguf-py's vocab.py). Special tokens follow gguf-py's `SpecialVocab`, in its order; but a checkpoint without a
chat template or without an end token is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGUFWriter, Keys, TokenType

from qwq_convert.checkpoint import Checkpoint, optional_document
from qwq_convert.strict_json import Fields, checked_text, shown
from qwq_local.errors import ConvertError

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
class TokenTable:
    """Tokens 0 to vocab_size - 1 with their types, the merges, best first, and the ids of added texts."""

    pieces: list[str]
    types: list[int]
    merges: list[str]
    added: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _AddedToken:
    text: str
    special: bool


def read_vocabulary(tokenizer: Fields, tokenizer_config: Fields, vocab_size: int) -> TokenTable:
    """The vocabulary, with unused rows as `[PAD{i}]`. Raises ConvertError when it is not Qwen's."""
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
    # llama.cpp ends the process when two tokens are the same text.
    seen: dict[str, int] = {}
    for token, text in enumerate(texts):
        if (first := seen.setdefault(text, token)) != token:
            tokenizer.fail(f"tokens {first} and {token} are both {shown(text)}. Download the file again.")
    return TokenTable(texts, types, _merges(model), {entry.text: token for token, entry in added.items()})


def _typed(entry: _AddedToken) -> tuple[str, TokenType]:
    # The reference takes tokens that look like <|fim_prefix|> for control tokens.
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
    """Added tokens by id: those of tokenizer.json, then those that only added_tokens_decoder has."""
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
        # Up to transformers 4.44 a merge was one text; since then it is a pair.
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(s, str) and s for s in pair):
            model.fail(f"merges[{place}] is {shown(merge)}, expected a pair. Download the file again.")
        written.append(" ".join(side.replace(" ", SPACE_SYMBOL) for side in pair))
    checked_text("".join(written), f"{model.source}: a merge")
    return written


def _check_understood(tokenizer: Fields, model: Fields) -> None:
    """Refuse every setting of tokenizer.json that llama.cpp's pre-tokenizer "qwen2" ignores."""
    kind = model.optional_text("type")
    bpe_extras = ("byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    normalizer = tokenizer.optional_object("normalizer")
    decoder = tokenizer.optional_object("decoder")
    pattern = _split_pattern(tokenizer)
    processor = tokenizer.optional_object("post_processor")
    processors = processor.objects("processors") or [processor] if processor else []
    reasons = {
        f"its model is {shown(kind)}": kind != "BPE",
        "its BPE has extras": any(model.values.get(key) for key in bpe_extras),
        "its normalizer is not NFC": normalizer is not None and normalizer.optional_text("type") != "NFC",
        "it splits text in another way": pattern != QWEN2_PATTERN,
        "its decoder is not ByteLevel": decoder is None or decoder.optional_text("type") != "ByteLevel",
        "its post-processor adds tokens": any(
            step.optional_text("type") != "ByteLevel" for step in processors
        ),
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


ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_special_tokens(
    writer: GGUFWriter, tokenizer: Fields, tokenizer_config: Fields, config: Fields, vocabulary: TokenTable
) -> None:
    """Append the special tokens: those of tokenizer_config.json, then those that only config.json has.

    Flags that say whether a token is added to every text follow.
    """
    tokens: dict[str, int] = {}
    for role in ROLES:
        text = _text_of(tokenizer_config, f"{role}_token")
        if text is not None and text in vocabulary.added:
            tokens[role] = vocabulary.added[text]
    for role in ROLES:
        # config.json may have a list of end tokens; a GGUF cannot.
        if not isinstance(config.values.get(f"{role}_token_id"), list):
            token = config.optional_integer(f"{role}_token_id", 0, len(vocabulary.pieces) - 1)
            if token is not None:
                tokens.setdefault(role, token)
    if "eos" not in tokens:
        tokenizer_config.fail("eos_token is missing or no added token. Download the file again.")
    # A byte-level post-processor, the only kind accepted, adds neither of the two.
    has_post_processor = tokenizer.values.get("post_processor") is not None
    flags = {"bos": False, "eos": False} if has_post_processor else {}
    for role in ("bos", "eos", "sep"):
        if tokenizer_config.values.get(f"add_{role}_token") is not None:
            flags.setdefault(role, tokenizer_config.flag(f"add_{role}_token"))
    for role, token in tokens.items():
        writer.add_uint32(getattr(Keys.Tokenizer, f"{role.upper()}_ID"), token)
    for role, value in flags.items():
        writer.add_bool(getattr(Keys.Tokenizer, f"ADD_{role.upper()}"), value)


def add_chat_templates(writer: GGUFWriter, checkpoint: Checkpoint, tokenizer_config: Fields) -> None:
    """Append the templates of tokenizer_config.json, else chat_template.jinja, else chat_template.json."""
    named: dict[str, str] = {}
    if isinstance(tokenizer_config.values.get("chat_template"), list):
        for entry in tokenizer_config.objects("chat_template"):
            name = re.sub(r"[^A-Za-z0-9]", "_", entry.optional_text("name") or "")
            named[name] = entry.optional_text("template") or ""
        named.pop("", None)
        text = named.pop("default", None)
    else:
        text = tokenizer_config.optional_text("chat_template")
        if text is None and (content := checkpoint.document("chat_template.jinja")) is not None:
            text = _decode(content, "chat_template.jinja")
        if text is None:
            text = optional_document(checkpoint, "chat_template.json").optional_text("chat_template")
    if text is None or not text.strip():
        raise ConvertError(
            "tokenizer_config.json: no chat_template there, in chat_template.jinja or chat_template.json. "
            "Download the tokenizer's files again."
        )
    if empty := [name for name, template in named.items() if not template]:
        raise ConvertError(f"tokenizer_config.json: chat_template {shown(empty[0])} is empty. Remove it.")
    for name, template in named.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
    writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(named))
    writer.add_chat_template(text)


def _text_of(tokenizer_config: Fields, key: str) -> str | None:
    # In older files a token is an object with its flags.
    if isinstance(tokenizer_config.values.get(key), dict):
        entry = tokenizer_config.optional_object(key)
        return entry.optional_text("content") if entry else None
    return tokenizer_config.optional_text(key)


def _decode(content: bytes, source: str) -> str:
    try:
        return checked_text(content.decode("utf-8"), source)
    except UnicodeDecodeError:
        raise ConvertError(f"{source}: is not UTF-8 text. Download the file again.") from None
