"""Grammars made from JSON schemas, walked by llama.cpp itself: what they accept is valid."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from qwq_local.engine.schema import schema_to_gbnf
from qwq_local.errors import ExitStatus, SchemaError

END = 256
QUOTE, ZERO = 0x22, 0x30
ENDINGS = b']}"0n,:'
MAX_BYTES = 6_000
TOKEN = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # llama_token_data
Schema = dict[str, Any] | bool


class Candidates:
    """Tokens as llama.cpp's samplers take them, and a view of their logits."""

    def __init__(self, count: int) -> None:
        self._tokens = (llama_cpp.llama_token_data * count)()
        self.view = np.frombuffer(memoryview(self._tokens), dtype=TOKEN)
        self.view["id"] = np.arange(count)

    def permitted_by(self, sampler: Any) -> list[int]:
        """The tokens among them that the sampler lets pass."""
        self.view["logit"] = 0
        array = llama_cpp.llama_token_data_array(self._tokens, len(self._tokens), -1, False)
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        return [int(token) for token in self.view["id"][np.isfinite(self.view["logit"])]]


class Walker:
    """llama.cpp's grammar sampler over a vocabulary of the 256 bytes and an end token."""

    def __init__(self, vocab: Any, grammar: str) -> None:
        self._sampler: Any = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        assert self._sampler, f"llama.cpp does not parse\n{grammar}"
        self._all = Candidates(END + 1)
        self._one = Candidates(1)

    def __enter__(self) -> Walker:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_sampler_free(self._sampler)

    def allowed(self) -> list[int]:
        """The tokens that may come next."""
        return self._all.permitted_by(self._sampler)

    def allows(self, token: int) -> bool:
        """Whether this one may."""
        self._one.view["id"] = token
        return bool(self._one.permitted_by(self._sampler))

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._sampler, token)

    def accepts(self, text: str) -> bool:
        """Whether `text` as a whole is in the language. A forbidden token is never fed."""
        llama_cpp.llama_sampler_reset(self._sampler)
        for byte in text.encode():
            if not self.allows(byte):
                return False
            self.accept(byte)
        return self.allows(END)

    def write(self, seed: int) -> str:
        """A random text of the language; past some length the shortest way out is taken."""
        llama_cpp.llama_sampler_reset(self._sampler)
        chance = random.Random(seed)
        written = bytearray()
        while (token := self._choose(self.allowed(), written, chance)) != END:
            written.append(token)
            self.accept(token)
            assert len(written) < MAX_BYTES, bytes(written)
        return written.decode()

    def _choose(self, allowed: list[int], written: bytearray, chance: random.Random) -> int:
        # llama.cpp takes overlong UTF-8 (E0 80-9F, F0 80-8F) for a code point; no tokenizer writes it.
        least = {0xE0: 0xA0, 0xF0: 0x90}.get(written[-1] if written else 0, 0)
        allowed = [token for token in allowed if token >= least]
        assert allowed, f"dead end after {bytes(written)!r}"
        in_string = len(allowed) > 40
        if len(written) > 300 or chance.random() < 0.2:
            for token in [QUOTE] if in_string else [END, *ENDINGS]:
                if token in allowed:
                    return token
        if in_string and ZERO in allowed and chance.random() < 0.2:
            return ZERO  # the way out of a string whose pattern is still to be found
        common = [token for token in allowed if token < 0x80 or token == END]
        return chance.choice(common if common and chance.random() < 0.9 else allowed)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A llama.cpp vocabulary with one token for each byte, and one that ends."""
    path = tmp_path_factory.mktemp("vocab") / "bytes.gguf"
    write_byte_vocabulary(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model
    yield llama_cpp.llama_model_get_vocab(model)
    llama_cpp.llama_model_free(model)


def write_byte_vocabulary(path: Path) -> None:
    """The bytes in their order, spelled as byte-level BPE spells them, then <end>."""
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


def check_that_all_it_writes_is_valid(vocab: Any, schema: Schema, seeds: range) -> None:
    validator = Draft202012Validator(schema)
    with Walker(vocab, schema_to_gbnf(schema)) as walker:
        for seed in seeds:
            text = walker.write(seed)
            errors = [error.message for error in validator.iter_errors(json.loads(text))]
            assert not errors, f"{text} under {schema}: {errors}"


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


CAT = {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}}
DOG = {"kind": {"const": "dog"}, "good": {"const": True}}
# What a Python data model with a tagged union makes.
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
    "anything": (True, [None, True, -0.5, 'é\n"\\', [], {}, {"a": [1, {"b": None}]}, 1e-7, [[[[[[[[]]]]]]]]]),
    "anything, annotated": ({"title": "x", "$comment": "y", "x-mine": 1}, [1, {"a": {}}]),
    "null": ({"type": "null"}, [None]),
    "boolean": ({"type": "boolean"}, [True, False]),
    "string": ({"type": "string"}, ["", "a", "日本\t😀", "\u0000", "a/b"]),
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
    "lone surrogate": ({"enum": ["\ud800"]}, ["\ud800"]),
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
    "oneOf by members": (
        {"oneOf": [obj(a={"type": "null"}), obj(b={"type": "null"})]},
        [{"a": None}, {"b": None}],
    ),
    "oneOf by range": (
        {"type": "integer", "oneOf": [{"maximum": 3}, {"exclusiveMinimum": 3, "maximum": 9}]},
        [-3, 3, 4, 9],
    ),
    "a data model": (PETS, [{"name": "x", "pet": {"kind": "dog", "good": True}, "age": None, "tags": ["a"]}]),
    "not": ({"type": ["string", "integer"], "not": {"type": "string"}, "anyOf": [{"type": "integer"}]}, [1]),
    "date": ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31", "2000-02-29", "2023-02-28"]),
    "time": ({"type": "string", "format": "time"}, ["23:59:59Z", "00:00:00.123+05:30"]),
    "date-time": ({"type": "string", "format": "date-time"}, ["2024-06-30T12:00:00Z"]),
    "uuid": ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"]),
    "pattern": ({"type": "string", "pattern": "^[A-Z]{2}-\\d{3,4}(?:x|yz)?$"}, ["AB-123", "QQ-1234yz"]),
    "pattern and lengths": ({"pattern": "^a{2,5}$", "minLength": 1, "maxLength": 5}, ["aa", "aaaaa"]),
    "pattern found within": ({"type": "string", "pattern": "0\\d+"}, ["00", "a\n0123b"]),
    "anchored branches": ({"type": "string", "pattern": "^a|0$"}, ["a", "axx", "0", "xx0"]),
    "characters to escape": (
        {"type": "string", "pattern": '^["\\\\\\n\\u0041-C\\-\\]]+$'},
        ['"\\\n', "ABC-]"],
    ),
    "negated class": ({"type": "string", "pattern": "^[^a-y\\d]+.\\S\\W$"}, ["zz?x!", '"z日b.']),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_grammar_writes_is_valid_under_the_schema(vocab: Any, name: str) -> None:
    check_that_all_it_writes_is_valid(vocab, SCHEMAS[name][0], range(6))


@pytest.mark.parametrize("name", SCHEMAS)
def test_valid_instances_are_accepted_in_every_usual_spelling(vocab: Any, name: str) -> None:
    schema, instances = SCHEMAS[name]
    with Walker(vocab, schema_to_gbnf(schema)) as walker:
        for instance in instances:
            Draft202012Validator(schema).validate(instance)
            assert walker.accepts(spelled(instance)), instance
            assert walker.accepts(spelled(instance, separators=(",", ":"))), instance
            if "enum" not in name and name != "const":
                assert walker.accepts(spelled(instance, indent=2)), instance


def spelled(instance: Any, **layout: Any) -> str:
    try:
        text = json.dumps(instance, ensure_ascii=False, **layout)
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(instance, **layout)
    return text


# What cannot be enforced, is no schema, or has no value: and the pointer that the message leads with.
REFUSED: list[tuple[Any, str]] = [
    ([], "#"),
    ("string", "#"),
    (None, "#"),
    ({1: 2}, "#"),
    ({"const": {1}}, "#"),
    (False, "#"),
    ({"type": "text"}, "#/type"),
    ({"type": []}, "#/type"),
    ({"type": {"a": 1}}, "#/type"),
    ({"properties": {"age": {"multipleOf": 2}}}, "#/properties/age/multipleOf"),
    ({"properties": {"a/b~": {"if": True}}}, "#/properties/a~1b~0/if"),
    ({"items": {"uniqueItems": True}}, "#/items/uniqueItems"),
    ({"requierd": ["a"]}, "#/requierd"),
    ({"patternProperties": {}}, "#/patternProperties"),
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
    ({"enum": [float("nan")]}, "#/enum"),
    ({"const": float("inf")}, "#/const"),
    ({"enum": ["a", "bcd"], "maxLength": 2}, "#/enum"),
    ({"enum": list(range(1001))}, "#/enum"),
    ({"minLength": -1}, "#/minLength"),
    ({"minLength": True}, "#/minLength"),
    ({"minLength": 1.5}, "#/minLength"),
    ({"minLength": 2001}, "#/minLength"),
    ({"properties": {"a": {"maxLength": 10**9}}}, "#/properties/a/maxLength"),
    ({"items": {"type": "null"}, "maxItems": 10**9}, "#/maxItems"),
    ({"minItems": 10**9}, "#/minItems"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#"),
    ({"exclusiveMinimum": True}, "#/exclusiveMinimum"),
    ({"minimum": float("inf")}, "#/minimum"),
    ({"type": "number", "minimum": 0.5}, "#/minimum"),
    ({"type": "integer", "minimum": 10**18}, "#/minimum"),
    ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "#"),
    ({"minimum": 10**2000}, "#"),
    ({"type": "object", "minProperties": 1}, "#/minProperties"),
    ({"type": "object", "maxProperties": 3}, "#/maxProperties"),
    ({"properties": {"a": True}, "required": ["b"], "additionalProperties": False}, "#"),
    ({"properties": {str(n): True for n in range(1001)}}, "#/properties"),
    ({"$ref": "other.json"}, "#/$ref"),
    ({"$ref": "http://example.com/#/a"}, "#/$ref"),
    ({"$ref": "#anchor"}, "#/$ref"),
    ({"$ref": "#/$defs/a"}, "#/$ref"),
    ({"$ref": "#/title", "title": "t"}, "#/$ref"),
    ({"$ref": "#/$defs/a/b", "$defs": {"a": {"$id": "x", "b": True}}}, "#/$ref"),
    ({"$ref": "#"}, "#"),
    ({"not": {"$ref": "#"}, "type": "null"}, "#"),
    ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "#"),
    ({"items": {"allOf": [{"$ref": "#/items"}]}}, "#/items"),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#"),
    (
        {
            "$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "minItems": 1}},
            "properties": {"a": {"$ref": "#/$defs/n"}},
        },
        "#/properties/a",
    ),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf"),
    ({"oneOf": [True, True]}, "#/oneOf"),
    ({"oneOf": [{"properties": CAT}, {"properties": DOG}]}, "#/oneOf"),
    ({"oneOf": [{"minLength": 2}, {"maxLength": 2}]}, "#/oneOf"),
    ({"type": "string", "not": {"maxLength": 2}}, "#/not"),
    ({"not": True}, "#/not"),
    ({"format": "email"}, "#/format"),
    ({"type": "string", "format": "date", "minLength": 11}, "#/minLength"),
    ({"type": "string", "format": "date", "pattern": "^2"}, "#/pattern"),
    ({"pattern": "^a*$", "maxLength": 5}, "#/maxLength"),
    ({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}]}, "#/allOf/1/pattern"),
    ({"pattern": 1}, "#/pattern"),
    *[
        ({"type": "string", "pattern": pattern}, "#/pattern")
        for pattern in (
            "(?=a)",
            "(?!a)",
            "(?i)a",
            "(?P<n>a)",
            r"(a)\1",
            r"\ba",
            r"\p{L}",
            "a**",
            "a++",
            "*",
            "(a",
            "a)",
            "[",
            "[]",
            "[b-a]",
            "[\\d-z]",
            "[[:alpha:]]",
            "(a*)*",
            "(a?){2}",
            "(^a)",
            "a$b",
            "a^",
            "a{2,1}",
            "a{,2}",
            "a{",
            "a]",
            "a{99999999}",
            "(a{2000}){2001}",
            r"[^\W]",
            "\x01",
            "\ud800",
            "\\",
            "(" * 60 + "a" + ")" * 60,
        )
    ],
    ({"allOf": [{"anyOf": [{"minLength": n}, {"maxLength": n}]} for n in range(30)]}, "#/allOf"),
    ({"properties": {f"{n}": {"maxLength": 1900 + n} for n in range(50)}}, "#"),
    ({"examples": [0] * 20_001}, "#"),
]


@pytest.mark.parametrize(("schema", "pointer"), REFUSED, ids=lambda value: repr(value)[:60])
def test_what_cannot_be_enforced_is_refused_with_its_place_in_the_schema(schema: Any, pointer: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        schema_to_gbnf(schema)
    assert str(refusal.value).startswith(f"{pointer}: ")
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_status is ExitStatus.USAGE


def test_a_schema_of_any_depth_is_refused_without_exhausting_the_stack() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(SchemaError, match="nests deeper than 100"):
        schema_to_gbnf(schema)
    while schema:  # taken apart from the outside: freeing it nested would recurse
        schema = schema.pop("items", {})


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "not": {"maxLength": 2}}, "what it excludes could be written all the same"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "a value could also match #/oneOf/1; use anyOf",
        ),
        ({"enum": []}, "a list with items is expected, not an empty one."),
    ],
)
def test_a_refusal_says_what_is_wrong(schema: Any, says: str) -> None:
    with pytest.raises(SchemaError) as refused:
        schema_to_gbnf(schema)
    assert says in str(refused.value)


def test_a_refusal_is_one_line_of_printable_characters() -> None:
    with pytest.raises(SchemaError) as refusal:
        schema_to_gbnf({"properties": {"a\n\x1b[2J\ud800": {"multipleOf": 2}}})
    assert str(refusal.value).startswith("#/properties/a\\n\\x1b[2J\\ud800/multipleOf: ")


def test_a_chain_of_references_is_refused_past_a_hundred() -> None:
    links = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(3000)}
    with pytest.raises(SchemaError, match="references in a row"):
        schema_to_gbnf({"$ref": "#/$defs/a0", "$defs": {**links, "a3000": True}})


REJECTED: list[tuple[Schema, list[str]]] = [
    (
        True,
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
            "[ ]",
            "--1",
        ],
    ),
    ({"type": "string"}, ['"\\ud800"', '"\\ud83dx"', '"\\udc00"', '"\\u12"', '"a', '"\t"', '"\x7f"']),
    ({"type": "integer"}, ["1.0", "1e3", "1234567890123456789", "-0"]),
    ({"type": "string", "maxLength": 2}, ['"abc"', '"\\u0061\\u0062\\u0063"']),
    (obj(a=True), ["{}", '{"a":1,"a":2}', '{"a":1,"b":2}', '{"\\u0061":1}', '{"a" :1}', '{"a":  1}']),
    (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": {"const": 1}},
        ['{"a":1}', '{"\\u0061":1}'],
    ),
    ({"type": "string", "maxLength": 2100}, [json.dumps("x" * 2101), json.dumps("x" * 4200)]),
    ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2001}, ["[1]", str([1] * 2002)]),
    ({"minLength": 1, "maxLength": 9, "allOf": [{"minLength": 2, "maxLength": 3}]}, ['"a"', '"abcd"']),
    ({"pattern": r"^[^\d]$"}, ['"3"', '"٣"']),
    ({"const": "a"}, ['"b"', '"aa"', '"\\u0061"', "a"]),
    ({"type": "array"}, ["[1,  2]", "[1,\n\n2]", "[\n" + " " * 17 + "1]"]),
    ({"type": "string", "format": "date"}, ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"', '"2024-13-01"']),
]


@pytest.mark.parametrize(("schema", "texts"), REJECTED, ids=lambda value: repr(value)[:40])
def test_texts_outside_the_language_are_rejected(vocab: Any, schema: Schema, texts: list[str]) -> None:
    with Walker(vocab, schema_to_gbnf(schema)) as walker:
        assert [text for text in texts if walker.accepts(text)] == []


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (-1, 1), (7, 42), (-130, -8), (95, 105), (-11, 120), (100, 199), (None, 9), (28, None)],
)
def test_integer_ranges_hold_their_integers_and_no_others(
    vocab: Any, low: int | None, high: int | None
) -> None:
    bounds = {"minimum": low, "maximum": high}
    schema = {"type": "integer", **{keyword: bound for keyword, bound in bounds.items() if bound is not None}}
    with Walker(vocab, schema_to_gbnf(schema)) as walker:
        for number in range(-210, 210):
            inside = (low is None or low <= number) and (high is None or number <= high)
            assert walker.accepts(str(number)) is inside, number


@given(st.integers(-(10**17), 10**17), st.integers(0, 10**17), st.integers(-5, 5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wide_integer_ranges_end_exactly_at_their_bounds(vocab: Any, low: int, width: int, step: int) -> None:
    high = low + width
    with Walker(vocab, schema_to_gbnf({"type": "integer", "minimum": low, "maximum": high})) as walker:
        for number in (low + step, high + step, (low + high) // 2):
            assert walker.accepts(str(number)) is (low <= number <= high)


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
def test_a_pattern_is_found_in_whatever_is_written(vocab: Any, pattern: str) -> None:
    with Walker(vocab, schema_to_gbnf({"type": "string", "pattern": pattern})) as walker:
        for seed in range(12):
            text = walker.write(seed)
            assert re.search(pattern, json.loads(text)), text


def test_a_schema_made_of_annotations_only_allows_what_no_schema_allows() -> None:
    annotated = {
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [],
        "deprecated": True,
        "$id": "urn:x",
    }
    assert schema_to_gbnf(annotated) == schema_to_gbnf(True) == schema_to_gbnf({})


def test_the_grammar_depends_on_the_schema_alone() -> None:
    schema = SCHEMAS["further members"][0]
    assert schema_to_gbnf(schema) == schema_to_gbnf(json.loads(json.dumps(schema)))


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
    st.just({"$ref": "#/$defs/shared"}),
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    members = st.dictionaries(NAMES, inner, max_size=3)
    return st.one_of(
        st.fixed_dictionaries(
            {},
            optional={"type": st.just("object"), "properties": members, "additionalProperties": inner,
                      "required": st.lists(NAMES, max_size=2, unique=True), "anyOf": several},
        ),
        st.fixed_dictionaries(
            {}, optional={"items": inner, "prefixItems": several, "minItems": COUNTS, "maxItems": COUNTS}
        ),
        *(st.fixed_dictionaries({keyword: several}) for keyword in ("anyOf", "oneOf", "allOf")),
        st.fixed_dictionaries({"not": inner, "type": st.sampled_from(["object", "integer", "string"])}),
        st.fixed_dictionaries({"$ref": st.just("#/$defs/shared"), "allOf": several}),
    )  # fmt: skip


@given(
    st.recursive(LEAVES, nested, max_leaves=8),
    st.recursive(LEAVES.filter(lambda leaf: leaf != {"$ref": "#/$defs/shared"}), nested, max_leaves=4),
    st.integers(0, 1000),
)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_a_random_schema_is_refused_or_obeyed(vocab: Any, body: Schema, shared: Schema, seed: int) -> None:
    schema: Schema = {"allOf": [body], "$defs": {"shared": shared}}
    try:
        schema_to_gbnf(schema)
    except SchemaError:
        return
    check_that_all_it_writes_is_valid(vocab, schema, range(seed, seed + 3))
