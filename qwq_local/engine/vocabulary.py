"""A loaded vocabulary: plain text to token ids, token ids to bytes, by llama.cpp's own tokenizer."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwq_local.engine.library import library
from qwq_local.errors import EngineError

_CONTROL, _USER_DEFINED = 1 << 3, 1 << 4  # llama.cpp's LLAMA_TOKEN_ATTR_*
_MAX_TEXT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TokenPieces:
    """Every token of a vocabulary: its bytes by id, which ids are not text, and which end the generation."""

    pieces: list[bytes]
    special: list[int]
    ends: list[int]


class LlamaVocabulary:
    """The Vocabulary protocol over a llama.cpp vocabulary."""

    def __init__(self, handle: Any, special_ids: Sequence[int]) -> None:
        """`special_ids` are the tokens that the GGUF marks as control or user-defined."""
        self._lib = library()
        self._handle = handle
        self.size: int = self._lib.llama_vocab_n_tokens(handle)
        self._buffer = ctypes.create_string_buffer(256)
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}
        self._special = self._read_special(special_ids)
        self._breakable = self._breakable_pattern()

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every control and user-defined piece with its id."""
        return self._special

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text` as plain text: no control or user-defined token, whatever it contains."""
        if self._breakable is None:
            return self._tokenize(text)
        # llama.cpp parses user-defined tokens even in plain text, so each is cut after its first character.
        cuts = [match.start() + 1 for match in self._breakable.finditer(text)]
        if not cuts:
            return self._tokenize(text)
        tokens: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            tokens += self._tokenize(text[start:end])
        return tokens

    def encode_raw(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of `text` as llama.cpp itself gives them: user-defined tokens are always parsed, control
        tokens with `parse_special`. For comparing tokenizers; text from outside goes through `encode_text`.
        """
        return self._tokenize(text, parse_special)

    def piece(self, token: int) -> bytes:
        """The bytes of a token, special ones rendered; empty for a padding token."""
        cached = self._pieces.get(token)
        if cached is None:
            cached = self._pieces[token] = self._read_piece(token)
        return cached

    def is_end(self, token: int) -> bool:
        """Whether the token ends the generation: end of turn, end of text and their like."""
        cached = self._ends.get(token)
        if cached is None:
            cached = self._ends[token] = bool(self._lib.llama_vocab_is_eog(self._handle, token))
        return cached

    def table(self) -> TokenPieces:
        """All tokens at once; 152,064 of them take 0.25 s."""
        table = TokenPieces([], [], [])
        for token in range(self.size):
            piece = self._read_piece(token)
            attributes = self._lib.llama_vocab_get_attr(self._handle, token)
            is_tag = piece.startswith(b"<") and piece.endswith(b">")
            if attributes & _CONTROL or (attributes & _USER_DEFINED and is_tag):
                table.special.append(token)
                if self.is_end(token):
                    table.ends.append(token)
            table.pieces.append(piece)
        return table

    def _tokenize(self, text: str, parse_special: bool = False) -> list[int]:
        raw = text.encode("utf-8", "surrogatepass")
        if not raw:
            return []
        if len(raw) > _MAX_TEXT_BYTES:
            raise EngineError(f"a text of {len(raw):,} bytes is too long to tokenize.")
        room = len(raw) + 8  # a byte-level token holds at least one byte
        tokens = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._handle, raw, len(raw), tokens, room, False, parse_special)
        if count < 0:
            raise EngineError(f"llama.cpp could not tokenize a text of {len(raw):,} bytes.")
        return list(tokens[:count])

    def _read_piece(self, token: int) -> bytes:
        if not 0 <= token < self.size:
            raise EngineError(f"token {token} is outside the vocabulary of {self.size}.")
        length = self._lib.llama_token_to_piece(self._handle, token, self._buffer, len(self._buffer), 0, True)
        if length < 0:
            self._buffer = ctypes.create_string_buffer(-length)
            length = self._lib.llama_token_to_piece(self._handle, token, self._buffer, -length, 0, True)
        return self._buffer.raw[:length]

    def _read_special(self, special_ids: Sequence[int]) -> dict[str, int]:
        special = {}
        for token in special_ids:
            piece = self._read_piece(token).decode("utf-8", "replace")
            if piece:
                special[piece] = token
        return special

    def _breakable_pattern(self) -> re.Pattern[str] | None:
        user_defined = [
            re.escape(piece)
            for piece, token in self._special.items()
            if len(piece) > 1 and self._lib.llama_vocab_get_attr(self._handle, token) & _USER_DEFINED
        ]
        # A lookahead finds overlapping occurrences too.
        return re.compile(f"(?=(?:{'|'.join(user_defined)}))") if user_defined else None
