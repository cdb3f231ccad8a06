"""JSON schemas before they are compiled: bounded in size, local, and with nothing that would not be enforced.

llguidance ignores keywords that it does not know, and says what is wrong with a schema but not where. Here
unknown keywords are refused, and a fault is found by compiling parts of the schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from urllib.parse import quote, unquote

from qwq_local.errors import ConstraintError

MAX_DEPTH = 100
MAX_VALUES = 20_000
_MAX_REFERENCES = 100  # in a row
_MAX_MEMBER_DEPTH = 3

Subschema = dict[str, object]

_HOLDS_SCHEMA = ("items", "additionalProperties")
_HOLDS_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_HOLDS_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ENFORCED = _names("""
    $ref allOf anyOf oneOf type enum const minLength maxLength pattern format minimum maximum exclusiveMinimum
    exclusiveMaximum multipleOf properties patternProperties additionalProperties required minProperties
    maxProperties prefixItems items minItems maxItems
""")
_ANNOTATIONS = _names("""
    title description default examples example deprecated readOnly writeOnly $schema $id $anchor $comment
    $defs definitions discriminator contentEncoding contentMediaType
""")
_INSTEAD = {
    "nullable": 'Use a list of types with "null".',
    "additionalItems": "Use prefixItems and items.",
    "dependencies": "Use anyOf.",
    "dependentRequired": "Use anyOf.",
    "dependentSchemas": "Use anyOf.",
    "if": "Use anyOf.",
    "unevaluatedProperties": "Use additionalProperties.",
    "unevaluatedItems": "Use items.",
}
_TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}
# llguidance's `date` has a 29th of February in every year.
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_REAL_DAY = f"^(?:{_LEAP_YEAR}-02-29|[0-9]{{4}}-(?:02-(?:[01][0-9]|2[0-8])|(?:0[13-9]|1[0-2])-[0-9]{{2}}))"
_REAL_DAYS = {"date": f"{_REAL_DAY}$", "date-time": _REAL_DAY}


def checked_schema(schema: Mapping[str, object]) -> Subschema:
    """A copy of the schema that can be compiled; its dates are exact.

    Raises ConstraintError, led by the JSON pointer of the keyword, for what is not a schema, what is too
    large, what cannot be enforced, and for a reference that does not lead to a schema in this document.
    """
    if not isinstance(schema, Mapping):
        raise ConstraintError(f"#: a schema is an object; this is {_kind(schema)}.")
    _check_values(schema)
    copy: Subschema = json.loads(json.dumps(schema, default=dict))
    for pointer, part in subschemas(copy):
        _check_keywords(copy, pointer, part)
        if isinstance(part.get("pattern"), str):
            part["pattern"] = _exact_classes(str(part["pattern"]))
        if isinstance(named := part.get("patternProperties"), dict):
            part["patternProperties"] = {_exact_classes(name): inner for name, inner in named.items()}
        if (pattern := _REAL_DAYS.get(str(part.get("format")))) is not None:
            part["allOf"] = [*_items(part, "allOf"), {"pattern": pattern}]
    return copy


def subschemas(schema: Subschema) -> Iterator[tuple[str, Subschema]]:
    """Every subschema but true and false with its JSON pointer, the schema itself first.

    Raises ConstraintError where something else stands in place of a schema.
    """
    pending: list[tuple[str, object]] = [("#", schema)]
    while pending:
        pointer, part = pending.pop()
        if isinstance(part, dict):
            pending += reversed(list(_children(pointer, part)))
            yield pointer, part
        elif not isinstance(part, bool):
            raise ConstraintError(f"{pointer}: a schema is an object, true or false; this is {_kind(part)}.")


def overlapping_one_of(schema: Subschema, is_exact: Callable[[Subschema], bool]) -> str | None:
    """The pointer of the first `oneOf` of which two branches may match one value; None if there is none.

    `is_exact` tells whether the compiler finds that the branches of a schema exclude each other. It is
    reliable only where each branch has a type.
    """
    for pointer, part in subschemas(schema):
        branches = [_with_type_of(part, _target(schema, branch)) for branch in _items(part, "oneOf")]
        if all(_exclude(schema, a, b) for a, b in combinations(branches, 2)):
            continue
        have_types = all(isinstance(branch, dict) and "type" in branch for branch in branches)
        if not have_types or not is_exact(_alone(schema, _reference_to(pointer))):
            return f"{pointer}/oneOf"
    return None


def fault_of(schema: Subschema, original: Mapping[str, object], fails: Callable[[Subschema], bool]) -> str:
    """The pointer of the keyword for which a schema does not compile, else of the innermost such subschema.

    `original` is the schema before it was checked: only keywords in it are named.
    """
    pointer, seen = "#", {"#"}
    while True:
        inner = (each for each in _below(schema, pointer) if each not in seen)
        found = next((each for each in inner if fails(_alone(schema, _reference_to(each)))), None)
        if found is None:
            break
        seen.add(found)
        pointer = found
    part, named = _at(schema, pointer), _at(original, pointer)
    if isinstance(part, dict) and isinstance(named, Mapping):
        broad = {"type", *_HOLDS_SCHEMA, *_HOLDS_NAMED_SCHEMAS, *_HOLDS_SCHEMAS}
        for keyword in sorted(named, key=broad.__contains__):
            rest = {name: value for name, value in part.items() if name != keyword}
            if keyword in part and not fails(_alone(schema, rest)):
                return _child(pointer, keyword)
    return pointer


def _check_values(schema: object) -> None:
    """Refuse what is too deep, too large or not JSON, without recursion."""
    pending = [(schema, "#", 1)]
    for n_values in range(1, MAX_VALUES + 2):
        if not pending:
            return
        value, pointer, depth = pending.pop()
        if n_values > MAX_VALUES:
            break
        if depth > MAX_DEPTH:
            raise ConstraintError(f"#: the schema nests deeper than {MAX_DEPTH} levels. Make it flatter.")
        match value:
            case Mapping():
                if not all(isinstance(name, str) for name in value):
                    raise ConstraintError(f"{pointer}: a name in it is not a string.")
                _check_text("".join(value), pointer)
                pending += [(inner, _child(pointer, name), depth + 1) for name, inner in value.items()]
            case list():
                pending += [(inner, f"{pointer}/{n}", depth + 1) for n, inner in enumerate(value)]
            case str():
                _check_text(value, pointer)
            case int() if not -(2**63) <= value < 2**63:
                raise ConstraintError(f"{pointer}: the number has more than 64 bits.")
            case float() if not math.isfinite(value):
                raise ConstraintError(f"{pointer}: {value} is not a number of JSON.")
            case None | int() | float():
                pass
            case _:
                raise ConstraintError(f"{pointer}: {type(value).__name__} is not a type of JSON.")
    raise ConstraintError(f"#: the schema has more than {MAX_VALUES:,} values. Make it smaller.")


def _check_text(text: str, pointer: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConstraintError(f"{pointer}: half a surrogate pair cannot be written.") from None


def _check_keywords(schema: Subschema, pointer: str, part: Subschema) -> None:
    if part.get("uniqueItems") is False:
        del part["uniqueItems"]
    for keyword in part:
        is_known = keyword in _ENFORCED or keyword in _ANNOTATIONS
        if not is_known and (keyword == "x-guidance" or not keyword.startswith("x-")):
            hint = _INSTEAD.get(keyword, "Leave it out.")
            raise ConstraintError(f"{_child(pointer, keyword)}: this keyword cannot be enforced. {hint}")
    if "$id" in part and pointer != "#":
        raise ConstraintError(f"{pointer}/$id: only the whole schema may have one.")
    if "$ref" in part:
        _check_reference(schema, pointer, part["$ref"])
    if str(part.get("pattern", "")).replace("\\\\", "").endswith("\\"):
        raise ConstraintError(f"{pointer}/pattern: it ends in the middle of an escape.")
    least, required = part.get("minProperties"), part.get("required")
    if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
        # llguidance counts a name that comes twice as two members.
        raise ConstraintError(
            f"{pointer}/minProperties: more than the required members cannot be enforced. Require more."
        )


def _exact_classes(pattern: str) -> str:
    """The pattern without the character BEL in negated classes, and without NUL in ranges.

    llguidance 1.9 takes a class with all control characters to have the quotation mark and the backslash too.
    """
    replacements = {r"\x00-": r"\x01-", r"\u0000-": r"\u0001-", "[^": r"[^\a", "[^]": r"[^]\a"}
    token = r"\\x00-|\\u0000-|\\.|\[\^\]?"
    return re.sub(token, lambda match: replacements.get(match[0], match[0]), pattern, flags=re.DOTALL)


def _check_reference(schema: Subschema, pointer: str, reference: object) -> None:
    path = f"{pointer}/$ref"
    if not isinstance(reference, str):
        raise ConstraintError(f"{path}: a string is expected, not {_kind(reference)}.")
    if reference != "#" and not reference.startswith("#/"):
        raise ConstraintError(f"{path}: `{reference}` is not in this schema. Use `#/$defs/...`.")
    if not isinstance(_at(schema, unquote(reference)), dict | bool):
        raise ConstraintError(f"{path}: there is no schema at `{reference}`.")


def _children(pointer: str, part: Subschema) -> Iterator[tuple[str, object]]:
    for keyword, value in part.items():
        path = _child(pointer, keyword)
        if keyword in _HOLDS_SCHEMA:
            yield path, value
        elif keyword in _HOLDS_NAMED_SCHEMAS:
            if not isinstance(value, dict):
                raise ConstraintError(f"{path}: an object is expected, not {_kind(value)}.")
            yield from ((_child(path, name), inner) for name, inner in value.items())
        elif keyword in _HOLDS_SCHEMAS:
            if not isinstance(value, list) or not value:
                raise ConstraintError(f"{path}: a list with schemas is expected, not {_kind(value)}.")
            yield from ((f"{path}/{number}", inner) for number, inner in enumerate(value))


def _below(schema: Subschema, pointer: str) -> Iterator[str]:
    """The pointers of the subschemas that a subschema uses."""
    part = _at(schema, pointer)
    if isinstance(part, dict):
        used = {name: value for name, value in part.items() if name not in ("$defs", "definitions")}
        yield from (path for path, inner in _children(pointer, used) if isinstance(inner, dict))
        if isinstance(reference := part.get("$ref"), str):
            yield unquote(reference)


def _at(schema: object, pointer: str) -> object:
    """The value at a pointer; None if there is none."""
    value = schema
    for segment in pointer.split("/")[1:]:
        name = segment.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and len(name) < 6 and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def _child(pointer: str, name: str) -> str:
    return f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}"


def _reference_to(pointer: str) -> Subschema:
    return {"$ref": f"#{quote(pointer[1:])}"}


def _alone(schema: Subschema, part: Subschema) -> Subschema:
    """A part of a schema as a schema, with all that its references lead to."""
    moved = _moved(part)
    assert isinstance(moved, dict)
    return {**moved, "$defs": {"root": _moved(schema)}}


def _moved(value: object) -> object:
    if isinstance(value, list):
        return [_moved(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        name: f"#/$defs/root{quote(unquote(inner[1:]))}"
        if name == "$ref" and isinstance(inner, str)
        else _moved(inner)
        for name, inner in value.items()
    }


def _exclude(schema: Subschema, a: object, b: object, depth: int = 0) -> bool:
    """Whether no value can match both: by their types, their fixed values, or those of a required member."""
    a, b = _target(schema, a), _target(schema, b)
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a is False or b is False
    types_a, types_b = _types_of(a), _types_of(b)
    if not types_a & types_b:
        return True
    values_a, values_b = _values_of(a), _values_of(b)
    if values_a is not None and values_b is not None:
        return not any(value in values_b for value in values_a)
    if types_a & types_b != {"object"} or depth == _MAX_MEMBER_DEPTH:
        return False
    members_a, members_b = a.get("properties"), b.get("properties")
    if not isinstance(members_a, dict) or not isinstance(members_b, dict):
        return False
    shared = [name for name in _items(a, "required") if name in _items(b, "required")]
    return any(
        _exclude(schema, members_a[name], members_b[name], depth + 1)
        for name in shared
        if isinstance(name, str) and name in members_a and name in members_b
    )


def _target(schema: Subschema, part: object) -> object:
    for _ in range(_MAX_REFERENCES):
        if not isinstance(part, dict) or not isinstance(reference := part.get("$ref"), str):
            break
        part = _at(schema, unquote(reference))
    return part


def _with_type_of(part: Subschema, branch: object) -> object:
    return (
        {**branch, "type": branch.get("type", part["type"])}
        if isinstance(branch, dict) and "type" in part
        else branch
    )


def _types_of(part: Subschema) -> set[str]:
    stated = part.get("type", [])
    types = {str(name) for name in (stated if isinstance(stated, list) else [stated])} or set(_TYPES)
    return types | {"integer"} if "number" in types else types


def _values_of(part: Subschema) -> list[object] | None:
    if "const" in part:
        return [part["const"]]
    return _items(part, "enum") if "enum" in part else None


def _items(part: Subschema, keyword: str) -> list[object]:
    value = part.get(keyword)
    return value if isinstance(value, list) else []


def _kind(value: object) -> str:
    """What to call a value in a message."""
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float():
            return f"the number {value}"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case dict():
            return "an object"
    return "a string"
