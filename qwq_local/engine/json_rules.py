"""The rules that every grammar for JSON shares: white space, strings, numbers, names, any value.

Bounds and names in, rule names and GBNF out. White space is bounded and numbers have a limited number of
digits, so that a model cannot go on with either for ever. Knows no JSON schema.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qwq_local.engine.gbnf import PLAIN, Ranges, Rules, char_class, common_ranges, literal, without_ranges
from qwq_local.errors import SchemaError

INTEGER_DIGITS = 18
ANY_DEPTH = 8
MAX_PREFIXES = 20_000

_HEX = "[0-9A-Fa-f]"
# \uXXXX: no surrogate alone, and a pair of them is one character.
_ESCAPE = (
    r'"\\" (["\\/bfnrt] | "u" ('
    f"[0-9A-CEFa-cef] {_HEX}{{3}} | [Dd] [0-7] {_HEX}{{2}} | "
    f'[Dd] [89ABab] {_HEX}{{2}} "\\\\u" [Dd] [C-Fc-f] {_HEX}{{2}}))'
)
_NUMBER = (
    f'"-"? ("0" | [1-9] [0-9]{{0,{INTEGER_DIGITS - 1}}}) ("." [0-9]{{1,17}})? ([eE] [-+]? [0-9]{{1,2}})?'
)


class JsonRules(Rules):
    """A grammar in the making that begins with the rules JSON needs; their names are its attributes.

    `edge` is the white space inside a bracket, `comma` and `colon` bring theirs with them, `character` is
    one character of a string, `string` and `number` are unbounded ones.
    """

    def __init__(self) -> None:
        super().__init__()
        line = self.add('"\\n" " "{0,16}', "line")
        self.edge = self.add(f"({line})?", "edge")
        self.comma = self.add(f'"," (" " | {line})?', "comma")
        self.colon = self.add('":" " "?', "colon")
        self._plain = self.add(char_class(PLAIN), "plain")
        self.character = self.add(f"{self._plain} | {_ESCAPE}", "character")
        self.string = self.add(f'"\\"" {self.character}* "\\""', "string")
        self.number = self.add(_NUMBER, "number")

    def repeated(self, item: str) -> str:
        """Any number of further items, each after a comma."""
        return self.add(f"{self.comma} {item}") + "*"

    def text_of_length(self, low: int, high: int | None, paths: Mapping[str, str]) -> str:
        """Strings of `low` to `high` characters; `paths` has the places of minLength and maxLength."""
        if low == 0 and high is None:
            return self.string
        low_path, high_path = paths.get("minLength", "#"), paths.get("maxLength", "#")
        return self.add(f'"\\"" {self.repeat(self.character, low, high, low_path, high_path)} "\\""')

    def any_value(self) -> str:
        """Any JSON value, up to ANY_DEPTH objects and arrays deep: a rule for each depth."""
        scalar = f'{self.string} | {self.number} | "true" | "false" | "null"'
        value = self.add(scalar)
        for _ in range(ANY_DEPTH):
            member = self.add(f"{self.string} {self.colon} {value}")
            value = self.add(
                f'{scalar} | "[]" | "[" {self.edge} {value} {self.repeated(value)} {self.edge} "]" | '
                f'"{{}}" | "{{" {self.edge} {member} {self.repeated(member)} {self.edge} "}}"'
            )
        return value

    def other_name(self, names: Collection[str]) -> str:
        """Strings that are none of `names`: without escapes, so that each has one spelling.

        One rule for each beginning of a name says how a string goes on after it, closing quote included.
        """
        if not names:
            return self.string
        following: dict[str, set[str]] = {"": set()}
        spelled = {name for name in names if all(_is_plain(character) for character in name)}
        for name in spelled:
            for end, character in enumerate(name):
                following.setdefault(name[:end], set()).add(character)
            following.setdefault(name, set())
            if len(following) > MAX_PREFIXES:
                raise SchemaError(f"#: property names begin in more than {MAX_PREFIXES:,} ways. Use fewer.")
        rules: dict[str, str] = {}
        for start in sorted(following, key=lambda start: (-len(start), start)):
            taken: Ranges = tuple((ord(character), ord(character)) for character in following[start])
            ways = [f'{char_class(without_ranges(PLAIN, taken))} {self._plain}* "\\""']
            ways += [f"{literal(c)} {rules[start + c]}" for c in sorted(following[start])]
            ways += [] if start in spelled else ['"\\""']
            rules[start] = self.add(" | ".join(ways))
        return self.add(f'"\\"" {rules[""]}')


def _is_plain(character: str) -> bool:
    return bool(common_ranges(PLAIN, ((ord(character), ord(character)),)))
