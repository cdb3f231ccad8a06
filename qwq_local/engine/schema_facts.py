"""What a JSON schema says about a value, as facts that can be joined.

Frozen values: `one & other` are the facts of a value that both hold for, exactly. Subschemas inside are
named by pointers, several where all of them apply (a Conjunction), and are not looked into here: recursion
is no matter of this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

Conjunction = tuple[str, ...]
NEVER: Conjunction = ("",)  # the pointer of no subschema: what nothing satisfies

# A number is an integer or has a fraction: so that "integer" and "number" meet as sets do.
TYPES: dict[str, frozenset[str]] = {
    "object": frozenset({"object"}),
    "array": frozenset({"array"}),
    "string": frozenset({"string"}),
    "number": frozenset({"integer", "fraction"}),
    "integer": frozenset({"integer"}),
    "boolean": frozenset({"boolean"}),
    "null": frozenset({"null"}),
}
ALL_TYPES = frozenset().union(*TYPES.values())


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a range of numbers; `path` is the keyword that set it."""

    value: Fraction
    strict: bool
    path: str


@dataclass(frozen=True, slots=True)
class StringFacts:
    """How long a string may be, in characters, and what it must look like."""

    low: int = 0
    high: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()

    def __and__(self, other: StringFacts) -> StringFacts:
        return StringFacts(
            max(self.low, other.low),
            _least(self.high, other.high),
            _united(self.patterns, other.patterns),
            _united(self.formats, other.formats),
        )


@dataclass(frozen=True, slots=True)
class NumberFacts:
    """Between which bounds a number lies."""

    lower: Bound | None = None
    upper: Bound | None = None

    def __and__(self, other: NumberFacts) -> NumberFacts:
        lowers = [bound for bound in (self.lower, other.lower) if bound]
        uppers = [bound for bound in (self.upper, other.upper) if bound]
        return NumberFacts(
            max(lowers, key=lambda bound: (bound.value, bound.strict), default=None),
            min(uppers, key=lambda bound: (bound.value, not bound.strict), default=None),
        )

    def integers(self, limit: int) -> tuple[int, int]:
        """The least and the greatest integer allowed, between -limit and limit; crossed when none is."""
        low, high = -limit, limit
        if self.lower:
            up = -(-self.lower.value // 1)
            low = max(low, int(up) + (self.lower.strict and up == self.lower.value))
        if self.upper:
            down = self.upper.value // 1
            high = min(high, int(down) - (self.upper.strict and down == self.upper.value))
        return low, high

    def fractions_are_impossible(self) -> bool:
        """True when no number at all lies between the bounds."""
        if not self.lower or not self.upper:
            return False
        gap = self.upper.value - self.lower.value
        return gap < 0 or (gap == 0 and (self.lower.strict or self.upper.strict))


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """The members of an object; `additional` None means that nobody said anything about further ones."""

    properties: Mapping[str, Conjunction] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    additional: Conjunction | None = None
    low: int = 0
    high: int | None = None

    def member(self, name: str) -> Conjunction:
        """The subschemas that the member `name` must satisfy."""
        return self.properties.get(name, self.additional or ())

    def __and__(self, other: ObjectFacts) -> ObjectFacts:
        names = _united(tuple(self.properties), tuple(other.properties))
        return ObjectFacts(
            {name: _united(self.member(name), other.member(name)) for name in names},
            _united(self.required, other.required),
            _both(self.additional, other.additional),
            max(self.low, other.low),
            _least(self.high, other.high),
        )


@dataclass(frozen=True, slots=True)
class ArrayFacts:
    """The elements of an array; `items` None means that nobody said anything about those past `prefix`."""

    prefix: tuple[Conjunction, ...] = ()
    items: Conjunction | None = None
    low: int = 0
    high: int | None = None

    def element(self, index: int) -> Conjunction:
        """The subschemas that the element at `index` must satisfy."""
        return self.prefix[index] if index < len(self.prefix) else self.items or ()

    def __and__(self, other: ArrayFacts) -> ArrayFacts:
        length = max(len(self.prefix), len(other.prefix))
        return ArrayFacts(
            tuple(_united(self.element(index), other.element(index)) for index in range(length)),
            _both(self.items, other.items),
            max(self.low, other.low),
            _least(self.high, other.high),
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything said about a value, type by type.

    `excludes` names subschemas (and the keyword that excludes them) that the value must not satisfy;
    `paths` says which keyword to blame.
    """

    types: frozenset[str] = ALL_TYPES
    values: tuple[object, ...] | None = None
    text: StringFacts = StringFacts()
    number: NumberFacts = NumberFacts()
    members: ObjectFacts = field(default_factory=ObjectFacts)
    elements: ArrayFacts = ArrayFacts()
    excludes: tuple[tuple[str, str], ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)

    def __and__(self, other: Facts) -> Facts:
        return Facts(
            self.types & other.types,
            common_values(self.values, other.values),
            self.text & other.text,
            self.number & other.number,
            self.members & other.members,
            self.elements & other.elements,
            tuple(dict.fromkeys(self.excludes + other.excludes)),
            {**self.paths, **other.paths},
        )

    def detailed_types(self) -> frozenset[str]:
        """The types about which something more than the type is said."""
        details = {
            "string": self.text != StringFacts(),
            "integer": self.number != NumberFacts(),
            "fraction": self.number != NumberFacts(),
            "object": self.members != ObjectFacts(),
            "array": self.elements != ArrayFacts(),
        }
        return frozenset(name for name, said in details.items() if said)

    def possible_values(self) -> tuple[object, ...]:
        """The values that `enum` and `const` leave, of the types allowed."""
        return tuple(value for value in self.values or () if type_of(value) in self.types)

    def narrowed(self) -> Facts:
        """The facts of what the grammar offers, where a schema leaves open what nobody would want.

        A schema without `type` is about the types that its keywords are about; an object with named
        members has no others, and an array with prefixItems nothing past them, unless the schema says so.
        """
        types, members, elements = self.types, self.members, self.elements
        if types == ALL_TYPES and self.values is None and self.detailed_types():
            types = self.detailed_types()
        if members.additional is None and (members.properties or members.required):
            named = dict(members.properties) | {
                name: () for name in members.required if name not in members.properties
            }
            members = replace(members, properties=named, additional=NEVER)
        if elements.items is None and elements.prefix:
            elements = replace(elements, items=NEVER)
        return replace(self, types=types, members=members, elements=elements)


def type_of(value: object) -> str:
    """The type of a JSON value, `fraction` for a number that is no integer (1.0 is one)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if value == value // 1 else "fraction"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _same(one: object, other: object) -> bool:
    """JSON's equality: 1 is 1.0, true is not 1."""
    if type_of(one) != type_of(other):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one == other


def common_values(
    one: tuple[object, ...] | None, other: tuple[object, ...] | None
) -> tuple[object, ...] | None:
    """The values in both lists; None is the list of all values."""
    if one is None or other is None:
        return other if one is None else one
    return tuple(value for value in one if any(_same(value, candidate) for candidate in other))


def _united(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one + other))


def _both(one: Conjunction | None, other: Conjunction | None) -> Conjunction | None:
    return None if one is None and other is None else _united(one or (), other or ())


def _least(one: int | None, other: int | None) -> int | None:
    return min((high for high in (one, other) if high is not None), default=None)
