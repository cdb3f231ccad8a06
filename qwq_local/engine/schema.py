"""A JSON schema in, a grammar for llama.cpp (GBNF) out: the answer that obeys it obeys the schema.

Every text that the grammar accepts is JSON that is valid under the schema (JSON Schema 2020-12); what
cannot be enforced exactly is refused with the JSON pointer of the keyword. The other way round the grammar
offers less than the schema allows:

- members stand in the schema's order; members that the schema does not name need `additionalProperties`
  (an object schema without `properties` and `required` has any), elements past `prefixItems` need `items`;
- a schema without `type` is about the types that its keywords are about: `minimum` means a number;
- white space is one optional space, or a line break and up to 16 spaces, after commas and brackets;
- integers have at most 18 digits, numbers 17 decimals and an exponent of two digits, numbers with bounds
  15 significant digits and no exponent; any JSON value nests at most 8 deep;
- strings hold no control characters; `pattern`, `format`, `enum` and `const` have one spelling.

Enforced beyond the plain keywords: local $ref (recursive too), allOf, anyOf, oneOf and not where the
branches provably exclude each other, pattern (see schema_pattern), format date, time, date-time and uuid.
Annotations are ignored. Knows no llama.cpp: only strings are made here.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from qwq_local.engine.gbnf import integer_between, literal, number_between
from qwq_local.engine.json_rules import INTEGER_DIGITS, JsonRules
from qwq_local.engine.schema_branches import Branches
from qwq_local.engine.schema_document import Document
from qwq_local.engine.schema_facts import ALL_TYPES, Conjunction, Facts, NumberFacts, type_of
from qwq_local.engine.schema_pattern import FORMATS, pattern_piece
from qwq_local.errors import SchemaError

MAX_CHOICES = 1_000  # llama.cpp follows all of them at once, in time that grows with their square


def schema_to_gbnf(schema: Mapping[str, object] | bool) -> str:
    """A GBNF grammar with the start rule `root` whose every text is valid under `schema`.

    Raises SchemaError, its message led by the JSON pointer of the keyword, for what is no schema, what
    cannot be enforced, what nothing can satisfy, and what makes too large a grammar.
    """
    try:
        return _Compiler(Document(schema)).grammar()
    except SchemaError as error:
        raise SchemaError(_printable(str(error))) from error


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to write a value, and the rules of the values that it cannot do without."""

    text: str
    needs: frozenset[str] = frozenset()


