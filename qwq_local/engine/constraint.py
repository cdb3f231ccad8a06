"""Answers that obey a JSON schema, a regular expression or a Lark grammar: the door to llguidance.

A constraint says before each token which tokens of the vocabulary may come next, exactly. All others are
left out before the sampler chain sees the logits, so the chain chooses among what is allowed.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from qwq_local.engine.api import AnswerConstraint, JsonSchema, LarkGrammar, Regex
from qwq_local.engine.library import library
from qwq_local.engine.schema import Subschema, checked_schema, fault_of, overlapping_one_of
from qwq_local.engine.vocabulary import LlamaVocabulary, TokenPieces
from qwq_local.errors import ConstraintError, EngineError

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer

    from qwq_local.engine.sampler import SamplerChain

MAX_TEXT = 1 << 16
COMPILE_S = 10.0
_STACK_BYTES = 256 << 20  # llguidance recurses, and a stack that overflows ends the process
_CANDIDATE = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # llama_token_data
# Between tokens of JSON: one space, or a line break and an indent. Without a limit a model can fill its
# budget with white space.
_JSON_SPACE = r" |\n {0,32}"
# A name with \u escapes could pass for another one that the schema does not list; so they are allowed only
# where the schema itself has characters that cannot be written otherwise.
_PLAIN_ESCAPES = 'nrbtf\\"'
_NEEDS_UNICODE_ESCAPES = re.compile(r"\\u00|\x7f|\\\\[xuv]")
# llguidance would narrow fixed text to its usual tokens; any spelling by tokens is allowed here.
_EXACT = '%llguidance {"no_forcing": true}\n'
_T = TypeVar("_T")
_tokenizers: weakref.WeakKeyDictionary[LlamaVocabulary, LLTokenizer] = weakref.WeakKeyDictionary()


class ConstraintMatcher:
    """Which tokens may come next in one reply; it moves on with each token that is accepted."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        import numpy as np

        self._matcher = matcher
        self._n_vocab = n_vocab
        self._candidates = np.empty(n_vocab, _CANDIDATE)

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete: only an end token may come."""
        return self._matcher.is_stopped()

    def allowed(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        """The ids of all tokens that may come next, ascending; those that end the answer where it may end.

        Raises EngineError when no token may, and when the constraint becomes too complex to follow.
        """
        import numpy as np

        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids = np.flatnonzero(np.unpackbits(mask, bitorder="little", count=self._n_vocab).view(np.bool_))
        if self._matcher.is_error() or not len(ids):
            why = _reason(self._matcher.get_error()) or "no token of the vocabulary continues it"
            raise EngineError(f"the answer cannot go on under its constraint: {why}.")
        return ids

    def candidates(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The allowed tokens with their logits, as llama.cpp's samplers take them; valid until the next call.

        `logits` has one value for each token of the vocabulary.
        """
        ids = self.allowed()
        candidates = self._candidates[: len(ids)]
        candidates["id"] = ids
        candidates["logit"] = logits[ids]
        candidates["p"] = 0
        return candidates

    def accept(self, token: int) -> None:
        """Move on by a token. Raises EngineError for one that is not allowed."""
        if not self._matcher.consume_token(token):
            raise EngineError(f"token {token} is not allowed under the answer's constraint.")

    def rollback(self, n_tokens: int) -> None:
        """Undo the last `n_tokens` accepts."""
        if n_tokens and not self._matcher.rollback(n_tokens):
            raise EngineError(f"{n_tokens} tokens cannot be undone.")

    def reset(self) -> None:
        """Be at the beginning of an answer."""
        self._matcher.reset()


@dataclass(frozen=True, slots=True)
class Constraint:
    """A compiled constraint; every reply under it has a matcher of its own."""

    source: AnswerConstraint
    start: LLMatcher
    n_vocab: int

    def matcher(self) -> ConstraintMatcher:
        """A matcher at the beginning of an answer."""
        return ConstraintMatcher(self.start.deep_copy(), self.n_vocab)


def compile_constraint(source: AnswerConstraint, vocabulary: LlamaVocabulary) -> Constraint:
    """A constraint over a vocabulary.

    Raises ConstraintError, for a schema led by the JSON pointer of the keyword, for what is too large, takes
    too long to compile, cannot be enforced, or allows nothing.
    """
    tokenizer = _tokenizer(vocabulary)

    def compiled() -> Constraint:
        return Constraint(source, _start(source, tokenizer), vocabulary.size)

    return _in_time(compiled)


def check_constraint(source: AnswerConstraint, limit_s: float = COMPILE_S) -> None:
    """Raise the ConstraintError of `compile_constraint` without a model.

    Which special tokens a grammar may name is not known here: such a grammar passes.
    """
    try:
        _in_time(lambda: _start(source, _byte_tokenizer()), limit_s)
    except ConstraintError as error:
        if "special token" not in str(error):
            raise


def sample_under(
    matcher: ConstraintMatcher, chain: SamplerChain, context: Any, n_vocab: int, row: int = -1
) -> int:
    """The next token that the chain chooses among the allowed ones; both have accepted it.

    `context` is llama.cpp's handle, `row` as llama_get_logits_ith takes it. The logits stay as they are.
    """
    import numpy as np

    lib = library()
    logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), shape=(n_vocab,))
    candidates = matcher.candidates(logits)
    data = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
    array = lib.llama_token_data_array(data, len(candidates), -1, False)
    lib.llama_sampler_apply(chain.handle, ctypes.byref(array))
    token = int(array.data[array.selected].id)
    lib.llama_sampler_accept(chain.handle, token)
    matcher.accept(token)
    return token


