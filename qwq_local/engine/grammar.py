"""Sampling under a grammar, at nearly the speed of sampling without one.

A grammar over 152k tokens costs some 20 ms, so it is tried on the token that the chain chose first. Only
when that is refused are the likeliest tokens filtered, and only when none of those may come the whole
vocabulary. The best permitted token is always among the candidates. A token that the grammar forbids must
never be accepted: llama.cpp ends the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.sampler import SamplerChain
from qwq_local.errors import EngineError, SchemaError

if TYPE_CHECKING:
    import numpy as np

_MINUS_INFINITY = float("-inf")
_CANDIDATE = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # llama_token_data
_LIKELIEST = 256


class LlamaGrammar:
    """A compiled grammar and its state: what it saw so far. Free it with `close`."""

    def __init__(self, gbnf: str, vocab: Any) -> None:
        """Raises SchemaError when llama.cpp does not parse the grammar."""
        self._lib = library()
        self.handle = self._lib.llama_sampler_init_grammar(vocab, gbnf.encode(), b"root")
        if not self.handle:
            raise SchemaError("the schema makes a grammar that llama.cpp cannot parse; simplify it.")
        self._one = (self._lib.llama_token_data * 1)()

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        self._one[0] = (token, 0.0, 0.0)
        array = self._lib.llama_token_data_array(self._one, 1, -1, False)
        self._lib.llama_sampler_apply(self.handle, ctypes.byref(array))
        return bool(self._one[0].logit != _MINUS_INFINITY)

    def allowed_among(self, candidates: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The candidates that may come next, as a new array."""
        kept = candidates.copy()
        array = _token_array(self._lib, kept)
        self._lib.llama_sampler_apply(self.handle, ctypes.byref(array))
        allowed: np.ndarray[Any, Any] = kept[kept["logit"] != _MINUS_INFINITY]
        return allowed

    def accept(self, token: int) -> None:
        """Move on by a token that is allowed."""
        self._lib.llama_sampler_accept(self.handle, token)

    def reset(self) -> None:
        """Forget what it saw."""
        self._lib.llama_sampler_reset(self.handle)

    def close(self) -> None:
        """Free the grammar; closing twice is harmless."""
        if self.handle is not None:
            self._lib.llama_sampler_free(self.handle)
            self.handle = None


def compile_grammar(model: LoadedModel, schema: Mapping[str, object]) -> LlamaGrammar:
    """A grammar for values of a JSON schema. Raises SchemaError with the path of what cannot be."""
    from qwq_local.engine.schema import schema_to_gbnf

    return LlamaGrammar(schema_to_gbnf(schema), library().llama_model_get_vocab(model.handle))


def sample_under(grammar: LlamaGrammar, chain: SamplerChain, context: Any, n_vocab: int) -> int:
    """The next token by the chain that the grammar allows; both have accepted it.

    `context` is llama.cpp's handle, whose last logits are sampled.
    """
    lib = library()
    if not chain.remembers:
        # This accepts the token into the chain, which matters only to penalties and DRY.
        token: int = lib.llama_sampler_sample(chain.handle, context, -1)
        if grammar.allows(token):
            grammar.accept(token)
            return token
        token = _choose(lib, chain, _permitted(grammar, _candidates(lib, context, n_vocab)))
    else:
        candidates = _candidates(lib, context, n_vocab)
        token = _choose(lib, chain, candidates.copy())
        if not grammar.allows(token):
            token = _choose(lib, chain, _permitted(grammar, candidates))
    lib.llama_sampler_accept(chain.handle, token)
    grammar.accept(token)
    return token


def _candidates(lib: Any, context: Any, n_vocab: int) -> np.ndarray[Any, Any]:
    """Every token with its logit, as llama.cpp's samplers take them."""
    import numpy as np

    candidates = np.empty(n_vocab, _CANDIDATE)
    candidates["id"] = np.arange(n_vocab, dtype=np.int32)
    candidates["logit"] = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(n_vocab,))
    candidates["p"] = 0
    return candidates


def _permitted(grammar: LlamaGrammar, everything: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    if len(everything) > _LIKELIEST:
        best = np.argpartition(everything["logit"], -_LIKELIEST)[-_LIKELIEST:]
        permitted = grammar.allowed_among(everything[best])
        if len(permitted):
            return permitted
    permitted = grammar.allowed_among(everything)
    if not len(permitted):
        raise EngineError("no token of the vocabulary continues the answer under the schema.")
    return permitted


def _choose(lib: Any, chain: SamplerChain, candidates: np.ndarray[Any, Any]) -> int:
    array = _token_array(lib, candidates)
    lib.llama_sampler_apply(chain.handle, ctypes.byref(array))
    return int(array.data[array.selected].id)


def _token_array(lib: Any, candidates: np.ndarray[Any, Any]) -> Any:
    data = candidates.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
    return lib.llama_token_data_array(data, len(candidates), -1, False)
