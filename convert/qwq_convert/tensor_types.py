"""The types a tensor of a GGUF can have: their numbers, block sizes and bytes per block.

The gguf package's own table, and the one type that libggml quantizes and that the package does not know yet.
"""

from __future__ import annotations

from enum import IntEnum

from gguf import GGML_QUANT_SIZES


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


# Values in a block and bytes a block takes. Q2_0 (ggml-common.h, block_q2_0): a 16-bit scale and 64 x 2 bits.
BLOCKS: dict[QuantType, tuple[int, int]] = {
    # A newer package may know more types than these.
    **{QuantType[k.name]: sizes for k, sizes in GGML_QUANT_SIZES.items() if k.name in QuantType.__members__},
    QuantType.Q2_0: (64, 2 + 64 // 4),
}

# What llama-quantize reads without --allow-requantize.
FLOAT_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)


def find_tensor_type(name: str) -> QuantType | None:
    """The type called `name`, in any case."""
    return QuantType.__members__.get(name.upper())