def _start(source: AnswerConstraint, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an answer. Raises ConstraintError."""
    matcher = _matcher(_EXACT + _lark(source), tokenizer)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if error := matcher.get_error():
        raise ConstraintError(f"{_line_of(error, source)}{_reason(error)}.")
    return matcher


def _lark(source: AnswerConstraint) -> str:
    """What llguidance compiles. Raises ConstraintError for a schema that it refuses, and for long texts."""
    from llguidance import LLMatcher

    match source:
        case JsonSchema(schema):
            return f"start: %json {json.dumps(_json_options(_compilable(schema)))}"
        case Regex(pattern):
            _check_length(pattern, "the regular expression")
            lark: str = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
            return lark
        case LarkGrammar(text):
            _check_length(text, "the grammar")
            return text


def _compilable(schema: Mapping[str, object]) -> Subschema:
    """The checked schema. Raises ConstraintError with a pointer for what llguidance refuses."""
    try:
        checked = checked_schema(schema)
        if error := _of_schema(checked).get_error():
            pointer = fault_of(checked, schema, lambda part: _of_schema(part).is_error())
            raise ConstraintError(f"{pointer}: {_reason(error)}.")
        overlapping = overlapping_one_of(checked, _knows_one_of)
        if overlapping is not None:
            raise ConstraintError(f"{overlapping}: a value could match two of its branches. Use anyOf.")
    except ConstraintError as error:
        raise ConstraintError(_printable(str(error))) from None
    return checked


def _of_schema(schema: Subschema) -> LLMatcher:
    from llguidance import LLMatcher

    return _matcher(LLMatcher.grammar_from_json_schema(_json_options(schema)), _byte_tokenizer())


def _knows_one_of(schema: Subschema) -> bool:
    """Whether llguidance knows that `anyOf` means the same where the schema has `oneOf`."""
    return not any("oneOf" in warning for warning in _of_schema(schema).get_grammar_warnings())


def _json_options(schema: Subschema) -> Subschema:
    """The schema with options for llguidance's compiler."""
    options: dict[str, object] = {"whitespace_pattern": _JSON_SPACE, "coerce_one_of": True}
    if not _NEEDS_UNICODE_ESCAPES.search(json.dumps(schema, ensure_ascii=False)):
        options["json_allowed_escapes"] = _PLAIN_ESCAPES
    return {**schema, "x-guidance": options}


def _matcher(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A compiled grammar, or what is wrong with it. Other threads run meanwhile."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_items_in_row=20_000, step_max_items=400_000, verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


@cache
def _byte_tokenizer() -> LLTokenizer:
    """A vocabulary of the bytes and an end, for what does not depend on the vocabulary."""
    from llguidance import LLTokenizer, TokenizerWrapper

    pieces = [bytes([byte]) for byte in range(256)]
    source = _TokenSource(TokenPieces([*pieces, b"<end>"], [256], [256]), lambda text: list(text.encode()))
    return LLTokenizer(TokenizerWrapper(source), n_vocab=257, eos_token=256)


def _tokenizer(vocabulary: LlamaVocabulary) -> LLTokenizer:
    """llguidance's form of a vocabulary, made once for each."""
    tokenizer = _tokenizers.get(vocabulary)
    if tokenizer is None:
        from llguidance import LLTokenizer, TokenizerWrapper

        table = vocabulary.table()
        if not table.ends:
            raise EngineError("the model's vocabulary has no token that ends an answer.")
        # The tokenizer must not keep its own key in `_tokenizers` alive.
        encode = weakref.WeakMethod(vocabulary.encode_text)
        source = _TokenSource(table, lambda text: known(text) if (known := encode()) else [])
        tokenizer = LLTokenizer(TokenizerWrapper(source), n_vocab=vocabulary.size, eos_token=table.ends)
        _tokenizers[vocabulary] = tokenizer
    return tokenizer


class _TokenSource:
    """A vocabulary with the names that llguidance reads."""

    def __init__(self, table: TokenPieces, encode: Callable[[str], list[int]]) -> None:
        self.tokens = table.pieces
        self.special_token_ids = table.special
        self.eos_token_id = table.ends[0]
        self.bos_token_id = None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _in_time(compiled: Callable[[], _T], limit_s: float = COMPILE_S) -> _T:
    """Compile on a thread with a large stack. Raises ConstraintError after `limit_s` seconds."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(compiled())
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(_STACK_BYTES)
    try:
        worker = threading.Thread(target=run, name="compile", daemon=True)
        worker.start()
    finally:
        threading.stack_size(before)
    worker.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise ConstraintError(f"it takes longer than {limit_s:.0f} s to compile. Make it simpler.")
    return results[0]


def _check_length(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise ConstraintError(f"{what} has {len(text):,} characters; at most {MAX_TEXT:,} can be compiled.")


def _line_of(error: str, source: AnswerConstraint) -> str:
    """Where in a schema or a grammar an error is; llguidance begins with `at LINE(COLUMN): `."""
    match source:
        case JsonSchema():
            return "#: "
        case LarkGrammar() if place := re.match(r"(?:at )?(\d+)\(\d+\): ", error):
            return f"line {int(place[1]) - _EXACT.count(chr(10))}: "
    return ""


def _reason(error: str) -> str:
    """llguidance's own words in one line: of a regular expression what its parser says in the end."""
    if "NoExtension" in error:
        return "nothing satisfies it"
    if "Regex is empty" in error:
        return "no text satisfies this and what stands beside it"
    _, _, said = error.removeprefix("Unsatisfiable schema: ").rpartition("\nerror: ")
    lines = said.splitlines() or [""]
    return _printable(re.sub(r"^(?:at )?\d+\(\d+\): ", "", lines[0])).strip().rstrip(".")[:300]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
