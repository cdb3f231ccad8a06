"""The door to llama_cpp's libggml: quantizes rows of numbers, and reads them back.

libggml answers a bad argument with an abort of the process, so every call here checks its arguments first. A
check that fails is a fault of the caller and raises ValueError. The calls release the GIL. The signatures are
those of ggml.h in the llama.cpp that llama-cpp-python carries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from qwq_convert.file_types import QuantType, block_bytes, block_size, tensor_bytes
from qwq_local.errors import ConvertError

Bytes = NDArray[np.uint8]
Rows = NDArray[np.float32]

_pointer, _type, _count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_Dequantizer = ctypes.CFUNCTYPE(None, _pointer, _pointer, _count)


class _Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _count),
        ("blck_size_interleave", _count),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _pointer),
        ("from_float_ref", _pointer),
    )


class GgmlInitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool))


def declare(name: str, result: Any, *arguments: Any) -> None:
    """Tell ctypes the types of one of libggml's functions."""
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, list(arguments)


declare("ggml_blck_size", _count, _type)
declare("ggml_type_size", ctypes.c_size_t, _type)
declare("ggml_type_name", ctypes.c_char_p, _type)
declare("ggml_get_type_traits", ctypes.POINTER(_Traits), _type)
declare("ggml_validate_row_data", ctypes.c_bool, _type, _pointer, ctypes.c_size_t)
declare("ggml_quantize_requires_imatrix", ctypes.c_bool, _type)
declare("ggml_quantize_chunk", ctypes.c_size_t, _type, _pointer, _pointer, _count, _count, _count, _pointer)

# The types that ggml_quantize_chunk can make; any other one aborts the process.
QUANTIZABLE = tuple(
    kind
    for kind in QuantType
    if not kind.name.startswith("I") or kind.name.startswith("IQ")
    if kind not in (QuantType.F64, QuantType.Q8_1, QuantType.Q8_K)
)


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


def is_known(kind: QuantType) -> bool:
    """Whether libggml has this type at all; for any other type it reads past the end of a table."""
    name: bytes = libggml.ggml_type_name(kind)
    return name.decode("ascii", "replace").upper() == kind.name.upper()


def dequantize(content: bytes, kind: QuantType) -> Rows:
    """The values of whole blocks of `kind` as 32-bit floats, as llama.cpp computes them.

    ValueError when `content` is not whole blocks; ConvertError for a type that holds no weights.
    """
    if kind == QuantType.F32:
        return np.frombuffer(content, dtype="<f4")
    function = _dequantizer(kind)
    n_blocks, rest = divmod(len(content), block_bytes(kind))
    if rest:
        raise ValueError(f"{len(content)} bytes are not whole blocks of {kind.name}")
    values = np.empty(n_blocks * block_size(kind), dtype=np.float32)
    function(content, values.ctypes.data, values.size)
    return values


@cache
def _dequantizer(kind: QuantType) -> Callable[[bytes, int, int], None]:
    """The function in libggml's description of `kind`, once libggml's other functions confirm the rest of it.

    The layout of the description may change with the library.
    """
    if not is_known(kind):
        raise ConvertError(f"{kind.name} is not a type of the installed llama.cpp.")
    traits = libggml.ggml_get_type_traits(kind).contents
    stated = (traits.type_name, traits.blck_size, traits.type_size, traits.is_quantized)
    size = libggml.ggml_blck_size(kind)
    expected = (libggml.ggml_type_name(kind), size, libggml.ggml_type_size(kind), size > 1)
    if stated != expected:
        raise ConvertError(
            f"the installed llama.cpp describes {kind.name} as {stated}, expected {expected}. "
            "Install the llama-cpp-python that this version names."
        )
    if not traits.to_float:
        raise ConvertError(f"{kind.name} holds no weights that could be compared.")
    function: Callable[[bytes, int, int], None] = _Dequantizer(traits.to_float)
    return function
