"""The quantization type of each tensor in a file type: llama-quantize's rules as tables.

They follow llama.cpp's src/llama-quant.cpp, for models without experts: MIXTURES is
`llama_tensor_get_type_impl`, FALLBACKS is `tensor_type_fallback`, and `_Chooser` has the order in which
options win.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
    """The first and the last eighth of the layers, and every third one between."""
    eighth = place.n // 8
    return place.i < eighth or place.i >= 7 * place.n // 8 or (place.i - eighth) % 3 == 2


def first_eighth(place: TensorPlace) -> bool:
    """The first eighth of the layers."""
    return place.i < place.n // 8


def first_sixteenth(place: TensorPlace) -> bool:
    """The first sixteenth of the layers."""
    return place.i < place.n // 16


def middle(place: TensorPlace) -> bool:
    """All layers but the first and the last eighth."""
    return place.n // 8 <= place.i < 7 * place.n // 8


def first_four(place: TensorPlace) -> bool:
    """Layers 0 to 3."""
    return place.i < 4


def first_two(place: TensorPlace) -> bool:
    """Layers 0 and 1."""
    return place.i < 2


def shared_heads(place: TensorPlace) -> bool:
    """At least four query heads share a key-value head, so attn_v is small beside attn_q."""
    return place.n_gqa >= 4


def without_imatrix(place: TensorPlace) -> bool:
    """No importance matrix is given."""
    return not place.has_imatrix


def first_eighth_with_imatrix(place: TensorPlace) -> bool:
    """The first eighth of the layers, when an importance matrix is given."""
    return place.has_imatrix and first_eighth(place)


def first_eighth_without_imatrix(place: TensorPlace) -> bool:
    """The first eighth of the layers, when no importance matrix is given."""
    return not place.has_imatrix and first_eighth(place)


def always(place: TensorPlace) -> bool:
    """Every layer."""
    return True


Rule = tuple[Callable[[TensorPlace], bool], Q]
Mixture = dict[str, tuple[Rule, ...]]

_LOW: Mixture = {"attn_v": ((shared_heads, Q.Q4_K), (always, Q.Q2_K)), "ffn_down": ((first_eighth, Q.Q2_K),)}
_IQ1: Mixture = _LOW | {"attn_output": ((always, Q.IQ2_XXS),)}
_IQ2: Mixture = {
    "attn_v": ((shared_heads, Q.Q4_K), (always, Q.IQ3_S)),
    "ffn_down": ((first_eighth, Q.IQ3_S),),
    "attn_output": ((always, Q.IQ3_S),),
}
_IQ4: Mixture = {
    "attn_v": ((shared_heads, Q.Q5_K),),
    "ffn_down": ((first_eighth_without_imatrix, Q.Q5_K),),
}
_MORE_BITS: Mixture = {"attn_v": ((more_bits, Q.Q6_K),), "ffn_down": ((more_bits, Q.Q6_K),)}

# Where a file type differs from its default inside the layers: the first rule that holds for a kind of
# tensor.
MIXTURES: dict[str, Mixture] = {
    "Q4_0": {"ffn_down": ((first_eighth_with_imatrix, Q.Q4_1),)},
    "Q5_0": {"ffn_down": ((first_eighth_with_imatrix, Q.Q5_1),)},
    "Q5_K_M": _MORE_BITS,
    "Q4_K_M": _MORE_BITS,
    "Q4_K_S": {"attn_v": ((first_four, Q.Q5_K),), "ffn_down": ((first_eighth, Q.Q5_K),)},
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "Q3_K_L": dict.fromkeys(("attn_v", "ffn_down", "attn_output"), ((always, Q.Q5_K),)),
    "Q3_K_M": {
        "attn_v": ((first_two, Q.Q5_K), (always, Q.Q4_K)),
        "ffn_down": ((first_sixteenth, Q.Q5_K), (always, Q.Q4_K)),
        "attn_output": ((always, Q.Q4_K),),
    },
    "IQ3_M": {
        "attn_v": ((always, Q.Q4_K),),
        "ffn_down": ((first_eighth, Q.Q4_K),),
        "attn_output": ((always, Q.Q4_K),),
    },
    "IQ3_S": {"attn_v": ((shared_heads, Q.Q4_K),)},
    "IQ3_XS": {
        "attn_v": ((shared_heads, Q.Q4_K),),
        "attn_k": ((always, Q.IQ3_XXS),),
        "attn_q": ((always, Q.IQ3_XXS),),
        "ffn_gate": ((middle, Q.IQ3_XXS),),
        "ffn_up": ((middle, Q.IQ3_XXS),),
    },
    "IQ3_XXS": {
        "attn_v": ((shared_heads, Q.Q4_K), (without_imatrix, Q.IQ3_S)),
        "attn_k": ((always, Q.IQ2_S),),
        "attn_q": ((always, Q.IQ2_S),),
        "ffn_down": ((first_eighth_without_imatrix, Q.Q4_K), (without_imatrix, Q.Q3_K)),
        "attn_output": ((always, Q.IQ3_S),),
    },
    "Q2_K": {
        "attn_v": ((shared_heads, Q.Q4_K), (always, Q.Q3_K)),
        "ffn_down": ((always, Q.Q3_K),),
        "attn_output": ((always, Q.Q3_K),),
    },
    "Q2_K_S": {"attn_v": ((shared_heads, Q.Q4_K),), "ffn_down": ((first_eighth, Q.Q4_K),)},
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


class _Chooser:
    """Chooses the types of one file. It counts the tensors of each kind that the tables decide."""

    def __init__(
        self,
        tensors: Iterable[NamedTensor],
        file_type: FileType,
        shape: ModelShape,
        options: TypeOptions,
        has_imatrix: bool,
    ) -> None:
        self._file_type = file_type
        self._shape = shape
        self._options = options
        self._has_imatrix = has_imatrix
        self._mixture = MIXTURES.get(file_type.name, {})
        self._tied = all(tensor.name != OUTPUT for tensor in tensors)
        self._seen: Counter[str] = Counter()

    def choose(self, tensor: NamedTensor) -> Q:
        name, options = tensor.name, self._options
        if not is_quantizable(name, tensor.source.shape) or (options.keep_output and name == OUTPUT):
            return tensor.kept
        # As in llama-quantize, these two have no fallback: a type that does not fit is an error.
        if name == TIED and options.embedding is not None:
            return self._checked(tensor, options.embedding)
        if name == OUTPUT and options.output is not None:
            return self._checked(tensor, options.output)
        if not self._file_type.quantizes:
            return self._file_type.default
        matching = (kind for pattern, kind in options.patterns if pattern.search(name))
        kind = next(matching, None)
        if kind is None:
            kind = self._file_type.default if options.pure else self._by_table(tensor)
        return self._fitting(tensor, kind)

    def _by_table(self, tensor: NamedTensor) -> Q:
        file_type, name = self._file_type, tensor.name
        if name == OUTPUT or (name == TIED and self._tied):
            if self._options.output is not None:
                return self._options.output
            return file_type.output if _fits(tensor, file_type.default) else Q.Q8_0
        if name == TIED:
            return file_type.embedding or file_type.default
        kind = name.split(".")[2] if name.count(".") > 2 else name
        # A tensor whose type an option decides is not counted, which shifts the layers after it.
        place = TensorPlace(
            self._seen[kind], self._shape.n_layers, self._shape.heads_per_kv_head, self._has_imatrix
        )
        self._seen[kind] += 1
        rules = self._mixture.get(kind, ())
        chosen = next((q for holds, q in rules if holds(place)), file_type.default)
        is_70b = self._shape.n_layers == self._shape.architecture.layers_of_70b
        if kind == "attn_v" and is_70b and file_type.name not in LOWEST:
            return Q.Q5_K if chosen in (Q.Q3_K, Q.Q4_K) else chosen
        return chosen

    def _fitting(self, tensor: NamedTensor, kind: Q) -> Q:
        if _fits(tensor, kind):
            return kind
        if kind not in FALLBACKS and BLOCKS[kind][0] > 32:
            return self._checked(tensor, kind)
        fallback = FALLBACKS.get(kind, kind)
        return fallback if _fits(tensor, fallback) else Q.F16

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
