"""Values of a turn as the database holds them, and back: token ids as bytes, mappings as JSON.

What comes back is checked: a value of a wrong shape reads as an empty one, since the text beside it is still
of use.
"""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from qwq_local.events import TurnStats
from qwq_local.history.records import Origin

_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN = "I"  # four bytes on every platform that CPython runs on
_TOKEN_BYTES = 4


def packed_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as unsigned little-endian numbers of four bytes each."""
    numbers = array(_TOKEN, tokens)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def unpacked_tokens(packed: bytes) -> tuple[int, ...]:
    """The token ids again; a torn last one is dropped."""
    numbers = array(_TOKEN)
    numbers.frombytes(packed[: len(packed) // _TOKEN_BYTES * _TOKEN_BYTES])
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def storable(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", text)


def packed_json(value: object) -> str:
    """The value as compact JSON."""
    return storable(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def packed_texts(texts: Sequence[str]) -> str:
    """Texts as a JSON array."""
    return packed_json(list(texts))


def unpacked_texts(packed: str) -> tuple[str, ...]:
    """The texts again."""
    values = _parsed(packed)
    return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()


def unpacked_mapping(packed: str) -> dict[str, object]:
    """A JSON object as a mapping."""
    value = _parsed(packed)
    return value if isinstance(value, dict) else {}


def packed_origin(origin: Origin) -> str:
    """The origin as a JSON object."""
    return packed_json(asdict(origin))


def unpacked_origin(packed: str) -> Origin | None:
    """The origin again, None where there is none."""
    values = unpacked_mapping(packed)
    settings = values.get("settings", {})
    if not isinstance(values.get("model"), str) or not isinstance(settings, Mapping):
        return None
    return Origin(settings={str(k): str(v) for k, v in settings.items()}, **_fitting(Origin, values))


def packed_stats(stats: TurnStats) -> str:
    """Tokens and seconds as a JSON object."""
    return packed_json(asdict(stats))


def unpacked_stats(packed: str) -> TurnStats:
    """Tokens and seconds again."""
    return TurnStats(**_fitting(TurnStats, unpacked_mapping(packed)))


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def _fitting(kind: type[Origin | TurnStats], values: Mapping[str, object]) -> dict[str, Any]:
    """Those of the values that fields of the class have the type for."""
    types = {field.name: _KINDS.get(str(field.type), ()) for field in fields(kind)}
    return {name: value for name, value in values.items() if type(value) in types.get(name, ())}


def _parsed(packed: str) -> object:
    try:
        return json.loads(packed)
    except (ValueError, RecursionError):
        return None
