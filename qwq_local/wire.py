"""Events as lines of JSON, and back. docs/jsonl.md describes the format, which is versioned there."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, TextIO, Union, get_args, get_origin, get_type_hints

from qwq_local.events import Event, Generated, Prompted, TurnStats

VERSION = 2
_WORD_START = re.compile(r"(?<!^)(?=[A-Z])")


def event_name(kind: type) -> str:
    """The name of an event in lines: its class's `event_name`, else `thinking_closed` for ThinkingClosed."""
    return getattr(kind, "event_name", None) or _WORD_START.sub("_", kind.__name__).lower()


def event_object(event: Event) -> dict[str, object]:
    """The event as a JSON object: `event`, its name, then all its fields; `event_of` turns it back."""
    return {"event": event_name(type(event)), **{name: plain(value) for name, value in _items(event)}}


def event_of(value: object) -> Event:
    """The event of a JSON object; fields that it does not know are ignored. Raises ValueError."""
    kind = _kinds().get(str(value.get("event"))) if isinstance(value, Mapping) else None
    if kind is None:
        raise ValueError(f"this is no event: {json.dumps(value)[:80]}")
    event: Event = decoded(kind, value)
    return event


def event_line(event: object) -> str:
    """The line that a reader of `--jsonl` gets: `v`, `event`, then the fields, as `readable` has them.

    Takes the events of a turn, of a split and of a conversion. Token ids make a line only with their
    log-probabilities, which a reader has asked for.
    """
    if isinstance(event, Prompted) or (isinstance(event, Generated) and event.logprobs is None):
        return ""
    fields = {name: readable(value) for name, value in _items(event)}
    return json_line({"event": event_name(type(event)), **fields})


def json_line(fields: Mapping[str, object]) -> str:
    """An object with `v` and these fields, which are JSON already, on one line."""
    line = json.dumps({"v": VERSION, **fields}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return line + "\n"


def readable(value: object) -> object:
    """The value as JSON for a reader: fractions have at most 4 digits, and TurnStats get their two rates."""
    shown = plain(value, 4)
    if isinstance(value, TurnStats) and isinstance(shown, dict):
        rates = {"prefill_rate": round(value.prefill_rate, 2), "decode_rate": round(value.decode_rate, 2)}
        return {**shown, **rates}
    return shown


def write_line(stream: TextIO, line: str) -> None:
    """Write a line and flush it."""
    stream.write(line)
    stream.flush()


def _items(value: Any) -> list[tuple[str, object]]:
    return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]


def plain(value: object, digits: int | None = None) -> object:
    """The value made of JSON's types, fractions rounded if `digits` are given.

    A dataclass becomes an object, a tuple an array, a path text. `decoded` turns the first two back.
    """
    if dataclasses.is_dataclass(value):
        return {name: plain(item, digits) for name, item in _items(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item, digits) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, digits) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return round(value, digits) if isinstance(value, float) and digits is not None else value


@cache
def _kinds() -> Mapping[str, type]:
    return {event_name(kind): kind for kind in get_args(Event)}


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def decoded(hint: Any, value: Any) -> Any:
    """The value as its type hint has it; fields that a dataclass lacks are ignored. Raises ValueError."""
    origin = get_origin(hint)
    if origin in (UnionType, Union):
        options = get_args(hint)
        return None if value is None and NoneType in options else decoded(options[0], value)
    if origin is tuple and isinstance(value, list):
        kinds = get_args(hint)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            raise ValueError(f"expected {hint}, got {len(value)} items")
        return tuple(decoded(kind, item) for kind, item in zip(kinds, value, strict=True))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = {name: kind for name, kind in _hints(hint).items() if name in value}
        try:
            return hint(**{name: decoded(kind, value[name]) for name, kind in known.items()})
        except TypeError as error:  # a field is missing
            raise ValueError(str(error)) from None
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, origin or hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"expected {hint}, got {value!r:.80}")
    return value
