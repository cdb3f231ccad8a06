"""A JSON schema as a document: bounded in size, its subschemas addressed by JSON pointers.

Plain values (as json.load makes them) in; subschemas and resolved references out. Knows no keywords.
Every refusal is a SchemaError that begins with the pointer of what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

from qwq_local.errors import SchemaError

MAX_DEPTH = 100
MAX_VALUES = 20_000
MAX_BITS = 4_096

Subschema = Mapping[str, object] | bool


class Document:
    """One schema and the subschemas in it, by pointer: `#`, `#/properties/age`, `#/$defs/node`."""

    def __init__(self, schema: object) -> None:
        if not isinstance(schema, Mapping | bool):
            raise SchemaError(f"#: a schema is a JSON object, true or false; this is {kind(schema)}.")
        _check_size(schema)
        self._root: Subschema = schema

    def at(self, pointer: str) -> Subschema:
        """The subschema at `pointer`, which `resolve` or `child_pointer` made."""
        value = self._walk(pointer, pointer)
        if not isinstance(value, Mapping | bool):
            raise SchemaError(f"{pointer}: {kind(value)} stands where a schema belongs.")
        return value

    def resolve(self, reference: str, path: str) -> str:
        """The pointer that the `$ref` at `path` means. Raises SchemaError unless it is in this document."""
        if reference != "#" and not reference.startswith("#/"):
            raise SchemaError(f"{path}: `{reference}` is not in this file. Use `#/$defs/...` only.")
        pointer = unquote(reference)
        if not isinstance(self._walk(pointer, path), Mapping | bool):
            raise SchemaError(f"{path}: `{reference}` is not a schema.")
        return pointer

    def _walk(self, pointer: str, path: str) -> object:
        value: object = self._root
        for segment in pointer.split("/")[1:]:
            name = segment.replace("~1", "/").replace("~0", "~")
            if value is not self._root and isinstance(value, Mapping) and isinstance(value.get("$id"), str):
                raise SchemaError(f"{path}: `{pointer}` leads through a schema with its own $id.")
            if isinstance(value, Mapping) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isdecimal() and len(name) < 6 and int(name) < len(value):
                value = value[int(name)]
            else:
                raise SchemaError(f"{path}: there is no `{pointer}` in this schema.")
        return value


def child_pointer(pointer: str, name: str) -> str:
    """The pointer of `name` inside `pointer`."""
    return f"{pointer}/{name.replace('~', '~0').replace('/', '~1')}"


def _check_size(schema: object) -> None:
    """Refuse what is too deep, too large, or no JSON, without recursion."""
    pending = [(schema, 1)]
    seen = 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if depth > MAX_DEPTH:
            raise SchemaError(f"#: the schema nests deeper than {MAX_DEPTH} levels. Make it flatter.")
        if seen > MAX_VALUES:
            raise SchemaError(f"#: the schema has more than {MAX_VALUES:,} values. Make it smaller.")
        if isinstance(value, Mapping):
            if not all(isinstance(name, str) for name in value):
                raise SchemaError("#: the schema is no JSON: a name in it is not a string.")
            pending += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            pending += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SchemaError(f"#: the schema holds a number of more than {MAX_BITS:,} bits.")
        elif value is not None and not isinstance(value, str | int | float):
            raise SchemaError(f"#: the schema is no JSON: it holds {kind(value)}.")


def kind(value: object) -> str:
    """What to call `value` in a message."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return f"the number {value}" if abs(value) < 1e15 else "a huge number"
    if isinstance(value, Mapping):
        return "an object"
    return (
        "a string"
        if isinstance(value, str)
        else "a list"
        if isinstance(value, list)
        else type(value).__name__
    )
