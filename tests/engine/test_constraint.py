"""Answers under a schema, a regular expression or a grammar, byte by byte: every allowed answer is valid."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qwq_local.cli.ask import read_constraint
from qwq_local.engine.api import AnswerConstraint, JsonSchema, LarkGrammar, Regex
from qwq_local.engine.constraint import Constraint, check_constraint, compile_constraint
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import AbortFlag, ConstraintError, EngineError, ExitStatus, UsageError

END = 256
QUOTE, ZERO = 0x22, 0x30
ENDINGS = b']}"0n,:'
MAX_BYTES = 6_000
Schema = dict[str, Any]
SCHEMA_FILES = Path(__file__).parent / "schemas"


class Walker:
    """Answers under a constraint, over a vocabulary of the 256 bytes and an end token."""

    def __init__(self, vocabulary: LlamaVocabulary, source: AnswerConstraint) -> None:
        self._constraint = compile_constraint(source, vocabulary)

    def accepts(self, text: str) -> bool:
        """Whether `text` as a whole is an answer."""
        matcher = self._constraint.matcher()
        for byte in text.encode():
            if byte not in matcher.allowed():
                return False
            matcher.accept(byte)
        return END in matcher.allowed()

    def write(self, seed: int) -> str:
        """A random answer; past some length it takes the shortest way to an end."""
        matcher, chance = self._constraint.matcher(), random.Random(seed)
        written = bytearray()
        while (token := self._choose(matcher.allowed().tolist(), written, chance)) != END:
            written.append(token)
            matcher.accept(token)
            assert len(written) < MAX_BYTES, bytes(written)
        return written.decode()

    def _choose(self, allowed: list[int], written: bytearray, chance: random.Random) -> int:
        in_string = len(allowed) > 40
        if len(written) > 300 or chance.random() < 0.2:
            for token in [QUOTE] if in_string else [END, *ENDINGS]:
                if token in allowed:
                    return token
        if in_string and ZERO in allowed and chance.random() < 0.2:
            return ZERO  # the end of a string whose pattern has not matched yet
        common = [token for token in allowed if token < 0x80 or token == END]
        return chance.choice(common if common and chance.random() < 0.9 else allowed)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaVocabulary]:
    """A llama.cpp vocabulary with one token for each byte, and one that ends."""
    path = tmp_path_factory.mktemp("vocab") / "bytes.gguf"
    write_byte_vocabulary(path)
    with closing(drained(load_model(path, LoadSettings(vocab_only=True), AbortFlag()))) as model:
        yield model.vocabulary


def write_byte_vocabulary(path: Path) -> None:
    """The bytes in order, spelled as in byte-level BPE, then <end>."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    pieces = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*pieces, "<end>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_token_merges([f"{pieces[0x61]} {pieces[0x62]}"])
    writer.add_eos_token_id(END)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def check_that_all_it_writes_is_valid(vocab: LlamaVocabulary, schema: Schema, seeds: range) -> None:
    validator, walker = Draft202012Validator(schema), Walker(vocab, JsonSchema(schema))
    for seed in seeds:
        text = walker.write(seed)
        errors = [error.message for error in validator.iter_errors(json.loads(text))]
        assert not errors, f"{text} under {schema}: {errors}"


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


