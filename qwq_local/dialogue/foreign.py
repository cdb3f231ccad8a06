"""Text that the template did not write, kept apart from what it did while it renders.

Each text from a file, a question, the history or a tool goes in as a short place holder that answers
for the whole text: what a template asks of it (`startswith`, `in`, `length`) it asks of the text, what it
makes of it (`trim`, `split`) is another place holder. Out comes the rendered prompt, in parts that know
who wrote them. Knows no Jinja and no tokens.

The place holders are made of Unicode noncharacters. No foreign text is ever searched for them, so one that
contains them comes through unharmed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from qwq_local.errors import TemplateError

OPEN, CLOSE, ESCAPED = "\ufdd0", "\ufdd1", "\ufdd2"
PLACE = re.compile(f"{OPEN}([0-9]{{1,9}})({ESCAPED}*){CLOSE}")
MAX_ESCAPES = 2
# A template takes such tags for its own; text that holds one is handed over unreadable.
_TAG = re.compile(r"</?(?:think|tool_call|tool_response)>|<\|")
_QUESTIONS = """count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper rfind rindex startswith __contains__ __len__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__"""
_CHANGES = """capitalize casefold lower lstrip partition removeprefix removesuffix replace rpartition
    rsplit rstrip split splitlines strip swapcase title upper __getitem__"""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the rendered prompt; `foreign` when the template did not write it."""

    text: str
    foreign: bool


class ForeignText(str):
    """A str whose characters are the place holder and whose methods answer for the text it stands for."""

    __slots__ = ("_root", "_text", "_texts")
    _texts: ForeignTexts
    _text: str
    _root: int

    @classmethod
    def standing_for(cls, text: str, place: str, texts: ForeignTexts, root: int) -> ForeignText:
        """The place holder `place` for `text`; `root` is the index of the text that it was made from."""
        made = str.__new__(cls, place)
        made._text, made._texts, made._root = text, texts, root
        return made

    def __hash__(self) -> int:
        return hash(self._text)

    def __iter__(self) -> Iterator[str]:
        return (self._texts.add(character, self._root) for character in self._text)

    def __repr__(self) -> str:
        return str(self._texts.add(repr(self._text), self._root))

    def made(self, result: object) -> object:
        """The result of a str method on the text, with every string in it foreign again."""
        if isinstance(result, str):
            return self if result is self._text else self._texts.add(result, self._root)
        if isinstance(result, list | tuple):
            return type(result)(self.made(item) for item in cast("list[object]", result))
        return result


def text_of(value: object) -> object:
    """What a foreign text stands for; anything else as it is, tuples looked into."""
    if isinstance(value, ForeignText):
        return value._text
    return tuple(text_of(item) for item in value) if isinstance(value, tuple) else value


def _on_the_text(name: str) -> Callable[..., object]:
    method = cast(Callable[..., object], getattr(str, name))

    def call(self: ForeignText, *args: object, **options: object) -> object:
        return self.made(method(self._text, *map(text_of, args), **options))

    call.__name__ = name
    return call


for _name in (*_QUESTIONS.split(), *_CHANGES.split()):
    setattr(ForeignText, _name, _on_the_text(_name))


class ForeignTexts:
    """The foreign texts of one rendering. `budget` bounds the characters that a template makes of them."""

    def __init__(self, budget: int) -> None:
        self._texts: list[str] = []
        self._roots: list[int] = []
        self._budget = budget

    def __len__(self) -> int:
        return len(self._texts)

    def give(self, text: str) -> str:
        """What the template gets for a text; empty text stays itself, so that it is false in a test."""
        index = len(self._texts)
        given = self._register(text, index) if text else ""
        return str.__str__(given) if _TAG.search(text) else given

    def give_json(self, value: object) -> object:
        """The same JSON value with every string and key in it foreign."""
        if isinstance(value, str):
            return self.give(value)
        if isinstance(value, Mapping):
            items = cast(Mapping[str, object], value).items()
            # A key stays readable whatever it holds: it is looked up by its text.
            return {self._register(key, len(self._texts)): self.give_json(item) for key, item in items}
        if isinstance(value, list | tuple):
            return [self.give_json(item) for item in cast("list[object]", value)]
        return value

    def add(self, text: str, root: int) -> str:
        """A text that the template made of the one numbered `root`, counted against the budget."""
        self._budget -= len(text) + 64
        if self._budget < 0:
            raise TemplateError("The chat template copies the messages too often. Use another GGUF.")
        return self._register(text, root) if text else ""

    def _register(self, text: str, root: int) -> ForeignText:
        place = f"{OPEN}{len(self._texts)}{CLOSE}"
        self._texts.append(text)
        self._roots.append(root)
        return ForeignText.standing_for(text, place, self, root)

    def split(self, rendered: str) -> tuple[Part, ...]:
        """The rendered text in parts, foreign texts put back. Raises TemplateError for broken places."""
        parts: list[Part] = []
        position = 0
        for match in PLACE.finditer(rendered):
            parts.append(Part(rendered[position : match.start()], foreign=False))
            parts.append(Part(self._text_at(match), foreign=True))
            position = match.end()
        parts.append(Part(rendered[position:], foreign=False))
        if any(mark in part.text for part in parts if not part.foreign for mark in (OPEN, CLOSE, ESCAPED)):
            raise TemplateError("The chat template cuts the messages into pieces. Use another GGUF.")
        return tuple(part for part in parts if part.text)

    def roots_in(self, rendered: str) -> set[int]:
        """The numbers of the given texts of which something is in the rendered text."""
        found = (int(match.group(1)) for match in PLACE.finditer(rendered))
        return {self._roots[index] for index in found if index < len(self._roots)}

    def _text_at(self, match: re.Match[str]) -> str:
        index, escapes = int(match.group(1)), len(match.group(2))
        if index >= len(self._texts) or escapes > MAX_ESCAPES:
            raise TemplateError("The chat template writes what it cannot mean. Use another GGUF.")
        text = self._texts[index]
        for _ in range(escapes):
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        return text


def escape_places(written: str) -> str:
    """JSON text in which the foreign texts will be escaped once more, as its other strings were."""
    return PLACE.sub(lambda match: f"{OPEN}{match.group(1)}{match.group(2)}{ESCAPED}{CLOSE}", written)


def width(text: str) -> int:
    """Characters that a str really takes up, a foreign text its place holder only."""
    return str.__len__(text)
