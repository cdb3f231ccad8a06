"""The keywords of one subschema, checked and turned into Facts.

A subschema and its pointer in; facts, and the pointers of the subschemas that its keywords hold, out.
Says which keywords are enforced, which are annotations and which are refused. Knows nothing of other
subschemas and resolves no $ref.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from qwq_local.engine.schema_document import child_pointer, kind
from qwq_local.engine.schema_facts import (
    ALL_TYPES,
    TYPES,
    ArrayFacts,
    Bound,
    Facts,
    NumberFacts,
    ObjectFacts,
    StringFacts,
    common_values,
)
from qwq_local.engine.schema_pattern import FORMATS
from qwq_local.errors import SchemaError

MAX_NAME = 1_000

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$anchor", "$comment", "$defs", "definitions", "discriminator"}
)
ENFORCED = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "not", "type", "enum", "const"}
    | {"minLength", "maxLength", "pattern", "format"}
    | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    | {"properties", "required", "additionalProperties", "minProperties", "maxProperties"}
    | {"prefixItems", "items", "minItems", "maxItems", "uniqueItems"}
)
_INSTEAD = {
    "nullable": 'use a list of types with "null"',
    "additionalItems": "use prefixItems and items",
    "dependencies": "use anyOf",
    "dependentRequired": "use anyOf",
    "dependentSchemas": "use anyOf",
    "if": "use anyOf",
    "patternProperties": "use additionalProperties",
    "unevaluatedProperties": "use additionalProperties",
    "$id": "only the whole schema may have one",
}


class Keywords:
    """The keywords of one subschema, each read as the kind of value that it takes."""

    def __init__(self, schema: Mapping[str, object], pointer: str) -> None:
        self.pointer = pointer
        self._schema = schema

    def __contains__(self, keyword: str) -> bool:
        return keyword in self._schema

    def __iter__(self) -> Iterator[str]:
        return iter(self._schema)

    def path(self, keyword: str) -> str:
        """The pointer of this keyword in the document."""
        return child_pointer(self.pointer, keyword)

    def refusal(self, keyword: str, why: str) -> SchemaError:
        """An error that names this keyword."""
        return SchemaError(f"{self.path(keyword)}: {why}")

    def value(self, keyword: str) -> object:
        """The value as it stands."""
        return self._schema[keyword]

    def items(self, keyword: str) -> list[object]:
        """A list with at least one item, or nothing when the keyword is absent."""
        value = self._schema.get(keyword)
        if keyword in self._schema and (not isinstance(value, list) or not value):
            found = "an empty one" if value == [] else kind(value)
            raise self.refusal(keyword, f"a list with items is expected, not {found}.")
        return value if isinstance(value, list) else []

    def count(self, keyword: str) -> int | None:
        """A whole number of 0 or more."""
        number = self.number(keyword)
        if number is not None and (number < 0 or number.denominator != 1):
            raise self.refusal(
                keyword, f"a whole number of 0 or more is expected, not {kind(self._schema[keyword])}."
            )
        return None if number is None else int(number)

    def number(self, keyword: str) -> Fraction | None:
        """A finite number, exactly."""
        value = self._schema.get(keyword)
        if keyword not in self._schema:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(keyword, f"a number is expected, not {kind(value)}.")
        return Fraction(value)

    def text(self, keyword: str) -> str | None:
        """A string."""
        value = self._schema.get(keyword)
        if keyword not in self._schema:
            return None
        if not isinstance(value, str):
            raise self.refusal(keyword, f"a string is expected, not {kind(value)}.")
        return value

    def names(self, keyword: str) -> tuple[str, ...]:
        """A list of property names, which may be empty; nothing when the keyword is absent."""
        value = self._schema.get(keyword, [])
        if not isinstance(value, list):
            raise self.refusal(keyword, f"a list of names is expected, not {kind(value)}.")
        return tuple(dict.fromkeys(self._name(keyword, name) for name in value))

    def child(self, keyword: str) -> str | None:
        """The pointer of the subschema that is this keyword's value."""
        if keyword not in self._schema:
            return None
        return self._checked(self._schema[keyword], self.path(keyword))

    def children(self, keyword: str) -> tuple[str, ...]:
        """The pointers of the subschemas in a list; nothing when the keyword is absent."""
        path = self.path(keyword)
        return tuple(
            self._checked(value, child_pointer(path, str(index)))
            for index, value in enumerate(self.items(keyword))
        )

    def named_children(self, keyword: str) -> dict[str, str]:
        """The pointers of named subschemas, in the order in which they stand."""
        value = self._schema.get(keyword, {})
        if not isinstance(value, Mapping):
            raise self.refusal(keyword, f"an object of schemas is expected, not {kind(value)}.")
        path = self.path(keyword)
        return {
            self._name(keyword, name): self._checked(schema, child_pointer(path, name))
            for name, schema in value.items()
        }

    def _name(self, keyword: str, name: object) -> str:
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise self.refusal(keyword, f"a name is a string of at most {MAX_NAME:,} characters.")
        return name

    def _checked(self, value: object, path: str) -> str:
        if not isinstance(value, Mapping | bool):
            raise SchemaError(f"{path}: a schema (an object, true or false) is expected, not {kind(value)}.")
        return path