CAT = {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}}
DOG = {"kind": {"const": "dog"}, "good": {"const": True}}
# The schema of a Python data model with a tagged union.
PETS: dict[str, Any] = {
    "title": "Owner",
    **obj(name={"type": "string", "title": "Name"}, pet={"$ref": "#/$defs/Pet"}),
    "$defs": {
        "Cat": {**obj(**CAT), "title": "Cat", "additionalProperties": False},
        "Dog": {**obj(**DOG), "title": "Dog"},
        "Pet": {
            "discriminator": {"propertyName": "kind"},
            "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        },
    },
}
PETS["properties"] |= {
    "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "default": [], "maxItems": 3},
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": -5, "maximum": 5},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}

# Each schema with instances that its grammar must accept, members in the schema's order.
SCHEMAS: dict[str, tuple[Schema, list[Any]]] = {
    "anything": ({}, [None, True, -0.5, 'é\n"\\', [], {}, {"a": [1, {"b": None}]}, 1e-7, [[[[[[[[]]]]]]]]]),
    "anything, annotated": ({"title": "x", "$comment": "y", "x-mine": 1}, [1, {"a": {}}]),
    "null": ({"type": "null"}, [None]),
    "boolean": ({"type": "boolean"}, [True, False]),
    "string": ({"type": "string"}, ["", "a", "日本\t😀", "a/b"]),
    "integer": ({"type": "integer"}, [0, -1, 7, 999999999999999999]),
    "number": ({"type": "number"}, [0, -0.0, 3.25, 0.1 + 0.2, 1e22, -12]),
    "type list": ({"type": ["integer", "null", "string"]}, [1, None, "a"]),
    "string lengths": ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "日本語!", "a\n😀b"]),
    "one length": ({"type": "string", "minLength": 3, "maxLength": 3}, ["abc"]),
    "empty string": ({"type": "string", "maxLength": 0}, [""]),
    "long string": ({"type": "string", "maxLength": 2100}, ["", "x" * 999, "x" * 1000, "x" * 2100]),
    "least length": ({"type": ["string", "null"], "minLength": 3}, ["abc", "abcdef", None]),
    "integer range": ({"type": "integer", "minimum": -17, "maximum": 204}, [-17, -9, 0, 9, 10, 99, 204]),
    "exclusive range": ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2.5}, [1, 2]),
    "minimum alone": ({"type": "integer", "minimum": 1958}, [1958, 10**17]),
    "maximum alone": ({"type": "integer", "maximum": -30.5}, [-31, -99, -100]),
    "number range": (
        {"type": "number", "minimum": 0, "maximum": 1},
        [0, 1, 0.0, 1.0, 0.25, 0.33333333333333],
    ),
    "negative numbers": (
        {"type": "number", "exclusiveMinimum": -2, "exclusiveMaximum": 0},
        [-1.5, -0.001, -1],
    ),
    "probability": ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.999]),
    "number from": ({"minimum": -3}, [-3, -2.5, 1234.5678]),
    "wide numbers": ({"type": "number", "maximum": 999999999999999999}, [-5.5, 999999999999999999]),
    "enum": (
        {"enum": ["red", "grün", 'say "hi"\\', 1, 2.5, None, True, [1, {"a": "b"}], {}]},
        ["red", 'say "hi"\\', 1, 2.5, None, True, [1, {"a": "b"}], {}],
    ),
    "enum and type": ({"type": "string", "enum": ["a", 1, "b"]}, ["a", "b"]),
    "enum and const": ({"enum": [1, 2, True], "const": 1.0}, [1]),
    "const": ({"const": {"a": [1, "x"]}}, [{"a": [1, "x"]}]),
    "any object": ({"type": "object"}, [{}, {"a": 1}, {"a\n": 1, "b": [{}]}]),
    "closed object": ({"type": "object", "properties": {}, "additionalProperties": False}, [{}]),
    "required": (obj(a={"type": "integer"}, b={"type": "string"}), [{"a": 1, "b": "x"}]),
    "optional members": (
        {"properties": {n: {"type": "boolean"} for n in "abc"}, "required": ["b"]},
        [{"b": True}, {"a": True, "b": True}, {"b": True, "c": False}, {"a": True, "b": True, "c": True}],
    ),
    "all optional": (
        {"type": "object", "properties": {n: {"type": "null"} for n in "abc"}},
        [dict.fromkeys(names) for size in range(4) for names in itertools.combinations("abc", size)],
    ),
    "further members": (
        {
            "type": "object",
            "properties": {"ab": {"type": "integer"}, "a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": {"type": "string"},
        },
        [{"a": 1}, {"ab": 1, "a": 2, "abc": "x", "": "y", "b": "z", "aa": ""}],
    ),
    "open object": (
        {
            "type": "object",
            "properties": {'say "': {"type": "integer"}, "ü": False},
            "additionalProperties": True,
        },
        [{}, {'say "': 1}, {'say "': 1, "u": None}, {"x": {"y": []}}],
    ),
    "map": ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, "b": 2}]),
    "required, undeclared": (
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z"]},
        [{"z": [1]}, {"a": None, "z": "x"}],
    ),
    "required by additionalProperties": (
        {"type": "object", "required": ["z"], "additionalProperties": {"type": "integer"}},
        [{"z": 1}, {"z": 1, "y": 2}],
    ),
    "member counts": ({**obj(a={"type": "null"}), "minProperties": 1, "maxProperties": 1}, [{"a": None}]),
    "names of all sorts": (
        obj(**{"a b": True, "~/%": True, '"\\\n': True, "日": True}),
        [{"a b": 1, "~/%": 1, '"\\\n': 1, "日": 1}],
    ),
    "array": ({"type": "array"}, [[], [1], [1, "a", [None, {}]]]),
    "array of": ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]]),
    "array lengths": (
        {"items": {"type": "null"}, "minItems": 2, "maxItems": 4},
        [[None] * n for n in (2, 3, 4)],
    ),
    "one element": ({"items": {"type": "null"}, "minItems": 1, "maxItems": 1}, [[None]]),
    "at most one": ({"items": {"type": "null"}, "maxItems": 1}, [[], [None]]),
    "empty array": ({"type": "array", "maxItems": 0}, [[]]),
    "no items": ({"type": "array", "items": False}, [[]]),
    "long array": ({"items": {"const": 1}, "maxItems": 2100}, [[], [1] * 1002, [1] * 2100]),
    "tuple": (
        {"prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 1, "items": False},
        [[1], [1, "a"]],
    ),
    "tuple and items": (
        {
            "prefixItems": [{"const": "a"}, {"const": "b"}],
            "items": {"type": "null"},
            "minItems": 3,
            "maxItems": 4,
        },
        [["a", "b", None], ["a", "b", None, None]],
    ),
    "impossible tail": ({"prefixItems": [{"type": "null"}, False, True]}, [[], [None]]),
    "tree": (TREE, [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": []}, {"value": 3}]}]),
    "linked list": (
        {**obj(v={"type": "null"}), "properties": {"v": {"type": "null"}, "next": {"$ref": "#"}}},
        [{"v": None}, {"v": None, "next": {"v": None, "next": {"v": None}}}],
    ),
    "nullable reference": (
        {
            "anyOf": [{"$ref": "#/definitions/a~1b"}, {"type": "null"}],
            "definitions": {"a/b": obj(n={"const": 1})},
        },
        [None, {"n": 1}],
    ),
    "reference with siblings": (
        {"$ref": "#/$defs/s", "minLength": 2, "$defs": {"s": {"type": "string", "maxLength": 3}}},
        ["ab", "abc"],
    ),
    "anyOf": (
        {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string", "maxLength": 2}]},
        [5, "", "ab"],
    ),
    "anyOf with siblings": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": None}, {"b": None}, {"a": None, "b": None}],
    ),
    "allOf": (
        {"allOf": [obj(a={"type": "integer"}), {"properties": {"a": {"minimum": 3}, "b": {"type": "null"}}}]},
        [{"a": 3}, {"a": 4, "b": None}],
    ),
    "allOf closes": (
        {
            "allOf": [
                {"properties": {"a": True, "b": True}},
                {"properties": {"a": {"const": 1}}, "additionalProperties": False},
            ]
        },
        [{}, {"a": 1}],
    ),
    "oneOf by type": ({"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "array"}]}, [1, "a", [1]]),
    "oneOf by const": (
        {"oneOf": [obj(**CAT), obj(**DOG)]},
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "good": True}],
    ),
    "oneOf, its type beside it": (
        {
            "type": "object",
            "oneOf": [{"properties": members, "required": ["kind"]} for members in (CAT, DOG)],
        },
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "good": True}],
    ),
    "oneOf by members": (
        {"oneOf": [{**obj(**{name: {"type": "null"}}), "additionalProperties": False} for name in "ab"]},
        [{"a": None}, {"b": None}],
    ),
    "a data model": (PETS, [{"name": "x", "pet": {"kind": "dog", "good": True}, "age": None, "tags": ["a"]}]),
    "date": ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31", "2000-02-29", "2023-02-28"]),
    "time": ({"type": "string", "format": "time"}, ["23:59:59Z", "00:00:00.123+05:30"]),
    "date-time": ({"type": "string", "format": "date-time"}, ["2024-06-30T12:00:00Z"]),
    "uuid": ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"]),
    "Zod's uuid": (
        obj(
            id={
                "type": "string",
                "format": "uuid",
                "pattern": "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}"
                "-[0-9a-fA-F]{12}|00000000-0000-0000-0000-000000000000)$",
            }
        ),
        [{"id": "123e4567-e89b-12d3-a456-426614174000"}],
    ),
    "Zod's date": (
        {
            "type": "string",
            "format": "date",
            "pattern": r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)"
            r"-02-29|\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
            r"|(?:02)-(?:0[1-9]|1\d|2[0-8])))$",
        },
        ["2024-02-29", "1999-12-31"],
    ),
    "pattern": ({"type": "string", "pattern": "^[A-Z]{2}-\\d{3,4}(?:x|yz)?$"}, ["AB-123", "QQ-1234yz"]),
    "pattern and lengths": ({"pattern": "^a{2,5}$", "minLength": 1, "maxLength": 5}, ["aa", "aaaaa"]),
    "pattern found within": ({"type": "string", "pattern": "0\\d+"}, ["00", "a\n0123b"]),
    "anchored branches": ({"type": "string", "pattern": "^a|0$"}, ["a", "axx", "0", "xx0"]),
    "characters to escape": (
        {"type": "string", "pattern": '^["\\\\\\n\\u0041-C\\-\\]]+$'},
        ['"\\\n', "ABC-]"],
    ),
    "negated class": ({"type": "string", "pattern": "^[^a-y0-9]+.\\S[!-/]$"}, ["zz?x!", '"z日b.']),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_allowed_answer_is_valid_under_the_schema(vocab: LlamaVocabulary, name: str) -> None:
    check_that_all_it_writes_is_valid(vocab, SCHEMAS[name][0], range(6))


