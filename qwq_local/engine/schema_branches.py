"""A JSON schema as a choice of facts: references followed, allOf joined, anyOf and oneOf spread out.

Pointers into a Document in, tuples of Facts out: a value satisfies the subschemas exactly when it agrees
with one of those Facts (their `excludes` included). Also decides, on the safe side, that nothing can
agree with some Facts. Bounded in work, so that no schema takes for ever.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.engine.schema_document import Document
from qwq_local.engine.schema_facts import NEVER, Conjunction, Facts
from qwq_local.engine.schema_keywords import Keywords, read_facts
from qwq_local.errors import SchemaError

MAX_BRANCHES = 256
MAX_WORK = 500_000
MAX_REFERENCES = 100
_PROOF_DEPTH = 20

Alternatives = tuple[Facts, ...]


class Branches:
    """The alternatives of each subschema of one document, worked out once."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._known: dict[str, Alternatives] = {}
        self._open: set[str] = set()
        self._impossible: dict[Conjunction, bool] = {}
        self._work = 0

    def of(self, conjunction: Conjunction) -> Alternatives:
        """What a value that satisfies all these subschemas can be; empty when there is no such value.

        Raises SchemaError for keywords that cannot be enforced, circular references and too much of it all.
        """
        if len(conjunction) == 1:
            return self._at(conjunction[0])
        alternatives: Alternatives = (Facts(),)
        for pointer in conjunction:
            alternatives = self._product(alternatives, self._at(pointer), pointer)
        return alternatives

    def impossible(self, conjunction: Conjunction, depth: int = 0) -> bool:
        """True when provably nothing satisfies these subschemas together.

        Not proven, and so False, is what lies too deep, or leads back to a question still open.
        """
        if conjunction not in self._impossible:
            if depth > _PROOF_DEPTH:
                return False
            self._impossible[conjunction] = False
            self._impossible[conjunction] = all(self.is_empty(facts, depth) for facts in self.of(conjunction))
        return self._impossible[conjunction]

    def is_empty(self, facts: Facts, depth: int = 0) -> bool:
        """True when provably no value agrees with `facts`; `excludes` is left out of account."""
        if facts.values is not None:
            return not facts.possible_values()
        return all(self._type_is_empty(name, facts, depth) for name in facts.types)

    def join(self, one: Facts, other: Facts, path: str) -> Facts:
        """`one & other`, counted: `path` is to blame when it becomes too much."""
        self._work += 1 + len(one.members.properties) + len(other.members.properties)
        self._work += len(one.values or ()) * len(other.values or ())
        self._work += len(one.excludes) + len(other.excludes)
        if self._work > MAX_WORK:
            raise SchemaError(f"{path}: the combinations of allOf, anyOf, oneOf and $ref are too many.")
        return one & other

    def _at(self, pointer: str) -> Alternatives:
        if (pointer,) == NEVER:
            return ()
        if pointer in self._open:
            raise SchemaError(f"{pointer}: this schema refers to itself with nothing in between.")
        if len(self._open) >= MAX_REFERENCES:
            raise SchemaError(f"{pointer}: more than {MAX_REFERENCES} references in a row lead here.")
        if pointer not in self._known:
            self._open.add(pointer)
            self._known[pointer] = self._work_out(pointer)
            self._open.remove(pointer)
        return self._known[pointer]

    def _work_out(self, pointer: str) -> Alternatives:
        schema = self._document.at(pointer)
        if isinstance(schema, bool):
            return (Facts(),) if schema else ()
        keywords = Keywords(schema, pointer)
        alternatives: Alternatives = (read_facts(keywords),)
        for keyword, part in self._parts(keywords):
            alternatives = self._product(alternatives, part, keywords.path(keyword))
        return alternatives

    def _parts(self, keywords: Keywords) -> Iterator[tuple[str, Alternatives]]:
        """The alternatives of each keyword that brings in other subschemas; all of them apply."""
        reference = keywords.text("$ref")
        if reference is not None:
            yield "$ref", self._at(self._document.resolve(reference, keywords.path("$ref")))
        for child in keywords.children("allOf"):
            yield "allOf", self._at(child)
        if "anyOf" in keywords:
            yield "anyOf", tuple(facts for child in keywords.children("anyOf") for facts in self._at(child))
        if "oneOf" in keywords:
            yield "oneOf", self._one_of(keywords)
        denied = keywords.child("not")
        if denied is not None:
            self._at(denied)  # refuses a schema that would deny itself
            yield "not", (Facts(excludes=((keywords.path("not"), denied),)),)

    def _one_of(self, keywords: Keywords) -> Alternatives:
        """Each branch, under the condition that no other one holds."""
        children, path = keywords.children("oneOf"), keywords.path("oneOf")
        alternatives: list[Facts] = []
        for child in children:
            alone = Facts(excludes=tuple((path, other) for other in children if other != child))
            alternatives += [self.join(alone, facts, path) for facts in self._at(child)]
        return tuple(alternatives)

    def _product(self, some: Alternatives, others: Alternatives, path: str) -> Alternatives:
        if len(some) * len(others) > MAX_BRANCHES:
            raise SchemaError(f"{path}: this makes more than {MAX_BRANCHES} alternatives. Use fewer.")
        joined = (self.join(one, other, path) for one in some for other in others)
        return tuple(
            facts for facts in joined if facts.types and (facts.values is None or facts.possible_values())
        )

    def _type_is_empty(self, name: str, facts: Facts, depth: int) -> bool:
        if name == "string":
            return facts.text.high is not None and facts.text.low > facts.text.high
        if name == "integer":
            bounds = [bound.value for bound in (facts.number.lower, facts.number.upper) if bound]
            low, high = facts.number.integers(limit=1 + int(max(map(abs, bounds), default=0)))
            return low > high
        if name == "fraction":
            return facts.number.fractions_are_impossible()
        if name == "object":
            return self._no_object(facts, depth)
        return name == "array" and self._no_array(facts, depth)

    def _no_object(self, facts: Facts, depth: int) -> bool:
        members = facts.members
        if members.high is not None and max(members.low, len(members.required)) > members.high:
            return True
        return any(self.impossible(members.member(name), depth + 1) for name in members.required)

    def _no_array(self, facts: Facts, depth: int) -> bool:
        elements = facts.elements
        if elements.high is not None and elements.low > elements.high:
            return True
        considered = min(elements.low, len(elements.prefix) + 1)
        return any(self.impossible(elements.element(index), depth + 1) for index in range(considered))
