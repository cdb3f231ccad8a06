"""JSON from unknown sources, read as typed fields. Every fault is one line that names the file.

It is stricter than `json.loads` where that hides damage: a key given twice, NaN, Infinity, a lone surrogate
in a text that is asked for, and endless nesting are errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qwq_local.errors import ConvertError

U32_MAX = 2**32 - 1
F32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one JSON object, each read as an expected type.

    `source` is the file (and the place in it) that a message names. A field that is null counts as absent.
    """

    source: str
    values: Mapping[str, object]

    def fail(self, message: str) -> NoReturn:
        """Raise ConvertError with the name of this file before `message`."""
        raise ConvertError(f"{self.source}: {message}")

    def integer(self, key: str, least: int = 0, most: int = U32_MAX) -> int:
        """The whole number under `key`, from `least` to `most`. Raises ConvertError when it is absent."""
        value = self.optional_integer(key, least, most)
        if value is None:
            self.fail(f"{key} is missing. Download the file again.")
        return value

    def optional_integer(self, key: str, least: int = 0, most: int = U32_MAX) -> int | None:
        """The same as `integer`, but None when it is absent."""
        value: int | None = self._checked(
            key,
            f"a whole number from {least} to {most}",
            lambda value: type(value) is int and least <= value <= most,
        )
        return value

    def optional_number(self, key: str) -> float | None:
        """The finite number under `key` that a 32-bit float can hold, or None."""
        value: float | None = self._checked(
            key, "a number", lambda value: type(value) in (int, float) and abs(value) <= F32_MAX
        )
        return value

    def positive(self, key: str) -> float:
        """The number under `key`, above zero. Raises ConvertError when it is absent."""
        value = self.optional_number(key)
        if value is None:
            self.fail(f"{key} is missing. Download the file again.")
        if value <= 0:
            self.fail(f"{key} is {shown(value)}, expected a number above 0.")
        return value

    def flag(self, key: str) -> bool:
        """Whether `key` holds true. Raises ConvertError for a value that is neither true nor false."""
        return bool(self._checked(key, "true or false", lambda value: isinstance(value, bool)))

    def optional_text(self, key: str) -> str | None:
        """The text under `key`, or None."""
        value = self._checked(key, "a text", lambda value: isinstance(value, str))
        return None if value is None else checked_text(value, f"{self.source}: {named(key)}")

    def optional_object(self, key: str) -> Fields | None:
        """The fields of the object under `key`, or None."""
        value = self._checked(key, "an object", lambda value: isinstance(value, dict))
        return None if value is None else Fields(f"{self.source}: {named(key)}", value)

    def items(self, key: str) -> list[object]:
        """The list under `key`; an empty one when it is absent."""
        return self._checked(key, "a list", lambda value: isinstance(value, list)) or []

    def objects(self, key: str) -> list[Fields]:
        """The objects in the list under `key`."""
        found = []
        for place, value in enumerate(self.items(key)):
            if not isinstance(value, dict):
                self.fail(f"{key}[{place}] is {shown(value)}, expected an object.")
            found.append(Fields(f"{self.source}: {key}[{place}]", value))
        return found

    def _checked(self, key: str, expected: str, is_right: Callable[[Any], bool]) -> Any:
        value = self.values.get(key)
        if value is not None and not is_right(value):
            self.fail(f"{named(key)} is {shown(value)}, expected {expected}.")
        return value


def parse_object(content: bytes, source: str) -> Fields:
    """The fields of a JSON object. Raises ConvertError, which names `source`, for other content."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ConvertError(f"{source}: is nested too deeply. Download the file again.") from None
    except ValueError as error:
        raise ConvertError(f"{source}: is not valid JSON ({error}). Download the file again.") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{source}: is not a JSON object. Download the file again.")
    return Fields(source, value)


def checked_text(text: str, source: str) -> str:
    """`text` itself. Raises ConvertError when it cannot be encoded, as a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConvertError(f"{source} is not valid Unicode text. Download the file again.") from None
    return text


def shown(value: object) -> str:
    """`value` for a message: one line of at most 40 characters."""
    text = "infinity" if isinstance(value, float) and not math.isfinite(value) else repr(value)[:200]
    return text if len(text) <= 40 else text[:37] + "..."


def named(key: str) -> str:
    """A key for a message, shortened when it is long or would not print on one line."""
    return key if len(key) <= 80 and key.isprintable() else shown(key)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(repeated)} appears twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
