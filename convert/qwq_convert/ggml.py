"""Rows of numbers in, quantized bytes out: the door to llama_cpp's libggml.

Knows no files and no models. libggml answers a bad argument with an abort of the process, so every call
here is checked first; a check that fails is a fault of the caller and raises ValueError. The calls release
the GIL. Signatures: ggml.h of the llama.cpp that llama-cpp-python carries.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from qwq_convert.tensor_types import QuantType

Bytes = NDArray[np.uint8]
Rows = NDArray[np.float32]

_pointer = ctypes.c_void_p
_type = ctypes.c_int
libggml.ggml_blck_size.argtypes = [_type]
libggml.ggml_blck_size.restype = ctypes.c_int64
libggml.ggml_type_size.argtypes = [_type]
libggml.ggml_type_size.restype = ctypes.c_size_t
libggml.ggml_bf16_to_fp32_row.argtypes = [_pointer, _pointer, ctypes.c_int64]
libggml.ggml_bf16_to_fp32_row.restype = None
libggml.ggml_fp16_to_fp32_row.argtypes = [_pointer, _pointer, ctypes.c_int64]
libggml.ggml_fp16_to_fp32_row.restype = None
libggml.ggml_validate_row_data.argtypes = [_type, _pointer, ctypes.c_size_t]
libggml.ggml_validate_row_data.restype = ctypes.c_bool
libggml.ggml_quantize_chunk.argtypes = [
    *(_type, _pointer, _pointer),
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    _pointer,
]
libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
libggml.ggml_quantize_requires_imatrix.argtypes = [_type]
libggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool

# What ggml_quantize_chunk knows how to make; any other type aborts the process.
QUANTIZABLE = tuple(
    kind
    for kind in QuantType
    if not kind.name.startswith("I") or kind.name.startswith("IQ")
    if kind not in (QuantType.F64, QuantType.Q8_1, QuantType.Q8_K)
)
FLOAT_ROWS = {
    QuantType.F16: libggml.ggml_fp16_to_fp32_row,
    QuantType.BF16: libggml.ggml_bf16_to_fp32_row,
}


@cache
def block_size(kind: QuantType) -> int:
    """How many values one block of `kind` holds."""
    return int(libggml.ggml_blck_size(kind))


@cache
def block_bytes(kind: QuantType) -> int:
    """How many bytes one block of `kind` takes."""
    return int(libggml.ggml_type_size(kind))


def tensor_bytes(kind: QuantType, n_elements: int) -> int:
    """How many bytes `n_elements` values take; ValueError when they are not whole blocks."""
    n_blocks, rest = divmod(n_elements, block_size(kind))
    if rest:
        raise ValueError(f"{n_elements} values are not whole blocks of {kind.name}")
    return n_blocks * block_bytes(kind)


def to_float(content: bytes, kind: QuantType) -> Rows:
    """The F32, F16 or BF16 values in `content` as 32-bit floats, exactly."""
    if kind == QuantType.F32:
        return np.frombuffer(content, dtype="<f4")
    n_values, rest = divmod(len(content), block_bytes(kind))
    if rest:
        raise ValueError(f"{len(content)} bytes are not whole {kind.name} values")
    values = np.empty(n_values, dtype=np.float32)
    FLOAT_ROWS[kind](content, values.ctypes.data, n_values)
    return values


def requires_importance(kind: QuantType) -> bool:
    """Whether libggml aborts without an importance for each column."""
    return bool(libggml.ggml_quantize_requires_imatrix(kind))


def quantize(rows: Rows, n_per_row: int, kind: QuantType, importance: Rows | None = None) -> Bytes:
    """The bytes of `rows`, which are whole rows of `n_per_row` finite values, as `kind`.

    `importance` weighs the error in each of the `n_per_row` columns.
    """
    if rows.dtype != np.float32 or not rows.flags.c_contiguous or rows.size % n_per_row:
        raise ValueError(f"expected contiguous rows of {n_per_row} 32-bit floats")
    if kind not in QUANTIZABLE or n_per_row % block_size(kind):
        raise ValueError(f"rows of {n_per_row} values cannot become {kind.name}")
    if importance is None and requires_importance(kind):
        raise ValueError(f"{kind.name} cannot be made without an importance for each column")
    if importance is not None and (
        importance.dtype != np.float32
        or importance.shape != (n_per_row,)
        or not importance.flags.c_contiguous
    ):
        raise ValueError(f"expected an importance of {n_per_row} 32-bit floats")
    n_bytes = tensor_bytes(kind, rows.size)
    quantized = np.empty(n_bytes, dtype=np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = libggml.ggml_quantize_chunk(
        kind, rows.ctypes.data, quantized.ctypes.data, 0, rows.size // n_per_row, n_per_row, weights
    )
    if written != n_bytes:
        raise ValueError(f"libggml wrote {written} bytes of {kind.name}, expected {n_bytes}")
    return quantized


def is_valid(quantized: Bytes, kind: QuantType) -> bool:
    """Whether every block of `quantized` decodes to finite numbers; libggml says on stderr where not."""
    if quantized.size % block_bytes(kind):
        raise ValueError(f"{quantized.size} bytes are not whole blocks of {kind.name}")
    return bool(libggml.ggml_validate_row_data(kind, quantized.ctypes.data, quantized.size))
