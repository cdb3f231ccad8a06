"""Tokenizer documents in; the tokens with a role, the add-token flags and the chat template out.

Follows gguf-py's `SpecialVocab`: the order in which roles are found is the order in the GGUF. Unlike it, a
checkpoint without a chat template or without an end token is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGUFWriter, Keys

from qwq_convert.checkpoint import Checkpoint, optional_document
from qwq_convert.reading.strict_json import Fields, checked_text, shown
from qwq_convert.vocab import Vocabulary
from qwq_local.errors import ConvertError

ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
ROLES_WITH_ADD_FLAG = ("bos", "eos", "sep")


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The chat template, and the further ones that the checkpoint names."""

    default: str
    named: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens by role and add-token flags by role, each in the order in which the GGUF lists them."""

    tokens: Mapping[str, int]
    add_flags: Mapping[str, bool]


def find_special_tokens(
    tokenizer: Fields, tokenizer_config: Fields, config: Fields, vocabulary: Vocabulary
) -> SpecialTokens:
    """The roles that tokenizer_config.json gives, then those only config.json gives."""
    tokens: dict[str, int] = {}
    for role in ROLES:
        text = _text_of(tokenizer_config, f"{role}_token")
        if text is not None and text in vocabulary.added:
            tokens[role] = vocabulary.added[text]
    for role in ROLES:
        # config.json may hold a list of end tokens, which has no place in a GGUF.
        if not isinstance(config.values.get(f"{role}_token_id"), list):
            token = config.optional_integer(f"{role}_token_id", 0, len(vocabulary.pieces) - 1)
            if token is not None:
                tokens.setdefault(role, token)
    if "eos" not in tokens:
        tokenizer_config.fail("eos_token is missing or no added token. Download the file again.")
    return SpecialTokens(tokens, _add_flags(tokenizer, tokenizer_config))


def find_chat_templates(checkpoint: Checkpoint, tokenizer_config: Fields) -> ChatTemplates:
    """The template of tokenizer_config.json, else chat_template.jinja, else chat_template.json."""
    if isinstance(tokenizer_config.values.get("chat_template"), list):
        named = {
            _identifier(entry.optional_text("name") or ""): entry.optional_text("template") or ""
            for entry in tokenizer_config.objects("chat_template")
        }
        named.pop("", None)
        return _checked(named.pop("default", ""), named)
    text = tokenizer_config.optional_text("chat_template")
    if text is None and (content := checkpoint.document("chat_template.jinja")) is not None:
        text = _decode(content, "chat_template.jinja")
    if text is None:
        text = optional_document(checkpoint, "chat_template.json").optional_text("chat_template")
    return _checked(text or "", {})


def add_special_tokens(writer: GGUFWriter, special: SpecialTokens, templates: ChatTemplates) -> None:
    """Append the roles, flags and templates to the key-values of `writer`."""
    add_token = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "sep": writer.add_sep_token_id,
        "pad": writer.add_pad_token_id,
        "mask": writer.add_mask_token_id,
    }
    add_flag = {
        "bos": writer.add_add_bos_token,
        "eos": writer.add_add_eos_token,
        "sep": writer.add_add_sep_token,
    }
    for role, token in special.tokens.items():
        add_token[role](token)
    for role, value in special.add_flags.items():
        add_flag[role](value)
    for name, template in templates.named.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
    writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(templates.named))
    writer.add_chat_template(templates.default)


def _add_flags(tokenizer: Fields, tokenizer_config: Fields) -> dict[str, bool]:
    # A byte-level post-processor (the only kind vocab.py lets pass) adds neither of the two.
    has_post_processor = tokenizer.values.get("post_processor") is not None
    flags = {"bos": False, "eos": False} if has_post_processor else {}
    for role in ROLES_WITH_ADD_FLAG:
        if tokenizer_config.values.get(f"add_{role}_token") is not None:
            flags.setdefault(role, tokenizer_config.flag(f"add_{role}_token"))
    return flags


def _text_of(tokenizer_config: Fields, key: str) -> str | None:
    # Older files spell a token out as an object with its flags.
    if isinstance(tokenizer_config.values.get(key), dict):
        entry = tokenizer_config.optional_object(key)
        return entry.optional_text("content") if entry else None
    return tokenizer_config.optional_text(key)


def _identifier(name: str) -> str:
    return "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in name)


def _checked(default: str, named: dict[str, str]) -> ChatTemplates:
    if not default.strip():
        raise ConvertError(
            "tokenizer_config.json: no chat_template there, in chat_template.jinja or chat_template.json. "
            "Download the tokenizer's files again."
        )
    empty = [name for name, template in named.items() if not template]
    if empty:
        raise ConvertError(f"tokenizer_config.json: chat_template {shown(empty[0])} is empty. Remove it.")
    return ChatTemplates(default, named)


def _decode(content: bytes, source: str) -> str:
    try:
        return checked_text(content.decode("utf-8"), source)
    except UnicodeDecodeError:
        raise ConvertError(f"{source}: is not UTF-8 text. Download the file again.") from None