@pytest.mark.parametrize("name", SCHEMAS)
def test_valid_instances_are_allowed_in_every_usual_spelling(vocab: LlamaVocabulary, name: str) -> None:
    schema, instances = SCHEMAS[name]
    walker = Walker(vocab, JsonSchema(schema))
    for instance in instances:
        Draft202012Validator(schema).validate(instance)
        for layout in ({}, {"separators": (",", ":")}, {"indent": 2}):
            text = json.dumps(instance, ensure_ascii=False, **layout)
            assert walker.accepts(text), text


REFUSED: list[tuple[Any, str]] = [
    ([], "#"),
    ("string", "#"),
    (None, "#"),
    ({1: 2}, "#"),
    ({"const": {1}}, "#/const"),
    (False, "#"),
    ({"type": "text"}, "#/type"),
    ({"type": []}, "#/type"),
    ({"type": {"a": 1}}, "#/type"),
    ({"properties": {"a/b~": {"if": True}}}, "#/properties/a~1b~0/if"),
    ({"items": {"uniqueItems": True}}, "#/items/uniqueItems"),
    ({"requierd": ["a"]}, "#/requierd"),
    ({"propertyNames": {}}, "#/propertyNames"),
    ({"contains": {}}, "#/contains"),
    ({"dependentRequired": {}}, "#/dependentRequired"),
    ({"unevaluatedProperties": False}, "#/unevaluatedProperties"),
    ({"properties": {"a": {"$id": "http://x/"}}}, "#/properties/a/$id"),
    ({"$dynamicRef": "#a"}, "#/$dynamicRef"),
    ({"properties": []}, "#/properties"),
    ({"properties": {"a": 1}}, "#/properties/a"),
    ({"required": "a"}, "#/required"),
    ({"required": [1]}, "#/required"),
    ({"items": [True]}, "#/items"),
    ({"anyOf": []}, "#/anyOf"),
    ({"allOf": [{"type": "null"}, 3]}, "#/allOf/1"),
    ({"enum": []}, "#/enum"),
    ({"enum": [float("nan")]}, "#/enum/0"),
    ({"enum": ["\ud800"]}, "#/enum/0"),
    ({"const": 2**63}, "#/const"),
    ({"const": float("inf")}, "#/const"),
    ({"minLength": -1}, "#/minLength"),
    ({"minLength": True}, "#/minLength"),
    ({"minLength": 1.5}, "#/minLength"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#/minLength"),
    ({"minimum": float("inf")}, "#/minimum"),
    ({"type": "integer", "minimum": 10**18}, "#/minimum"),
    ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "#/minimum"),
    ({"minimum": 10**2000}, "#/minimum"),
    ({"type": "object", "minProperties": 2}, "#/minProperties"),
    ({"type": "object", "properties": {"a": True, "b": True}, "maxProperties": 1}, "#/maxProperties"),
    ({"type": "object", "required": ["b"], "additionalProperties": False}, "#/required"),
    ({"$ref": "other.json"}, "#/$ref"),
    ({"$ref": "http://example.com/#/a"}, "#/$ref"),
    ({"$ref": "#anchor"}, "#/$ref"),
    ({"$ref": "#/$defs/a"}, "#/$ref"),
    ({"$ref": "#/title", "title": "t"}, "#/$ref"),
    ({"$ref": "#/$defs/a/b", "$defs": {"a": {"$id": "x", "properties": {"b": True}}}}, "#/$ref"),
    ({"not": {"type": "null"}}, "#/not"),
    ({"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"minLength": -1}}}, "#/$defs/n/minLength"),
    ({"properties": {"a%20/~": {"type": "text"}}}, "#/properties/a%20~1~0/type"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
    ({"oneOf": [True, True]}, "#/oneOf"),
    ({"oneOf": [{"properties": CAT}, {"properties": DOG}]}, "#/oneOf"),
    ({"oneOf": [{"minLength": 2}, {"maxLength": 2}]}, "#/oneOf"),
    ({"type": "integer", "oneOf": [{"maximum": 3}, {"minimum": 4}]}, "#/oneOf"),
    ({"const": "a", "oneOf": [True, {"properties": {"a": True}, "maxProperties": 0}]}, "#/oneOf"),
    ({"items": {"oneOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}, "$defs": {"a": True}}, "#/items/oneOf"),
    ({"type": "string", "not": {"maxLength": 2}}, "#/not"),
    ({"not": True}, "#/not"),
    ({"format": "idn-email"}, "#/format"),
    ({"type": "string", "format": "date", "minLength": 11}, "#/minLength"),
    ({"pattern": 1}, "#/pattern"),
    *[
        ({"type": "string", "pattern": pattern}, "#/pattern")
        for pattern in (
            "(?=a)",
            "(?!a)",
            r"(a)\1",
            r"\ba",
            "*",
            "(a",
            "a)",
            "[",
            "[]",
            "[b-a]",
            "a$b",
            "a^",
            "a{2,1}",
            "a{,2}",
            "a{",
            "\ud800",
            "\\",
            "(" * 999 + "a" + ")" * 999,
        )
    ],
    ({"allOf": [{"anyOf": [{"minLength": n}, {"maxLength": n}]} for n in range(30)]}, "#/allOf"),
    ({"examples": [0] * 20_001}, "#"),
]


@pytest.mark.parametrize(("schema", "pointer"), REFUSED, ids=lambda value: repr(value)[:60])
def test_keywords_that_cannot_be_enforced_are_refused_with_their_path(schema: Any, pointer: str) -> None:
    with pytest.raises(ConstraintError) as refusal:
        check_constraint(JsonSchema(schema))
    assert str(refusal.value).startswith(f"{pointer}: ")
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_status is ExitStatus.USAGE


REJECTED: list[tuple[Schema, list[str]]] = [
    (
        {},
        [
            "",
            " 1",
            "1 ",
            "01",
            "+1",
            "1.",
            ".5",
            "nul",
            "[1,]",
            '{"a":1,}',
            "'a'",
            '"\n"',
            '"\\x"',
            "--1",
        ],
    ),
    ({"type": "string"}, ['"\\ud800"', '"\\ud83dx"', '"\\udc00"', '"\\u12"', '"a', '"\t"', '"\x7f"']),
    ({"type": "integer"}, ["1.0", "1e3", "01"]),
    ({"type": "string", "maxLength": 2}, ['"abc"', '"\\u0061\\u0062\\u0063"']),
    (
        obj(a=True),
        ["{}", '{"a":1,"a":2}', '{"b":2,"a":1}', '{"\\u0061":1}', '{"a":1,"\\u0061":2}', '{"a":  1}'],
    ),
    (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": {"const": 1}},
        ['{"a":1}', '{"\\u0061":1}'],
    ),
    ({"type": "string", "maxLength": 2100}, [json.dumps("x" * 2101), json.dumps("x" * 4200)]),
    ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2001}, ["[1]", str([1] * 2002)]),
    ({"minLength": 1, "maxLength": 9, "allOf": [{"minLength": 2, "maxLength": 3}]}, ['"a"', '"abcd"']),
    ({"pattern": r"^[^\d]$"}, ['"3"']),
    ({"const": "a"}, ['"b"', '"aa"', '"\\u0061"', "a"]),
    ({"type": "array"}, ["[1,  2]", "[1,\n\n2]", "[\n" + " " * 33 + "1]"]),
    ({"type": "string", "format": "date"}, ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"', '"2024-13-01"']),
]


@pytest.mark.parametrize(("schema", "texts"), REJECTED, ids=lambda value: repr(value)[:40])
def test_texts_that_are_not_valid_are_not_allowed(
    vocab: LlamaVocabulary, schema: Schema, texts: list[str]
) -> None:
    walker = Walker(vocab, JsonSchema(schema))
    assert [text for text in texts if walker.accepts(text)] == []


PATTERNS = [
    "^[a-c]x*|[n-z]$",
    "^(ab|c(d|e)?)+$",
    "^\\w+@\\w+\\.(com|org)$",
    "^.{1,3}$",
    "[^,;]",
    "^[\\w.-]+$",
]
PATTERNS += [
    "^\\S+\\s\\D$",
    "^[!-~]{0,4}?$",
    "^(?:)$",
    "",
    "^[^\\s\\d]{2}$",
    "^\\/\\u00e9\\x41$",
    "^[\\]\\[^]+$",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_written_text_matches_the_pattern(vocab: LlamaVocabulary, pattern: str) -> None:
    walker = Walker(vocab, JsonSchema({"type": "string", "pattern": pattern}))
    for seed in range(12):
        text = walker.write(seed)
        assert re.search(pattern, json.loads(text)), text


SAID = [
    (
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "#/oneOf: a value could match two of its branches.",
    ),
    ({"nullable": True}, '#/nullable: this keyword cannot be enforced. Use a list of types with "null".'),
    ({"uniqueItems": True}, "#/uniqueItems: this keyword cannot be enforced. Leave it out."),
    ({"pattern": "(?=a)"}, "#/pattern: look-around, including look-ahead and look-behind, is not supported."),
    ({"enum": []}, "#/enum: anyOf is empty."),
    ({"$ref": "a.json"}, "#/$ref: `a.json` is not in this schema. Use `#/$defs/...`."),
    ({"allOf": {}}, "#/allOf: a list with schemas is expected, not an object."),
    ({"properties": {"a\n\x1b[2J": {"not": {}}}}, r"#/properties/a\n\x1b[2J/not: this keyword cannot"),
]


@pytest.mark.parametrize(("schema", "says"), SAID, ids=lambda value: repr(value)[:40])
def test_a_refusal_says_where_and_what_in_one_printable_line(schema: Schema, says: str) -> None:
    with pytest.raises(ConstraintError) as refused:
        check_constraint(JsonSchema(schema))
    assert str(refused.value).startswith(says)


def test_a_schema_of_any_depth_is_refused_without_exhausting_the_stack() -> None:
    schema: Schema = {"type": "null"}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ConstraintError, match="nests deeper than 100"):
        check_constraint(JsonSchema(schema))
    while schema:  # freed from the outside in: freeing it nested would recurse
        schema = schema.pop("items", {})


@pytest.mark.parametrize("form", ["{}", '{{"anyOf": [{}, {{"type": "string"}}]}}', '{{"items": {}}}'])
def test_long_chains_of_references_do_not_exhaust_the_stack(vocab: LlamaVocabulary, form: str) -> None:
    links = {f"a{n}": json.loads(form.format(json.dumps({"$ref": f"#/$defs/a{n + 1}"}))) for n in range(3000)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**links, "a3000": {"type": "null"}}}
    assert json.loads(Walker(vocab, JsonSchema(schema)).write(1)) in (None, []) or form != "{}"


def test_long_chains_of_rules_do_not_exhaust_the_stack(vocab: LlamaVocabulary) -> None:
    rules = [f"r{n}: r{n + 1}" for n in range(5000)]
    grammar = LarkGrammar("\n".join(["start: r0", *rules, 'r5000: "a"']))
    assert Walker(vocab, grammar).write(1) == "a"


def test_a_constraint_that_takes_too_long_to_compile_is_refused() -> None:
    with pytest.raises(ConstraintError, match="longer than 0 s to compile"):
        check_constraint(JsonSchema({"type": "integer", "multipleOf": 99_991}), limit_s=0)


@pytest.mark.parametrize("name", ["arr_ref", "bom", "crlf", "enum600", "nested_len", "recursive", "zod_uuid"])
def test_schemas_that_comparable_tools_had_trouble_with_are_enforced(
    vocab: LlamaVocabulary, name: str
) -> None:
    constraint = read_constraint(SCHEMA_FILES / f"{name}.json", None, None)
    assert isinstance(constraint, JsonSchema)
    check_that_all_it_writes_is_valid(vocab, dict(constraint.schema), range(6))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("comment", " is not JSON: "),
        ("dup", 'two members named "type"'),
        ("nan", ".json#/minimum: nan is not a number of JSON."),
        ("utf16", "It is UTF-16"),
    ],
)
def test_files_that_are_not_a_schema_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as refused:
        read_constraint(SCHEMA_FILES / f"{name}.json", None, None)
    assert str(refused.value).startswith(str(SCHEMA_FILES / f"{name}.json"))


def test_an_enum_of_a_thousand_values(vocab: LlamaVocabulary) -> None:
    towns = [f"Region/Town_{n}" for n in range(1000)]
    walker = Walker(vocab, JsonSchema(obj(tz={"type": "string", "enum": towns})))
    assert all(walker.accepts(json.dumps({"tz": town})) for town in towns[::50])
    assert not walker.accepts('{"tz": "Region/Town_1000"}')
    assert {json.loads(walker.write(seed))["tz"] for seed in range(20)} <= set(towns)


def test_characters_that_only_an_escape_can_write_are_written_exactly(vocab: LlamaVocabulary) -> None:
    values = ["\x00\x1f\x7f", "a\x01b", '\n\t"\\']
    walker = Walker(vocab, JsonSchema({"enum": values}))
    assert {json.loads(walker.write(seed)) for seed in range(20)} == set(values)
    pattern = Walker(vocab, JsonSchema({"type": "string", "pattern": "^a\\x01b$"}))
    assert json.loads(pattern.write(1)) == "a\x01b"


@pytest.mark.parametrize(
    "pattern",
    [
        r'^[^"]$',
        r'^[^"\\]$',
        r"^[^ -~]$",
        r"^[^\]\\]$",
        r'^[^]"]$',
        r"^[\x00-#]$",
        r"^\[\^a$",
        r'^\\[^"a]$',
        r"^\W$",
        r"^[^\x20-\x7e]$",
    ],
)
def test_a_class_of_characters_has_no_others(vocab: LlamaVocabulary, pattern: str) -> None:
    """As a value and as the name of a member."""
    value = Walker(vocab, JsonSchema({"type": "string", "pattern": pattern}))
    closed = {
        "type": "object",
        "patternProperties": {pattern: {"type": "null"}},
        "additionalProperties": False,
    }
    name = Walker(vocab, JsonSchema(closed))
    for text in ("", "\\", "["):
        for character in '"\\\n\t/a] ^[é':
            is_match = re.search(f"{pattern[:-1]}\\Z", text + character, re.ASCII) is not None
            assert value.accepts(json.dumps(text + character, ensure_ascii=False)) is is_match
            assert name.accepts(json.dumps({text + character: None}, ensure_ascii=False)) is is_match


def test_dates_are_existing_days(vocab: LlamaVocabulary) -> None:
    day = Walker(vocab, JsonSchema({"type": "string", "format": "date"}))
    for year, is_leap in (
        (2000, True),
        (1900, False),
        (2023, False),
        (2024, True),
        (2400, True),
        (2012, True),
    ):
        assert day.accepts(f'"{year}-02-29"') is is_leap
    assert all(day.accepts(f'"2023-{month:02}-28"') for month in range(1, 13))
    assert not day.accepts('"2023-06-31"')
    moment = Walker(vocab, JsonSchema({"type": "string", "format": "date-time"}))
    assert moment.accepts('"2024-02-29T10:00:00Z"')
    assert not moment.accepts('"2023-02-29T10:00:00Z"')


@pytest.mark.parametrize(
    ("source", "accepted", "rejected"),
    [
        (Regex("[0-9]{3}-[a-z]+"), ["123-a", "000-xyz"], ["", "12-a", "123-", " 123-a", "123-a\n"]),
        (Regex("yes|no"), ["yes", "no"], ["ye", "yesno"]),
        (Regex(r"/\S+"), ["/a"], ["a"]),
        (LarkGrammar('start: sum\nsum: NUM ("+" NUM)*\nNUM: /[0-9]+/'), ["1", "1+22"], ["+", "1+"]),
        (LarkGrammar('// c\nstart: "(" start ")" | "x"\n'), ["x", "((x))"], ["((x)", ""]),
        (LarkGrammar('start: %json {"type": "boolean"}'), ["true"], ["1"]),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_regular_expressions_and_grammars(
    vocab: LlamaVocabulary, source: AnswerConstraint, accepted: list[str], rejected: list[str]
) -> None:
    walker = Walker(vocab, source)
    assert [text for text in accepted if not walker.accepts(text)] == []
    assert [text for text in rejected if walker.accepts(text)] == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (Regex("(?=a)"), "look-around, including look-ahead and look-behind, is not supported."),
        (Regex("[a"), "unclosed character class."),
        (Regex("a" * 100_000), "the regular expression has 100,000 characters; at most 65,536 can be"),
        (LarkGrammar("start: x\nx: foo"), 'line 2: unknown name: "foo".'),
        (LarkGrammar('start: ("a"'), "line 1: Expected token"),
        (LarkGrammar("start: x\n\nx: /(/"), "line 3: unclosed group."),
        (LarkGrammar("start: start"), "nothing satisfies it."),
        (LarkGrammar('start: <think> "a"'), "line 1: unknown special token"),
        (LarkGrammar(""), "no start rule found."),
        (JsonSchema({"$ref": "#"}), "#: nothing satisfies it."),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_errors_say_what_is_wrong_with_an_expression_or_grammar(
    vocab: LlamaVocabulary, source: AnswerConstraint, says: str
) -> None:
    with pytest.raises(ConstraintError) as refused:
        compile_constraint(source, vocab)
    assert str(refused.value).startswith(says)
    assert str(refused.value).isprintable()


def test_each_reply_has_a_matcher_of_its_own(vocab: LlamaVocabulary) -> None:
    """Also on several threads at once."""
    constraint = compile_constraint(JsonSchema(obj(a={"type": "string"})), vocab)
    text = b'{"a":"hello"}'
    followed: list[int] = []

    def follow() -> None:
        matcher = constraint.matcher()
        for n, byte in enumerate(text):
            assert byte in matcher.allowed(), text[:n]
            matcher.accept(byte)
        followed.extend(matcher.allowed().tolist())

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert followed == [END] * 4


def test_a_matcher_goes_back_any_number_of_tokens(vocab: LlamaVocabulary) -> None:
    matcher = compile_constraint(Regex("ab?c"), vocab).matcher()
    for byte in b"abc":
        matcher.accept(byte)
    assert matcher.is_finished
    assert matcher.allowed().tolist() == [END]
    matcher.rollback(2)
    assert not matcher.is_finished
    assert bytes(matcher.allowed().tolist()) == b"bc"
    matcher.accept(ord("c"))
    matcher.accept(END)
    matcher.rollback(1)
    matcher.reset()
    assert bytes(matcher.allowed().tolist()) == b"a"
    with pytest.raises(EngineError, match="token 98 is not allowed"):
        matcher.accept(ord("b"))


def test_every_token_that_continues_an_answer_is_allowed_and_no_other(
    loaded: LoadedModel, vocab: LlamaVocabulary
) -> None:
    """Tokens of several bytes, against the same constraint byte by byte; special tokens are not text."""
    source = JsonSchema(obj(count={"type": "integer"}, word={"enum": ["the", "there", "then"]}))
    words, table = compile_constraint(source, loaded.vocabulary), loaded.vocabulary.table()
    letters = compile_constraint(source, vocab)
    for text in ("", '{"', '{"count": ', '{"count": 12', '{"count":1, "word": "', '{"count":1,"word":"the'):
        matcher = words.matcher()
        for token in loaded.vocabulary.encode_text(text):
            matcher.accept(token)
        expected = [
            token
            for token, piece in enumerate(table.pieces)
            if token not in table.special and piece and is_allowed(letters, text.encode() + piece)
        ]
        assert matcher.allowed().tolist() == expected
    assert len(loaded.vocabulary.table().pieces) == loaded.vocabulary.size


def is_allowed(constraint: Constraint, text: bytes) -> bool:
    """Whether an answer may begin so."""
    matcher = constraint.matcher()
    for byte in text:
        if byte not in matcher.allowed():
            return False
        matcher.accept(byte)
    return True


def test_the_end_may_be_any_token_that_ends_a_reply(loaded: LoadedModel) -> None:
    matcher = compile_constraint(Regex("a"), loaded.vocabulary).matcher()
    matcher.accept(loaded.vocabulary.encode_text("a")[0])
    assert matcher.allowed().tolist() == sorted(loaded.vocabulary.table().ends)


COUNTS = st.integers(0, 3)
NAMES = st.sampled_from(["a", "b", "ab", "kind", ""])
LEAVES = st.one_of(
    st.booleans(),
    st.fixed_dictionaries(
        {}, optional={"type": st.sampled_from(["integer", "string", "null", "number", "array"])}
    ),
    st.fixed_dictionaries({}, optional={"minLength": COUNTS, "maxLength": COUNTS, "type": st.just("string")}),
    st.fixed_dictionaries({}, optional={"minimum": COUNTS, "exclusiveMaximum": st.integers(2, 40)}),
    st.fixed_dictionaries({"enum": st.lists(st.sampled_from([0, 1, "a", "b", None, True]), min_size=1)}),
    st.fixed_dictionaries({"const": st.sampled_from(["a", "b", 1.0, False])}),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={"pattern": st.sampled_from(['^[^"a]+$', "b", "^a|0$"]), "maxLength": st.integers(1, 4)},
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["number", "integer"])},
        optional={
            "multipleOf": st.sampled_from([2, 3, 0.5]),
            "minimum": st.sampled_from([-2.5, 0, 1e3]),
            "exclusiveMaximum": st.sampled_from([0.25, 1024, 1e9]),
        },
    ),
    st.just({"$ref": "#/$defs/shared"}),
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    members = st.dictionaries(NAMES, inner, max_size=3)
    objects: dict[str, st.SearchStrategy[Any]] = {
        "type": st.just("object"),
        "properties": members,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$", "^[^a]+$"]), inner, max_size=2),
        "additionalProperties": inner,
        "required": st.lists(NAMES, max_size=2, unique=True),
        "minProperties": COUNTS,
        "maxProperties": COUNTS,
        "anyOf": several,
    }
    arrays = {"items": inner, "prefixItems": several, "minItems": COUNTS, "maxItems": COUNTS}
    return st.one_of(
        st.fixed_dictionaries({}, optional=objects),
        st.fixed_dictionaries({}, optional=arrays),
        *(st.fixed_dictionaries({keyword: several}) for keyword in ("anyOf", "oneOf", "allOf")),
        st.fixed_dictionaries({"$ref": st.just("#/$defs/shared"), "allOf": several}),
    )


@given(
    st.recursive(LEAVES, nested, max_leaves=8),
    st.recursive(LEAVES, nested, max_leaves=4).filter(lambda shared: "$ref" not in json.dumps(shared)),
    st.integers(0, 1000),
)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_a_random_schema_is_refused_or_obeyed(
    vocab: LlamaVocabulary, body: Schema, shared: Schema, seed: int
) -> None:
    schema: Schema = {"allOf": [body], "$defs": {"shared": shared}}
    try:
        compile_constraint(JsonSchema(schema), vocab)
    except ConstraintError:
        return
    check_that_all_it_writes_is_valid(vocab, schema, range(seed, seed + 3))
