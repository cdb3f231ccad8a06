"""Pieces of llama.cpp's grammar language (GBNF): literals, character classes, numbers, repetitions, rules.

Code points, bounds and rule bodies in, GBNF text out. A piece of text never ends in a bare alternative
where that would matter: whoever joins pieces puts them in parentheses or into a rule. Knows JSON's
spelling of strings and numbers, no JSON schema.

What llama.cpp's parser does with repetitions decides the limits here: more than 2,000 of an item are
refused, an upper bound above that silently becomes none, and a repeated group counts once for each rule
inside it. So only rule names and single classes are ever repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwq_local.errors import SchemaError

Ranges = tuple[tuple[int, int], ...]

MAX_REPEAT = 2_000  # llama.cpp's MAX_REPETITION_THRESHOLD
MAX_LONG_REPEAT = 100_000
MAX_RULES = 50_000
MAX_CHARACTERS = 1_000_000
BLOCK = 1_000

UNICODE: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
# What stands for itself in a JSON string. Surrogates are out: llama.cpp would take them from three bytes.
PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))
_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}


class Rules:
    """A grammar in the making: named rules, the same body only once, within limits."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._characters = 0
        self._expanded = 0

    def reserve(self, name: str | None = None) -> str:
        """A new name whose body `define` gives later, so that a rule can refer to itself."""
        name = name or f"r{len(self._bodies)}"
        self._bodies[name] = ""
        self._count(1)
        return name

    def define(self, name: str, body: str) -> None:
        """Give the reserved `name` its body. Raises SchemaError when the grammar grows past its limit."""
        self._bodies[name] = body
        self._characters += len(body)
        if self._characters > MAX_CHARACTERS:
            raise SchemaError(
                f"#: the grammar needs more than {MAX_CHARACTERS:,} characters. Use a smaller schema."
            )

    def add(self, body: str, name: str | None = None) -> str:
        """The name of a rule with this body: a known one, or a new one (called `name`)."""
        if body not in self._names:
            self._names[body] = self.reserve(name)
            self.define(self._names[body], body)
        return self._names[body]

    def repeat(self, item: str, low: int, high: int | None, low_path: str, high_path: str) -> str:
        """`item` (a rule name) `low` to `high` times; the paths are those of the keywords that say so."""
        for count, limit, path in ((low, MAX_REPEAT, low_path), (high or 0, MAX_LONG_REPEAT, high_path)):
            if count > limit:
                raise SchemaError(f"{path}: {count:,} is more than the {limit:,} that a grammar can count.")
        if high == 0:
            return '""'
        self._count(low + (1 if high is None else min(high - low, MAX_REPEAT)))
        if high is None or high <= MAX_REPEAT:
            return f"{item}{{{low},{'' if high is None else high}}}"
        start = f"{item}{{{low}}} " if low else ""
        return start + self._long_tail(item, high - low)

    def _long_tail(self, item: str, high: int) -> str:
        """Up to `high` items as a chain of full blocks, each of which may be the last and then short."""
        block = self.add(f"{item}{{{BLOCK}}}")
        short = self.add(f"{item}{{0,{BLOCK - 1}}}")
        blocks, rest = divmod(high, BLOCK)
        tail = self.add(f"{item}{{0,{rest}}}")
        for _ in range(blocks):
            tail = self.add(f"{block} {tail} | {short}")
        return tail

    def _count(self, rules: int) -> None:
        self._expanded += rules
        if self._expanded > MAX_RULES:
            raise SchemaError(f"#: the grammar needs more than {MAX_RULES:,} rules. Use a smaller schema.")

    def text(self) -> str:
        """The whole grammar, one rule a line, in the order in which the rules were named."""
        return "".join(f"{name} ::= {body}\n" for name, body in self._bodies.items())


def literal(text: str) -> str:
    """The GBNF literal that stands for exactly `text` (no lone surrogates)."""
    return '"' + "".join("\\" + c if c in '"\\' else _written(ord(c)) for c in text) + '"'


def _written(code: int) -> str:
    if chr(code).isascii() and (chr(code).isalnum() or chr(code) in " _{}:,.'()/+<>=@#%&*;?!|~`$"):
        return chr(code)
    if code > 0xFFFF:
        return f"\\U{code:08X}"
    return f"\\u{code:04X}" if code > 0xFF else f"\\x{code:02X}"


