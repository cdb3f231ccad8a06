"""What a setting accepts, and how a setting is declared.

A rule takes what TOML holds, or the text of a flag or an environment variable, and returns the value in the
field's type. It raises ValueError; the caller knows which key it was, and in which file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
MAX_TEXT_CHARS = 32_768
MAX_TOKENS = 1 << 20  # no window comes near it; keeps a typing error out of the memory plan


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key accepts; `allowed` says it in words that follow "allowed:".

    `accept` returns the value in the field's type, from what TOML holds. `read` returns what TOML would hold
    for the text of a flag or an environment variable. Both raise ValueError. `show` writes the value as
    `read` takes it; text in quotes, a table by its names. `names` are the values that have a name.
    """

    allowed: str
    accept: Callable[[object], object]
    read: Callable[[str], object] = str
    show: Callable[[object], str] = str
    names: tuple[str, ...] = ()


def setting(default: T, rule: Rule, meaning: str) -> T:
    """A dataclass field that is a key of profiles: its default, what it accepts, and what it means."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning})


def number(
    low: float,
    high: float,
    *,
    whole: bool = False,
    above_low: bool = False,
    words: Mapping[str, float | None] | None = None,
) -> Rule:
    """A number from `low` to `high`, whole or not, or a word that stands for a value."""
    meanings = words or {}

    def accept(value: object) -> float | None:
        if isinstance(value, str) and value in meanings:
            return meanings[value]
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ValueError
        # NaN is in no range.
        if not low <= value <= high or (above_low and value == low):
            raise ValueError
        return value if whole else float(value)

    def read(text: str) -> object:
        return text if text in meanings else int(text) if whole else float(text)

    def show(value: object) -> str:
        digits = repr(value).removesuffix(".0")
        return next((word for word, meaning in meanings.items() if meaning == value), digits)

    kind = "a whole number" if whole else "a number"
    start = f"above {low:,} up" if above_low else f"from {low:,}"
    return Rule(" or ".join([f"{kind} {start} to {high:,}", *meanings]), accept, read, show, tuple(meanings))


def tokens(low: int, **words: float | None) -> Rule:
    """A number of tokens from `low` on, or a word."""
    return number(low, MAX_TOKENS, whole=True, words=words)


def switch(*, auto: bool = False) -> Rule:
    """On or off; with `auto`, also a third state in which the program decides, None."""
    meanings = {"on": True, "off": False} | ({"auto": None} if auto else {})

    def accept(value: object) -> bool | None:
        if isinstance(value, str) and value in meanings:
            return meanings[value]
        if isinstance(value, bool):
            return value
        raise ValueError

    def read(text: str) -> object:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text.lower())

    def show(value: object) -> str:
        return "auto" if value is None else "on" if value else "off"

    return Rule("on, off or auto" if auto else "on or off", accept, read, show, tuple(meanings))


def one_of(*options: str, auto: bool = False) -> Rule:
    """One of a few names; with `auto`, also none of them, so that the program decides: None."""
    names = (*options, "auto") if auto else options

    def accept(value: object) -> str | None:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return None if auto and value == "auto" else value

    def show(value: object) -> str:
        return "auto" if value is None else str(value)

    return Rule("one of " + ", ".join(names), accept, show=show, names=names)


def free_text(form: str = "", form_name: str = f"text of at most {MAX_TEXT_CHARS} characters") -> Rule:
    """Text, empty or of a form."""

    def accept(value: object) -> str:
        if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or "\0" in value:
            raise ValueError
        if form and value and not re.fullmatch(form, value):
            raise ValueError
        return value

    return Rule(form_name, accept, show=lambda value: quoted(str(value)))


def several(each: Rule) -> Rule:
    """A list of values that each keep one rule, with commas between them as text; none comes twice."""

    def accept(value: object) -> tuple[object, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError
        parts = tuple(map(each.accept, value))
        if len(set(parts)) != len(parts):
            raise ValueError
        return parts

    def read(text: str) -> object:
        return [each.read(part.strip()) for part in text.split(",")] if text.strip() else []

    def show(value: object) -> str:
        return ",".join(map(each.show, value)) if isinstance(value, tuple) else ""

    return Rule(f"a list without repetition, each {each.allowed}", accept, read, show)


def file_table() -> Rule:
    """A table from quantization type to a file's path inside its repository; it has no form as text."""

    def accept(value: object) -> Mapping[str, str]:
        if not isinstance(value, dict):
            raise ValueError
        for name in value.values():
            # A name must not lead out of a folder.
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name):
                raise ValueError
            if ".." in name.split("/"):
                raise ValueError
        return dict(value)

    def show(value: object) -> str:
        return ",".join(value) if isinstance(value, Mapping) else ""

    allowed = "a table of quantization types and relative file names (written in a profile file)"
    # `accept` refuses every text.
    return Rule(allowed, accept, show=show)


def quoted(text: str) -> str:
    """The text in quotes on one line, with whatever does not print escaped."""
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
