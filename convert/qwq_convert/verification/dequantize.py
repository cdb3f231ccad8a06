"""Blocks of any type in, the 32-bit floats that llama.cpp reads from them out.

A second door to llama_cpp's libggml: `ggml_get_type_traits` hands out a struct of ggml.h whose layout may
change with the library, so what it says of itself is held against libggml's own functions before a function
pointer in it is called. Knows no files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from qwq_convert import ggml
from qwq_convert.tensor_types import QuantType
from qwq_local.errors import ConvertError

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """ggml.h's `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


libggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
libggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
libggml.ggml_type_name.argtypes = [ctypes.c_int]
libggml.ggml_type_name.restype = ctypes.c_char_p


def is_known(kind: QuantType) -> bool:
    """Whether libggml has this type at all; asking it for the block size of any other reads past a table."""
    name: bytes = libggml.ggml_type_name(kind)
    return name.decode("ascii", "replace").upper() == kind.name.upper()


def dequantize(content: bytes, kind: QuantType) -> NDArray[np.float32]:
    """The values of whole blocks of `kind` as 32-bit floats, as llama.cpp computes them.

    ValueError when `content` is not whole blocks; ConvertError for a type that holds no weights.
    """
    if kind == QuantType.F32:
        return np.frombuffer(content, dtype="<f4")
    to_float = _to_float(kind)
    n_blocks, rest = divmod(len(content), ggml.block_bytes(kind))
    if rest:
        raise ValueError(f"{len(content)} bytes are not whole blocks of {kind.name}")
    values = np.empty(n_blocks * ggml.block_size(kind), dtype=np.float32)
    to_float(content, values.ctypes.data, values.size)
    return values


@cache
def _to_float(kind: QuantType) -> Callable[[bytes, int, int], None]:
    if not is_known(kind):
        raise ConvertError(f"{kind.name} is not a type of the installed llama.cpp.")
    traits = libggml.ggml_get_type_traits(kind).contents
    stated = (traits.type_name, traits.blck_size, traits.type_size, traits.is_quantized)
    expected = _stated_elsewhere(kind)
    if stated != expected:
        raise ConvertError(
            f"the installed llama.cpp describes {kind.name} as {stated}, expected {expected}. "
            "Install the llama-cpp-python that this version names."
        )
    if not traits.to_float:
        raise ConvertError(f"{kind.name} holds no weights that could be compared.")
    function: Callable[[bytes, int, int], None] = _ToFloat(traits.to_float)
    return function


def _stated_elsewhere(kind: QuantType) -> tuple[bytes, int, int, bool]:
    """What libggml's functions say of `kind`; the struct must say the same, field by field."""
    size = ggml.block_size(kind)
    return (libggml.ggml_type_name(kind), size, ggml.block_bytes(kind), size > 1)
