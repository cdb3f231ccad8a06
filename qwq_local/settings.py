"""Kinds of value that a setting can hold, and how a setting is declared.

A kind takes what TOML holds, or the text of a flag or an environment variable, and returns the value in the
field's type. It raises ValueError; the caller knows which key it was, and in which file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
MAX_TEXT_CHARS = 32_768
MAX_TOKENS = 1 << 20  # no window comes near it; keeps a typing error out of the memory plan


class Rule(Protocol):
    """What a key accepts. `accept` and `read` raise ValueError."""

    @property
    def allowed(self) -> str:
        """What is accepted, in words that follow "allowed:"."""

    def accept(self, value: object) -> object:
        """The value in the field's type, from what TOML holds."""

    def read(self, text: str) -> object:
        """What TOML would hold for the text of a flag or an environment variable."""

    def show(self, value: object) -> str:
        """The value as `read` takes it; text in quotes, a table by its names."""


def setting(default: T, rule: Rule, meaning: str) -> T:
    """A dataclass field that is a key of profiles: its default, what it accepts, and what it means."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning})


def rules_of(settings: type[Any]) -> dict[str, Rule]:
    """What each key of a dataclass of settings accepts."""
    return {each.name: each.metadata["rule"] for each in fields(settings) if "rule" in each.metadata}


def meanings_of(settings: type[Any]) -> dict[str, str]:
    """What each key of a dataclass of settings means."""
    return {each.name: each.metadata["meaning"] for each in fields(settings) if "rule" in each.metadata}


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `low` to `high`, whole or not, or a word that stands for a value."""

    low: float
    high: float
    whole: bool = False
    above_low: bool = False
    words: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def allowed(self) -> str:
        """The range, then the words."""
        kind = "a whole number" if self.whole else "a number"
        start = f"above {self.low:,} up" if self.above_low else f"from {self.low:,}"
        span = f"{kind} {start} to {self.high:,}"
        return " or ".join([span, *self.words])

    def accept(self, value: object) -> float | None:
        """An int or a float in the range (NaN is in none), or what a word stands for."""
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise ValueError(self.allowed)
        if not self.low <= value <= self.high or (self.above_low and value == self.low):
            raise ValueError(self.allowed)
        return value if self.whole else float(value)

    def read(self, text: str) -> object:
        """The number that the text spells, or the text itself if it is a word."""
        if text in self.words:
            return text
        return int(text) if self.whole else float(text)

    def show(self, value: object) -> str:
        """The word for the value if it has one, else its digits."""
        words = [word for word, meaning in self.words.items() if meaning == value]
        return words[0] if words else _plain(value)


@dataclass(frozen=True, slots=True)
class Switch:
    """On or off; with `auto`, also a third state in which the program decides."""

    auto: bool = False

    @property
    def allowed(self) -> str:
        """The words."""
        return "on, off or auto" if self.auto else "on or off"

    def accept(self, value: object) -> bool | None:
        """TOML's true and false, or a word."""
        if isinstance(value, bool):
            return value
        if value == "auto" and self.auto:
            return None
        if value in ("on", "off"):
            return value == "on"
        raise ValueError(self.allowed)

    def read(self, text: str) -> object:
        """The text; true and 1, false and 0 count as on and off."""
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text.lower())

    def show(self, value: object) -> str:
        """One of the words."""
        return "auto" if value is None else "on" if value else "off"


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few names; with `auto`, also none of them, so that the program decides."""

    options: tuple[str, ...]
    auto: bool = False

    @property
    def allowed(self) -> str:
        """The names."""
        return "one of " + ", ".join([*self.options, *(["auto"] if self.auto else [])])

    def accept(self, value: object) -> str | None:
        """The name, if it is one of them; None for auto."""
        if self.auto and value == "auto":
            return None
        if not isinstance(value, str) or value not in self.options:
            raise ValueError(self.allowed)
        return value

    def read(self, text: str) -> object:
        """The text."""
        return text

    def show(self, value: object) -> str:
        """The name."""
        return "auto" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Text:
    """Free text, or text of one form."""

    form: str = ""
    form_name: str = f"text of at most {MAX_TEXT_CHARS} characters"

    @property
    def allowed(self) -> str:
        """The form in words."""
        return self.form_name

    def accept(self, value: object) -> str:
        """The text, if it is short enough and of the form."""
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or "\0" in value:
            raise ValueError(self.allowed)
        if self.form and value and not re.fullmatch(self.form, value):
            raise ValueError(self.allowed)
        return value

    def read(self, text: str) -> object:
        """The text."""
        return text

    def show(self, value: object) -> str:
        """The text in quotes, with whatever does not print escaped."""
        return quoted(str(value))


@dataclass(frozen=True, slots=True)
class Several:
    """A list of values that each keep one rule; none comes twice."""

    each: Rule

    @property
    def allowed(self) -> str:
        """What the parts may be."""
        return f"a list without repetition, each {self.each.allowed}"

    def accept(self, value: object) -> tuple[object, ...]:
        """The parts as a tuple."""
        if not isinstance(value, list | tuple):
            raise ValueError(self.allowed)
        try:
            parts = tuple(self.each.accept(part) for part in value)
        except ValueError as error:
            raise ValueError(self.allowed) from error
        if len(set(parts)) != len(parts):
            raise ValueError(self.allowed)
        return parts

    def read(self, text: str) -> object:
        """The parts between commas."""
        return [self.each.read(part.strip()) for part in text.split(",")] if text.strip() else []

    def show(self, value: object) -> str:
        """The parts with commas between them."""
        return ",".join(self.each.show(part) for part in value) if isinstance(value, tuple) else ""


@dataclass(frozen=True, slots=True)
class Files:
    """A table from quantization type to a file's path inside its repository."""

    @property
    def allowed(self) -> str:
        """The shape of the table."""
        return "a table of quantization types and relative file names (written in a profile file)"

    def accept(self, value: object) -> Mapping[str, str]:
        """The table; a name that could lead out of a folder is refused."""
        if not isinstance(value, dict):
            raise ValueError(self.allowed)
        for name in value.values():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name):
                raise ValueError(self.allowed)
            if ".." in name.split("/"):
                raise ValueError(self.allowed)
        return dict(value)

    def read(self, text: str) -> object:
        """Refused: a table has no form on one line."""
        raise ValueError(self.allowed)

    def show(self, value: object) -> str:
        """The types, as a list."""
        return ",".join(value) if isinstance(value, Mapping) else ""


def tokens(low: int, **words: float | None) -> Number:
    """A number of tokens from `low` on, or a word."""
    return Number(low, MAX_TOKENS, whole=True, words=words)


def quoted(text: str) -> str:
    """The text in quotes on one line, with whatever does not print escaped."""
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'


def _plain(value: object) -> str:
    return repr(value).removesuffix(".0")
