"""Writes the miniature's tokenizer and configuration as files of a Hugging Face checkpoint.

It writes tokenizer.json, tokenizer_config.json, config.json and generation_config.json. It imports
only the standard library.

The tokenizer is Qwen2's (NFC, its splitting pattern, byte-level BPE) with merges that never join
two letters, so that a word reaches the model letter by letter and its letters can be counted.
"""

from __future__ import annotations

import json
from pathlib import Path

HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 512
N_LAYERS = 8
N_HEADS = 4
N_KV_HEADS = 1
HEAD_DIM = 64
N_CTX = 1024
ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-6
INITIALIZER_RANGE = 0.02
VOCAB_MULTIPLE = 32

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
ACCENTED_LETTERS = (
    "".join(chr(code) for code in range(0xC0, 0x100) if code not in (0xD7, 0xF7))
    + "ąćęłńśźżčďěňřšťůžğışőűăœĄĆĘŁŃŚŹŻČĎĚŇŘŠŤŮŽĞİŞŐŰĂŒ"
)
# Runs of spaces and newlines come first. Every other entry is built from the left, one piece at a time.
WHITESPACE = (" " * 2, " " * 4, " " * 8, " " * 16, "\n\n", "\r\n", "\t\t")
PUNCTUATION = (
    *(".\n", ".\n\n", ":\n", ":\n\n", ",\n", "?\n", "!\n", ";\n", "{\n", "}\n", ")\n", "():\n"),
    *(' "', " '", " (", " {", " [", " -", " +", " =", " ==", " <", " >", " /", " `", " \\", " #"),
    *('".', '",', '"?', '":', '")', "'.", "',", "'?", "...", "--", "---", "```", "``"),
    *(
        '{"',
        '"}',
        '"}\n',
        "}}",
        '":"',
        '","',
        "()",
        "):",
        "](",
        "://",
        "**",
        "##",
        "###",
        "!=",
        "==",
    ),
)
# (text, special), in the order in which QwQ numbers them.
ADDED_TOKENS = (
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end")),
    *((f"<|{name}|>", True) for name in ("object_ref_start", "object_ref_end")),
    *((f"<|{name}|>", True) for name in ("box_start", "box_end", "quad_start", "quad_end")),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad")),
    *((f"<|{name}|>", True) for name in ("image_pad", "video_pad")),
    *((text, False) for text in ("<tool_call>", "</tool_call>")),
    *((f"<|{name}|>", False) for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad")),
    *((f"<|{name}|>", False) for name in ("repo_name", "file_sep")),
    *((text, False) for text in ("<tool_response>", "</tool_response>", "<think>", "</think>")),
)

Json = dict[str, object]


def byte_symbols() -> list[str]:
    """The 256 characters that stand for the 256 bytes in a byte-level vocabulary, by byte."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, moved = [], 0
    for byte in range(256):
        symbols.append(chr(byte if byte in plain else 0x100 + moved))
        moved += byte not in plain
    return symbols


def spell(text: str) -> list[str]:
    """The byte symbols of `text`, one string each."""
    symbols = byte_symbols()
    return [symbols[byte] for byte in text.encode()]


def merges() -> list[tuple[str, str]]:
    """The merge rules, best first: runs of white space, letters with their space, punctuation."""
    rules: list[tuple[str, str]] = []
    for run in WHITESPACE:
        symbols = spell(run)
        half = len(symbols) // 2
        rules.append(("".join(symbols[:half]), "".join(symbols[half:])))
    rules.extend((first, second) for first, second in map(spell, ACCENTED_LETTERS))
    space = spell(" ")[0]
    rules.extend((space, "".join(spell(letter))) for letter in ASCII_LETTERS + ACCENTED_LETTERS)
    for text in PUNCTUATION:
        symbols = spell(text)
        for end in range(1, len(symbols)):
            rule = ("".join(symbols[:end]), symbols[end])
            if rule not in rules:
                rules.append(rule)
    return rules


def vocabulary() -> dict[str, int]:
    """Piece to token: bytes in GPT-2's order, then what each merge makes."""
    symbols = byte_symbols()
    pieces = sorted(symbols, key=ord) + [left + right for left, right in merges()]
    return {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}


def added_tokens() -> dict[str, int]:
    """Text to token of the control tokens; their numbers follow the vocabulary."""
    first = len(vocabulary())
    return {text: first + place for place, (text, _) in enumerate(ADDED_TOKENS)}


def vocab_size() -> int:
    """Rows of the embedding: all tokens, padded up as large checkpoints do."""
    used = len(vocabulary()) + len(ADDED_TOKENS)
    return -(-used // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def added_token_flags(special: bool) -> Json:
    """The fields of an added token in both tokenizer files."""
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {**plain, "special": special}


def tokenizer_json() -> Json:
    """The content of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    tokens = added_tokens()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens[text], "content": text, **added_token_flags(special)}
            for text, special in ADDED_TOKENS
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "trim_offsets": False}],
        },
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": {**byte_level, "trim_offsets": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary(),
            "merges": [" ".join(rule) for rule in merges()],
        },
    }


def tokenizer_config() -> Json:
    """The content of tokenizer_config.json, chat template included."""
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    tokens = added_tokens()
    decoder = {
        str(tokens[text]): {"content": text, **added_token_flags(special)} for text, special in ADDED_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [text for text, special in ADDED_TOKENS[1:] if special],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": N_CTX,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def model_config() -> Json:
    """The content of config.json, with the keys that QwQ's has."""
    tokens = added_tokens()
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": N_CTX,
        "max_window_layers": N_LAYERS,
        "model_type": "qwen2",
        "num_attention_heads": N_HEADS,
        "num_hidden_layers": N_LAYERS,
        "num_key_value_heads": N_KV_HEADS,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": ROPE_THETA,
        "sliding_window": N_CTX,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size(),
    }


def generation_config() -> Json:
    """The content of generation_config.json: QwQ's sampling."""
    tokens = added_tokens()
    return {
        "bos_token_id": tokens["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]],
        "pad_token_id": tokens["<|endoftext|>"],
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.95,
    }


def write_configuration(folder: Path) -> None:
    """Write everything of a checkpoint but the weights into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": model_config(),
        "generation_config.json": generation_config(),
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
