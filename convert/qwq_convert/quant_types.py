"""The quantization type of each tensor in a file type: llama-quantize's rules as tables.

They follow llama.cpp's src/llama-quant.cpp, for models without experts: MIXTURES is
`llama_tensor_get_type_impl`, FALLBACKS is `tensor_type_fallback`, and `_Chooser` has the order in which
options win.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwq_convert.architecture import ModelShape
from qwq_convert.file_types import BLOCKS, FileType
from qwq_convert.file_types import QuantType as Q
from qwq_convert.model_config import OUTPUT, NamedTensor
from qwq_local.errors import ConvertError


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The tensor that a rule looks at: number `i` of the `n` tensors of its kind."""

    i: int
    n: int
    n_gqa: int
    has_imatrix: bool


def more_bits(place: TensorPlace) -> bool:
    """Whether this is one of the first or the last eighth of the layers, or every third one between."""
    eighth = place.n // 8
    return place.i < eighth or place.i >= 7 * place.n // 8 or (place.i - eighth) % 3 == 2


Rule = tuple[Callable[[TensorPlace], bool], Q]
Mixture = dict[str, tuple[Rule, ...]]


def _first(part: int, kind: Q, has_imatrix: bool | None = None) -> Rule:
    """A type for the first `part`-th of the layers, if need be only with or without an importance matrix."""
    return lambda at: at.i < at.n // part and has_imatrix in (None, at.has_imatrix), kind


def _layers_before(n_layers: int, kind: Q) -> Rule:
    return lambda place: place.i < n_layers, kind


def _middle(kind: Q) -> Rule:
    """A type for all layers but the first and the last eighth."""
    return lambda place: place.n // 8 <= place.i < 7 * place.n // 8, kind


def _shared_heads(kind: Q) -> Rule:
    """A type where at least four query heads share a key-value head: attn_v is small beside attn_q."""
    return lambda place: place.n_gqa >= 4, kind


def _without_imatrix(kind: Q) -> Rule:
    return lambda place: not place.has_imatrix, kind


def _always(kind: Q) -> Rule:
    return lambda _: True, kind


_LOW: Mixture = {"attn_v": (_shared_heads(Q.Q4_K), _always(Q.Q2_K)), "ffn_down": (_first(8, Q.Q2_K),)}
_IQ1: Mixture = _LOW | {"attn_output": (_always(Q.IQ2_XXS),)}
_IQ2: Mixture = {
    "attn_v": (_shared_heads(Q.Q4_K), _always(Q.IQ3_S)),
    "ffn_down": (_first(8, Q.IQ3_S),),
    "attn_output": (_always(Q.IQ3_S),),
}
_IQ4: Mixture = {"attn_v": (_shared_heads(Q.Q5_K),), "ffn_down": (_first(8, Q.Q5_K, False),)}
_MORE_BITS: Mixture = {"attn_v": ((more_bits, Q.Q6_K),), "ffn_down": ((more_bits, Q.Q6_K),)}

# Where a file type differs from its default inside the layers: the first rule that holds for a kind of
# tensor.
MIXTURES: dict[str, Mixture] = {
    "Q4_0": {"ffn_down": (_first(8, Q.Q4_1, True),)},
    "Q5_0": {"ffn_down": (_first(8, Q.Q5_1, True),)},
    "Q5_K_M": _MORE_BITS,
    "Q4_K_M": _MORE_BITS,
    "Q4_K_S": {"attn_v": (_layers_before(4, Q.Q5_K),), "ffn_down": (_first(8, Q.Q5_K),)},
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "Q3_K_L": dict.fromkeys(("attn_v", "ffn_down", "attn_output"), (_always(Q.Q5_K),)),
    "Q3_K_M": {
        "attn_v": (_layers_before(2, Q.Q5_K), _always(Q.Q4_K)),
        "ffn_down": (_first(16, Q.Q5_K), _always(Q.Q4_K)),
        "attn_output": (_always(Q.Q4_K),),
    },
    "IQ3_M": {
        "attn_v": (_always(Q.Q4_K),),
        "ffn_down": (_first(8, Q.Q4_K),),
        "attn_output": (_always(Q.Q4_K),),
    },
    "IQ3_S": {"attn_v": (_shared_heads(Q.Q4_K),)},
    "IQ3_XS": {
        "attn_v": (_shared_heads(Q.Q4_K),),
        "attn_k": (_always(Q.IQ3_XXS),),
        "attn_q": (_always(Q.IQ3_XXS),),
        "ffn_gate": (_middle(Q.IQ3_XXS),),
        "ffn_up": (_middle(Q.IQ3_XXS),),
    },
    "IQ3_XXS": {
        "attn_v": (_shared_heads(Q.Q4_K), _without_imatrix(Q.IQ3_S)),
        "attn_k": (_always(Q.IQ2_S),),
        "attn_q": (_always(Q.IQ2_S),),
        "ffn_down": (_first(8, Q.Q4_K, False), _without_imatrix(Q.Q3_K)),
        "attn_output": (_always(Q.IQ3_S),),
    },
    "Q2_K": {
        "attn_v": (_shared_heads(Q.Q4_K), _always(Q.Q3_K)),
        "ffn_down": (_always(Q.Q3_K),),
        "attn_output": (_always(Q.Q3_K),),
    },
    "Q2_K_S": {"attn_v": (_shared_heads(Q.Q4_K),), "ffn_down": (_first(8, Q.Q4_K),)},
    "IQ2_M": _IQ2,
    "IQ2_S": _IQ2,
    "IQ2_XS": _LOW,
    "IQ2_XXS": _LOW,
    "IQ1_M": _IQ1,
    "IQ1_S": _IQ1,
}