def char_class(ranges: Ranges) -> str:
    """The GBNF class of the code points in `ranges`, which is not empty."""
    parts = (_written(low) + (f"-{_written(high)}" if high > low else "") for low, high in ranges)
    return f"[{''.join(parts)}]"


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points, sorted, in as few ranges as possible."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def common_ranges(one: Ranges, other: Ranges) -> Ranges:
    """The code points in both."""
    return merge_ranges((max(a, c), min(b, d)) for a, b in one for c, d in other if max(a, c) <= min(b, d))


def without_ranges(ranges: Ranges, removed: Ranges) -> Ranges:
    """The code points in `ranges` and not in `removed`."""
    kept: list[tuple[int, int]] = []
    start = 0
    for low, high in (*merge_ranges(removed), (0x110000, 0x110000)):
        if start < low:
            kept.append((start, low - 1))
        start = high + 1
    return common_ranges(ranges, tuple(kept))


def spelled_character(ranges: Ranges) -> str | None:
    """One character of `ranges` as a JSON string spells it, or None when there is no spelling.

    Plain characters stand for themselves; of the others only those with a short escape are offered.
    """
    plain = common_ranges(ranges, PLAIN)
    parts = [char_class(plain)] if plain else []
    for character, letter in _ESCAPES.items():
        if common_ranges(ranges, ((ord(character), ord(character)),)):
            parts.append(literal("\\" + letter))
    return " | ".join(parts) or None


def integer_between(low: int, high: int) -> str:
    """Every integer from `low` to `high` in decimal, without leading zeros; empty when there is none."""
    parts: list[str] = []
    if low < 0:
        negative = " | ".join(_positive_between(max(1, -high), -low))
        parts += [f'"-" ({negative})'] if negative else []
    if low <= 0 <= high:
        parts.append('"0"')
    parts += _positive_between(max(1, low), high)
    return " | ".join(parts)


def _positive_between(low: int, high: int) -> Iterator[str]:
    """Alternatives for 1 <= low <= n <= high: the lengths that are full first, then the cut ones."""
    if low > high:
        return
    shortest, longest = len(str(low)), len(str(high))
    full = [n for n in range(shortest, longest + 1) if low <= 10 ** (n - 1) and 10**n - 1 <= high]
    if full:
        yield f"[1-9] [0-9]{{{full[0] - 1},{full[-1] - 1}}}"
    for length in sorted({shortest, longest} - set(full)):
        yield _digits_between(str(max(low, 10 ** (length - 1))), str(min(high, 10**length - 1)))


def _digits_between(low: str, high: str) -> str:
    """Alternatives for the digit strings from `low` to `high`, both of the same length."""
    if low == high:
        return literal(low)
    rest = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_digits_between(low[1:], high[1:])})'
    first, last = int(low[0]), int(high[0])
    start: list[str] = []
    end: list[str] = []
    if low[1:].strip("0"):
        start = [f'"{first}" ({_digits_between(low[1:], "9" * rest)})']
        first += 1
    if high[1:].strip("9"):
        end = [f'"{last}" ({_digits_between("0" * rest, high[1:])})']
        last -= 1
    middle = [f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else "")] if first <= last else []
    return " | ".join(start + middle + end)


def number_between(low: int | None, high: int | None, integers: tuple[int, int]) -> str:
    """Decimal fractions between the whole numbers `low` and `high`, and the integers of `integers`.

    A fraction lies strictly between two neighbouring whole numbers, so strictness of a bound only
    concerns `integers`. 15 significant digits at most: then no fraction is rounded onto a bound.
    """
    limit = 10**9 - 1
    whole = integer_between(*integers)
    exact = max(map(abs, integers)) < 10**15
    parts = [f"({whole})" + (' ("." "0")?' if exact else "")] if whole else []
    above = (max(0, -limit if low is None else low), min(limit, limit if high is None else high - 1))
    below = (max(0, -limit if high is None else -high), min(limit, limit if low is None else -low - 1))
    for sign, (first, last) in (("", above), ('"-" ', below)):
        if first <= last:
            fraction = 15 - len(str(last))
            parts.append(f'{sign}({integer_between(first, last)}) "." [0-9]{{0,{fraction - 1}}} [1-9]')
    return " | ".join(parts)
