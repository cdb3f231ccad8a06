"""The types of tensors, and the file types that llama-quantize makes of them for a dense model.

Block sizes come from the gguf package; Q2_0 is added, which libggml quantizes and the package does not know
yet. The numbers of file types are those of llama.h (`enum llama_ftype`), the defaults those of
src/llama-quant.cpp (`llama_ftype_get_default_type`, and `llama_tensor_get_type_impl` for output and
embedding).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntEnum

from gguf import GGML_QUANT_SIZES, LlamaFileType

from qwq_local.errors import ConvertError


class QuantType(IntEnum):
    """`enum ggml_type` (ggml.h)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# Values and bytes of a block. Q2_0 (ggml-common.h, block_q2_0): a 16-bit scale and 64 x 2 bits.
BLOCKS: dict[QuantType, tuple[int, int]] = {
    # A newer package may know more types than these.
    **{QuantType[k.name]: sizes for k, sizes in GGML_QUANT_SIZES.items() if k.name in QuantType.__members__},
    QuantType.Q2_0: (64, 2 + 64 // 4),
}

# The types that llama-quantize reads without --allow-requantize.
FLOAT_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)


def block_size(kind: QuantType) -> int:
    """How many values one block of `kind` holds."""
    return BLOCKS[kind][0]


def block_bytes(kind: QuantType) -> int:
    """How many bytes one block of `kind` takes."""
    return BLOCKS[kind][1]


def tensor_bytes(kind: QuantType, n_elements: int) -> int:
    """How many bytes `n_elements` values take; ValueError when they are not whole blocks."""
    n_blocks, rest = divmod(n_elements, block_size(kind))
    if rest:
        raise ValueError(f"{n_elements} values are not whole blocks of {kind.name}")
    return n_blocks * block_bytes(kind)


def find_tensor_type(name: str) -> QuantType | None:
    """The type called `name`, in upper or lower case; None when there is none."""
    return QuantType.__members__.get(name.upper())


Q = QuantType


@dataclass(frozen=True, slots=True)
class FileType:
    """A file type that a user asks for.

    Most tensors get the type `default`. output.weight, or a token_embd.weight that takes its place, gets
    `output`. token_embd.weight gets `embedding` where one is given.
    """

    name: str
    number: int
    default: Q
    output: Q = Q.Q6_K
    embedding: Q | None = None

    @property
    def quantizes(self) -> bool:
        """Whether the file type has blocks, and not only floats of another width."""
        return self.default not in FLOAT_TYPES


FILE_TYPES = {
    file_type.name: file_type
    for file_type in (
        FileType("F32", 0, Q.F32),
        FileType("F16", 1, Q.F16),
        FileType("BF16", 32, Q.BF16),
        FileType("Q8_0", 7, Q.Q8_0, output=Q.Q8_0),
        FileType("Q6_K", 18, Q.Q6_K),
        FileType("Q5_K_M", 17, Q.Q5_K),
        FileType("Q5_K_S", 16, Q.Q5_K),
        FileType("Q5_1", 9, Q.Q5_1),
        FileType("Q5_0", 8, Q.Q5_0),
        FileType("Q4_K_M", 15, Q.Q4_K),
        FileType("Q4_K_S", 14, Q.Q4_K),
        FileType("Q4_1", 3, Q.Q4_1),
        FileType("Q4_0", 2, Q.Q4_0),
        FileType("IQ4_NL", 25, Q.IQ4_NL),
        FileType("IQ4_XS", 30, Q.IQ4_XS),
        FileType("Q3_K_L", 13, Q.Q3_K),
        FileType("Q3_K_M", 12, Q.Q3_K),
        FileType("Q3_K_S", 11, Q.Q3_K),
        FileType("IQ3_M", 27, Q.IQ3_S),
        FileType("IQ3_S", 26, Q.IQ3_S),
        FileType("IQ3_XS", 22, Q.IQ3_S),
        FileType("IQ3_XXS", 23, Q.IQ3_XXS, output=Q.Q5_K, embedding=Q.IQ3_S),
        FileType("Q2_K", 10, Q.Q2_K),
        FileType("Q2_K_S", 21, Q.Q2_K),
        FileType("IQ2_M", 29, Q.IQ2_S, output=Q.Q5_K, embedding=Q.IQ3_S),
        FileType("IQ2_S", 28, Q.IQ2_XS, output=Q.Q5_K, embedding=Q.IQ3_S),
        FileType("IQ2_XS", 20, Q.IQ2_XS, output=Q.Q5_K, embedding=Q.Q2_K),
        FileType("IQ2_XXS", 19, Q.IQ2_XXS, output=Q.Q5_K, embedding=Q.Q2_K),
        FileType("IQ1_M", 31, Q.IQ1_M, output=Q.Q5_K, embedding=Q.Q2_K),
        FileType("IQ1_S", 24, Q.IQ1_S, output=Q.Q5_K, embedding=Q.Q2_K),
        FileType("TQ2_0", 37, Q.TQ2_0, embedding=Q.Q4_K),
        FileType("TQ1_0", 36, Q.TQ1_0, embedding=Q.Q4_K),
        FileType("Q2_0", 41, Q.Q2_0, embedding=Q.Q4_K),
        FileType("Q1_0", 40, Q.Q1_0),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def find_file_type(name: str) -> FileType:
    """The file type with this name or alias, in upper or lower case. ConvertError names the nearest ones."""
    wanted = name.upper()
    file_type = FILE_TYPES.get(ALIASES.get(wanted, wanted))
    if file_type is None:
        nearest = get_close_matches(wanted, FILE_TYPES, n=3, cutoff=0.4)
        hint = f", did you mean {' or '.join(nearest)}?" if nearest else "."
        raise ConvertError(f"file type {name[:40]!r} is unknown{hint} Choose from {', '.join(FILE_TYPES)}.")
    return file_type


def file_type_name(number: int | None) -> str:
    """The name for `general.file_type` of any GGUF, such as Q4_K_M; empty when the number is unknown."""
    try:
        name = LlamaFileType(-1 if number is None else number).name
    except ValueError:
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