# The type for rows that are not whole blocks of the wanted type; F16 when they are not whole blocks of it
# either.
FALLBACKS = {
    **dict.fromkeys((Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S, Q.IQ4_XS), Q.IQ4_NL),
    **dict.fromkeys((Q.Q2_0, Q.Q2_K, Q.Q3_K, Q.TQ1_0, Q.TQ2_0), Q.Q4_0),
    Q.Q4_K: Q.Q5_0,
    Q.Q5_K: Q.Q5_1,
    Q.Q6_K: Q.Q8_0,
}
# The file types that the 70B rule leaves alone.
LOWEST = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
# Types that come out as noise without an importance matrix.
NEED_IMATRIX = (Q.IQ3_XXS, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ1_M, Q.IQ1_S)
TIED = "token_embd.weight"


@dataclass(frozen=True, slots=True)
class TypeOptions:
    """Options that overrule the tables: (pattern, type) pairs for names, the types of output and embedding.

    `pure` gives every tensor the file type's default. `keep_output` leaves output.weight as it is.
    """

    patterns: tuple[tuple[re.Pattern[str], Q], ...] = ()
    output: Q | None = None
    embedding: Q | None = None
    pure: bool = False
    keep_output: bool = False


NO_OPTIONS = TypeOptions()


def choose_types(
    tensors: Sequence[NamedTensor],
    file_type: FileType,
    shape: ModelShape,
    options: TypeOptions,
    has_imatrix: bool,
) -> list[Q]:
    """The type of each tensor; the tensors are in llama-quantize's order. Raises ConvertError."""
    if options.patterns and not file_type.quantizes:
        raise ConvertError(f"--tensor-type says nothing with {file_type.name}. Choose a quantized type.")
    for pattern, kind in options.patterns:
        if not any(pattern.search(tensor.name) for tensor in tensors):
            raise ConvertError(
                f"--tensor-type {pattern.pattern[:60]!r}={kind.name}: no tensor is called so; names are such "
                f"as {tensors[-1].name}. `--dry-run` without it lists them."
            )
    chooser = _Chooser(tensors, file_type, shape, options, has_imatrix)
    return [chooser.choose(tensor) for tensor in tensors]


def needs_imatrix(name: str, kind: Q, file_type: FileType) -> bool:
    """Whether llama-quantize refuses to make this tensor without an importance matrix."""
    if name in (TIED, OUTPUT):
        return False
    return kind in NEED_IMATRIX or (kind == Q.Q2_K and file_type.name == "Q2_K_S")


@dataclass(frozen=True, slots=True)
class _Chooser:
    """Chooses the types of one file. It counts the tensors of each kind that the tables decide."""

    tensors: Sequence[NamedTensor]
    file_type: FileType
    shape: ModelShape
    options: TypeOptions
    has_imatrix: bool
    seen: Counter[str] = field(default_factory=Counter)

    def choose(self, tensor: NamedTensor) -> Q:
        name, options = tensor.name, self.options
        if not is_quantizable(name, tensor.source.shape) or (options.keep_output and name == OUTPUT):
            return tensor.kept
        # As in llama-quantize, these two have no fallback: a type that does not fit is an error.
        if name == TIED and options.embedding is not None:
            return self._checked(tensor, options.embedding)
        if name == OUTPUT and options.output is not None:
            return self._checked(tensor, options.output)
        if not self.file_type.quantizes:
            return self.file_type.default
        kind = next((kind for pattern, kind in options.patterns if pattern.search(name)), None)
        if kind is None:
            kind = self.file_type.default if options.pure else self._by_table(tensor)
        if _fits(tensor, kind):
            return kind
        if kind not in FALLBACKS and BLOCKS[kind][0] > 32:
            return self._checked(tensor, kind)
        fallback = FALLBACKS.get(kind, kind)
        return fallback if _fits(tensor, fallback) else Q.F16

    def _by_table(self, tensor: NamedTensor) -> Q:
        file_type, name = self.file_type, tensor.name
        if name == OUTPUT or (name == TIED and all(other.name != OUTPUT for other in self.tensors)):
            if self.options.output is not None:
                return self.options.output
            return file_type.output if _fits(tensor, file_type.default) else Q.Q8_0
        if name == TIED:
            return file_type.embedding or file_type.default
        kind = name.split(".")[2] if name.count(".") > 2 else name
        # A tensor whose type an option decides is not counted, which shifts the layers after it.
        n_gqa = self.shape.n_heads // self.shape.n_kv_heads
        place = TensorPlace(self.seen[kind], self.shape.n_layers, n_gqa, self.has_imatrix)
        self.seen[kind] += 1
        rules = MIXTURES.get(file_type.name, {}).get(kind, ())
        chosen = next((q for holds, q in rules if holds(place)), file_type.default)
        is_70b = self.shape.n_layers == self.shape.architecture.layers_of_70b
        if kind == "attn_v" and is_70b and file_type.name not in LOWEST:
            return Q.Q5_K if chosen in (Q.Q3_K, Q.Q4_K) else chosen
        return chosen

    def _checked(self, tensor: NamedTensor, kind: Q) -> Q:
        if not _fits(tensor, kind):
            raise ConvertError(
                f"{tensor.name}: rows of {tensor.source.shape[-1]} values are not whole {kind.name} blocks "
                f"of {BLOCKS[kind][0]}. Choose another type for it."
            )
        return kind


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether the tensor is a matrix that file types quantize; vectors and norms are not."""
    return len(shape) > 1 and shape[0] > 1 and name.endswith("weight") and "_norm.weight" not in name


def _fits(tensor: NamedTensor, kind: Q) -> bool:
    return tensor.source.shape[-1] % BLOCKS[kind][0] == 0
