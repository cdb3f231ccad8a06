"""The header of a GGUF: key-values and tensors, of all parts when the file is split.

The converter's reader reads the format and checks every length against the file. Here its errors become
ModelFileError. architecture.py checks what the header says about the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwq_convert.gguf_file import GgufHeader, TensorEntry, read_parts

from qwq_local.errors import ConvertError, ModelFileError

TOKENS_KEY = "tokenizer.ggml.tokens"
_SPECIAL_TYPES = (3, 4)


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF says of itself: key-values, and tensors by name. Shapes have the rows first.

    `parts` are the headers of its files, one unless it is split.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    parts: tuple[GgufHeader, ...]

    @property
    def _first(self) -> GgufHeader:
        return self.parts[0]

    @property
    def architecture(self) -> str:
        """The name of the architecture, with which the keys of the model's figures begin; else empty."""
        return self.text("general.architecture")

    def scalar(self, key: str) -> str | int | float | bool | None:
        """The value under `key`; None when it is absent or an array."""
        if key not in self._first.keys:
            return None
        value = self._first.value(key)
        return None if isinstance(value, list) else value

    def text(self, key: str, default: str = "") -> str:
        """The string under `key`, or the default when it is absent or not a string."""
        value = self.scalar(key)
        return value if isinstance(value, str) else default

    def integer(self, key: str) -> int | None:
        """The integer under `key`, or None."""
        value = self.scalar(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def array_length(self, key: str) -> int | None:
        """The number of values in the array under `key`, or None when there is no array."""
        return self._first.array_length(key)


def special_token_ids(header: Header) -> tuple[int, ...]:
    """The tokens that the file marks as control (type 3) or user-defined (type 4), in order."""
    key = "tokenizer.ggml.token_type"
    if header.array_length(key) is None:
        return ()
    types = header._first.value(key)
    assert isinstance(types, list)
    return tuple(i for i, kind in enumerate(types) if kind in _SPECIAL_TYPES)


def read_header(path: Path) -> Header:
    """The header of a GGUF file and, when it is the first of several parts, of them all.

    Raises ModelFileError in one line when the file is not a GGUF, is cut short, or contradicts itself.
    """
    try:
        return header_of(read_parts(path))
    except ConvertError as error:
        raise ModelFileError(str(error)) from None


def header_of(parts: Sequence[GgufHeader]) -> Header:
    """The header of a GGUF whose parts have been read. Raises ModelFileError when it contradicts itself."""
    first, path = parts[0], parts[0].path
    n_tokens = first.array_length(TOKENS_KEY)
    try:
        n_twice = 0 if n_tokens is None else n_tokens - first.n_distinct(TOKENS_KEY)
    except ConvertError as error:
        raise ModelFileError(str(error)) from None
    if n_twice:
        # llama.cpp asserts that no token is there twice.
        raise ModelFileError(f"{path} is damaged: {n_twice} tokens are there twice. Fetch it again.")
    return Header(path, {tensor.name: tensor for part in parts for tensor in part.tensors}, tuple(parts))