def read_facts(keywords: Keywords) -> Facts:
    """The facts of one subschema by itself, without $ref, allOf, anyOf, oneOf and not.

    Raises SchemaError for a keyword that is unknown, malformed or cannot be enforced.
    """
    _refuse_unknown(keywords)
    return Facts(
        types=_read_types(keywords),
        values=_read_values(keywords),
        text=_read_string(keywords),
        number=_read_number(keywords),
        members=_read_object(keywords),
        elements=_read_array(keywords),
        paths={keyword: keywords.path(keyword) for keyword in keywords},
    )


def _refuse_unknown(keywords: Keywords) -> None:
    for keyword in keywords:
        if keyword in ENFORCED or keyword in ANNOTATIONS or keyword.startswith("x-"):
            continue
        if keyword == "$id" and keywords.pointer == "#":
            continue
        instead = _INSTEAD.get(keyword)
        raise keywords.refusal(
            keyword, "this keyword cannot be enforced; leave it out" + (f" or {instead}." if instead else ".")
        )
    if "uniqueItems" in keywords and keywords.value("uniqueItems") is not False:
        raise keywords.refusal("uniqueItems", "this keyword cannot be enforced; leave it out.")


def _read_types(keywords: Keywords) -> frozenset[str]:
    if "type" not in keywords:
        return ALL_TYPES
    names = keywords.value("type")
    listed = keywords.items("type") if isinstance(names, list) else [names]
    for name in listed:
        if not isinstance(name, str) or name not in TYPES:
            raise keywords.refusal("type", f"a type is one of {', '.join(TYPES)}.")
    return frozenset().union(*(TYPES[str(name)] for name in listed))


def _read_values(keywords: Keywords) -> tuple[object, ...] | None:
    values = tuple(keywords.items("enum")) if "enum" in keywords else None
    if "const" in keywords:
        values = common_values(values, (keywords.value("const"),))
    return values


def _read_string(keywords: Keywords) -> StringFacts:
    pattern, name = keywords.text("pattern"), keywords.text("format")
    if name is not None and name not in FORMATS:
        raise keywords.refusal(
            "format", f"only {', '.join(FORMATS)} can be enforced; leave it out or use pattern."
        )
    return StringFacts(
        keywords.count("minLength") or 0,
        keywords.count("maxLength"),
        () if pattern is None else (pattern,),
        () if name is None else (name,),
    )


def _read_number(keywords: Keywords) -> NumberFacts:
    facts = NumberFacts()
    for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        value = keywords.number(keyword)
        if value is not None:
            bound = Bound(value, keyword.startswith("exclusive"), keywords.path(keyword))
            is_lower = keyword.lower().endswith("minimum")
            facts &= NumberFacts(lower=bound) if is_lower else NumberFacts(upper=bound)
    return facts


def _read_object(keywords: Keywords) -> ObjectFacts:
    additional = keywords.child("additionalProperties")
    return ObjectFacts(
        {name: (pointer,) for name, pointer in keywords.named_children("properties").items()},
        keywords.names("required"),
        None if additional is None else (additional,),
        keywords.count("minProperties") or 0,
        keywords.count("maxProperties"),
    )


def _read_array(keywords: Keywords) -> ArrayFacts:
    if "items" in keywords and isinstance(keywords.value("items"), list):
        raise keywords.refusal("items", "a list of schemas is called prefixItems; items takes one schema.")
    items = keywords.child("items")
    return ArrayFacts(
        tuple((pointer,) for pointer in keywords.children("prefixItems")),
        None if items is None else (items,),
        keywords.count("minItems") or 0,
        keywords.count("maxItems"),
    )