class _Compiler:
    """Makes one rule for each set of subschemas that applies to some value, until none is left."""

    def __init__(self, document: Document) -> None:
        self._branches = Branches(document)
        self._rules = JsonRules()
        self._names: dict[Conjunction, str] = {}
        self._pending: deque[Conjunction] = deque()
        self._forms: dict[Conjunction, list[_Form]] = {}

    def grammar(self) -> str:
        """The text of the whole grammar."""
        self._names[("#",)] = self._rules.reserve("root")
        self._pending.append(("#",))
        while self._pending:
            conjunction = self._pending.popleft()
            forms = self._forms[conjunction] = self._forms_of(conjunction)
            texts = dict.fromkeys(form.text for form in forms)
            self._rules.define(self._names[conjunction], " | ".join(texts))
        self._check_that_all_end()
        return self._rules.text()

    def _value(self, conjunction: Conjunction) -> str:
        """The name of the rule for values that satisfy all these subschemas; its body may come later."""
        if not conjunction:
            return self._rules.any_value()
        if conjunction not in self._names:
            self._names[conjunction] = self._rules.reserve()
            self._pending.append(conjunction)
        return self._names[conjunction]

    def _check_that_all_end(self) -> None:
        """Refuse a schema in which some value would have to hold another one for ever."""
        waiting = {self._names[key]: (key, forms) for key, forms in self._forms.items()}
        found = True
        while found:
            found = False
            for name, (_, forms) in reversed(list(waiting.items())):
                if any(form.needs.isdisjoint(waiting) for form in forms):
                    del waiting[name]
                    found = True
        for conjunction, _ in waiting.values():
            raise SchemaError(f"{conjunction[0]}: every value of this schema would be endless.")

    def _forms_of(self, conjunction: Conjunction) -> list[_Form]:
        forms: list[_Form] = []
        for facts in self._branches.of(conjunction):
            narrowed = facts.narrowed()
            if not self._branches.is_empty(narrowed):
                self._check_excluded(narrowed)
                forms += self._forms_of_facts(narrowed)
        if not forms:
            raise SchemaError(f"{conjunction[0]}: no value satisfies this schema.")
        _check_choices(len(forms), conjunction[0])
        return forms

    def _check_excluded(self, facts: Facts) -> None:
        alone = replace(facts, excludes=())
        for path, pointer in facts.excludes:
            for other in self._branches.of((pointer,)):
                if not self._branches.is_empty(self._branches.join(alone, replace(other, excludes=()), path)):
                    raise SchemaError(_not_enforced(path, str(pointer)))

    def _forms_of_facts(self, facts: Facts) -> Iterator[_Form]:
        if facts.values is not None:
            _check_choices(len(facts.values), facts.paths.get("enum", "#"))
            for value in facts.possible_values():
                yield from self._fixed(value, facts)
            return
        if facts.types == ALL_TYPES and not facts.detailed_types():
            yield _Form(self._rules.any_value())
            return
        if self._may_be(facts, "object"):
            yield from self._objects(facts)
        if self._may_be(facts, "array"):
            yield from self._arrays(facts)
        if self._may_be(facts, "string"):
            yield _Form(self._text(facts))
        if self._may_be(facts, "integer", "fraction"):
            yield _Form(self._number(facts))
        if "boolean" in facts.types:
            yield _Form('"true" | "false"')
        if "null" in facts.types:
            yield _Form('"null"')

    def _may_be(self, facts: Facts, *types: str) -> bool:
        return not self._branches.is_empty(replace(facts, types=facts.types & set(types)))

    def _fixed(self, value: object, facts: Facts) -> Iterator[_Form]:
        """The spellings of one value of `enum` or `const`: with and without a space after , and :."""
        path = facts.paths.get("enum") or facts.paths["const"]
        if type_of(value) in facts.detailed_types():
            raise SchemaError(f"{path}: beside it only `type` can be enforced; leave the other keywords out.")
        for separators in ((", ", ": "), (",", ":")):
            try:
                yield _Form(literal(_json_text(value, separators)))
            except ValueError as error:
                raise SchemaError(f"{path}: not a number, or infinite, is no JSON value.") from error

    def _objects(self, facts: Facts) -> Iterator[_Form]:
        """The members in order, each with its comma, optional ones skipped, further ones at the end."""
        rules, members = self._rules, facts.members
        names = dict.fromkeys([*members.properties, *members.required])
        possible = [name for name in names if not self._branches.impossible(members.member(name))]
        if not set(members.required) <= set(possible):
            return
        further = members.additional or ()
        extra = None
        if not self._branches.impossible(further):
            extra = rules.add(f"{rules.other_name(names)} {rules.colon} {self._value(further)}")
        self._check_member_count(facts, len(possible), extra is not None)
        if not members.required:
            yield _Form('"{}"')
        heads = self._heads(facts, possible, extra)
        _check_choices(len(heads), facts.paths.get("properties", "#"))
        if heads:
            needs = frozenset(self._value(members.member(name)) for name in members.required)
            yield _Form(f'"{{" {rules.edge} {rules.add(" | ".join(heads))} {rules.edge} "}}"', needs)

    def _heads(self, facts: Facts, names: list[str], extra: str | None) -> list[str]:
        """The insides of an object that has members: one for each member that can come first."""
        rules, members = self._rules, facts.members
        texts = [f"{literal(_json_text(n))} {rules.colon} {self._value(members.member(n))}" for n in names]
        tail = rules.repeated(extra) if extra else ""
        heads = [f"{extra} {tail}"] if extra else []
        for name, text in zip(reversed(names), reversed(texts), strict=True):
            if name in members.required:
                heads = [f"{text} {tail}"]
                tail = rules.add(f"{rules.comma} {text} {tail}")
            else:
                heads.insert(0, f"{text} {tail}")
                tail = rules.add(f"({rules.comma} {text})? {tail}")
        return heads

    def _check_member_count(self, facts: Facts, named: int, is_open: bool) -> None:
        """Refuse minProperties and maxProperties unless what else is said implies them."""
        members = facts.members
        if members.low > len(members.required):
            raise SchemaError(
                f"{facts.paths['minProperties']}: cannot be enforced beyond the required members; "
                "leave it out or require more."
            )
        if members.high is not None and (is_open or named > members.high):
            raise SchemaError(
                f"{facts.paths['maxProperties']}: cannot be enforced where more may stand; leave it out."
            )

    def _arrays(self, facts: Facts) -> Iterator[_Form]:
        """The elements of `prefixItems`, the last ones optional where minItems allows, then `items`."""
        rules, elements = self._rules, facts.elements
        prefix, high = self._possible_elements(facts)
        if high is not None and high < elements.low:
            return
        if elements.low == 0:
            yield _Form('"[]"')
        if high == 0:
            return
        tail = ""
        if high is None or high > len(prefix):
            start = max(1, len(prefix))
            pair = rules.add(f"{rules.comma} {self._value(elements.items or ())}")
            tail = rules.repeat(
                pair,
                max(0, elements.low - start),
                None if high is None else high - start,
                facts.paths.get("minItems", "#"),
                facts.paths.get("maxItems", "#"),
            )
        for index in reversed(range(1, len(prefix))):
            step = f"{rules.comma} {self._value(prefix[index])} {tail}"
            tail = rules.add(step if index < elements.low else f"({step})?")
        needed = range(max(1, min(elements.low, len(prefix) + 1)))
        needs = [self._value(elements.element(index)) for index in needed]
        yield _Form(f'"[" {rules.edge} {needs[0]} {tail} {rules.edge} "]"', frozenset(needs))

    def _possible_elements(self, facts: Facts) -> tuple[tuple[Conjunction, ...], int | None]:
        """The part of `prefixItems` that can be, and the greatest length; None when there is none."""
        elements = facts.elements
        high = elements.high
        for index in range(len(elements.prefix) + 1):
            if self._branches.impossible(elements.element(index)):
                high = index if high is None else min(high, index)
                break
        return elements.prefix[:high], high

    def _text(self, facts: Facts) -> str:
        text, paths, rules = facts.text, facts.paths, self._rules
        pieces = [pattern_piece(each, rules, rules.character, paths["pattern"]) for each in text.patterns]
        pieces += [FORMATS[name] for name in text.formats]
        if not pieces:
            return rules.text_of_length(text.low, text.high, paths)
        piece = pieces[0]
        if len(pieces) > 1:
            path = paths["pattern" if text.patterns else "format"]
            raise SchemaError(f"{path}: only one pattern or format at a time can be enforced.")
        if piece.low < text.low:
            raise SchemaError(f"{paths['minLength']}: not enforced beside a pattern; say it in the pattern.")
        if text.high is not None and (piece.high is None or piece.high > text.high):
            raise SchemaError(f"{paths['maxLength']}: not enforced beside a pattern; say it in the pattern.")
        return rules.add(f'"\\"" {rules.add(piece.text)} "\\""')

    def _number(self, facts: Facts) -> str:
        number = facts.number
        integers = number.integers(limit=10**INTEGER_DIGITS - 1)
        bounds = [bound for bound in (number.lower, number.upper) if bound]
        if "fraction" not in facts.types:
            text = integer_between(*integers)
        elif number == NumberFacts():
            return self._rules.number
        else:
            for bound in bounds:
                if bound.value.denominator != 1:
                    raise SchemaError(f"{bound.path}: only whole bounds can be enforced; use the next one.")
            lower = int(number.lower.value) if number.lower else None
            upper = int(number.upper.value) if number.upper else None
            text = number_between(lower, upper, integers)
        if not text:
            raise SchemaError(f"{bounds[0].path}: only numbers of up to {INTEGER_DIGITS} digits are offered.")
        return self._rules.add(text)


def _not_enforced(path: str, pointer: str) -> str:
    """What to say of a value that matches what it must not: another branch of oneOf, or what is under not."""
    if path == pointer:
        return f"{path}: what it excludes could be written all the same; say instead what is allowed."
    return (
        f"{path}: a value could also match {pointer}; use anyOf, or make the schemas differ "
        "in type or in the const of a required property."
    )


def _printable(message: str) -> str:
    """The message with control characters and lone surrogates written out: names in a schema may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def _check_choices(choices: int, path: str) -> None:
    if choices > MAX_CHOICES:
        raise SchemaError(f"{path}: more than {MAX_CHOICES:,} ways to begin; use fewer values or members.")


def _json_text(value: object, separators: tuple[str, str] = (", ", ": ")) -> str:
    """`value` as JSON, with characters beyond ASCII as they are unless UTF-8 has no form for them."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
    lone_surrogate = any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(value, allow_nan=False, separators=separators) if lone_surrogate else text
