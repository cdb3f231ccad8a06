"""The address of one of llama.cpp's tensors in, its fields and numbers out; a door to llama_cpp's libggml.

Tensors cross the C border by their layout in memory, which changes between builds without notice: so
`check_layout` tries it on tensors of known content before any other is looked at. Knows no models. The layout
is that of `struct ggml_tensor` in ggml.h of the llama.cpp that llama-cpp-python 0.3.36 carries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as QuantType
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from qwq_local.errors import ConvertError

Rows = NDArray[np.float32]

TESTED_VERSION = "0.3.36"
TENSOR_OVERHEAD = 368
MAX_DIMENSIONS, MAX_SOURCES, MAX_NAME = 4, 10, 64
# Far above the number of MUL_MAT, far below that of the last operation, whose name can still be asked for.
_MOST_OPERATIONS = 64

_pointer = ctypes.c_void_p


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor: `ne` values, `nb` bytes from one to the next in each dimension, columns first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _pointer),
        ("ne", ctypes.c_int64 * MAX_DIMENSIONS),
        ("nb", ctypes.c_size_t * MAX_DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _pointer * MAX_SOURCES),
        ("view_src", _pointer),
        ("view_offs", ctypes.c_size_t),
        ("data", _pointer),
        ("name", ctypes.c_char * MAX_NAME),
        ("extra", _pointer),
        ("padding", ctypes.c_char * 8),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool))


def _declare(name: str, result: Any, *arguments: Any) -> None:
    function = getattr(libggml, name)
    function.argtypes, function.restype = list(arguments), result


_declare("ggml_tensor_overhead", ctypes.c_size_t)
_declare("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
_declare("ggml_init", _pointer, _InitParams)
_declare("ggml_free", None, _pointer)
_declare("ggml_new_tensor_2d", _pointer, _pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_declare("ggml_mul_mat", _pointer, _pointer, _pointer, _pointer)
_declare("ggml_set_name", _pointer, _pointer, ctypes.c_char_p)
_declare("ggml_get_data", _pointer, _pointer)
_declare("ggml_nbytes", ctypes.c_size_t, _pointer)
_declare("ggml_backend_buffer_is_host", ctypes.c_bool, _pointer)
_declare("ggml_backend_tensor_get", None, _pointer, _pointer, ctypes.c_size_t, ctypes.c_size_t)


def check_layout(library: Any = libggml, layout: type[ctypes.Structure] = GgmlTensor) -> int:
    """The number of the MUL_MAT operation, when the library's tensors are laid out as `layout` says.

    Raises ConvertError when they are not: with another build, activations would be read from wrong places.
    """
    overhead = library.ggml_tensor_overhead()
    if overhead != TENSOR_OVERHEAD:
        raise _other_build(f"a tensor takes {overhead} bytes, expected {TENSOR_OVERHEAD}")
    multiplication = next((i for i in range(_MOST_OPERATIONS) if library.ggml_op_name(i) == b"MUL_MAT"), -1)
    context = library.ggml_init(_InitParams(16 * overhead, None, False))
    if multiplication < 0 or not context:
        raise _other_build("it has no matrix multiplication")
    try:
        weight = library.ggml_new_tensor_2d(context, QuantType.F32, 3, 5)
        rows = library.ggml_new_tensor_2d(context, QuantType.F32, 3, 4)
        product = library.ggml_mul_mat(context, weight, rows)
        library.ggml_set_name(rows, b"probe")
        found, node = layout.from_address(rows), layout.from_address(product)
        read = {
            "type": found.type == QuantType.F32 and found.buffer is None,
            "ne": (*found.ne,) == (3, 4, 1, 1) and (*node.ne,) == (5, 4, 1, 1),
            "nb": (*found.nb,) == (4, 12, 48, 48),
            "op": node.op == multiplication and found.op == 0,
            "src": (*node.src,) == (weight, rows, *[None] * (MAX_SOURCES - 2)),
            "data": found.data == library.ggml_get_data(rows),
            "name": found.name == b"probe",
        }
    finally:
        library.ggml_free(context)
    if wrong := [field for field, is_right in read.items() if not is_right]:
        raise _other_build(f"a tensor's {', '.join(wrong)} lie elsewhere")
    return multiplication


def weight_name(tensor: GgmlTensor) -> str:
    """The name that the model file gave the tensor: `CUDA0#blk.0.attn_k.weight#0` is a copy on a device."""
    parts = bytes(tensor.name).split(b"#")
    return (parts[1] if len(parts) > 1 else parts[0]).decode("utf-8", "replace")


def is_host(tensor: GgmlTensor) -> bool:
    """Whether the tensor's numbers lie in this process's memory."""
    return bool(libggml.ggml_backend_buffer_is_host(tensor.buffer))


def planes(tensor: GgmlTensor, *, in_memory: bool) -> Iterator[Rows]:
    """The rows of an F32 tensor, one plane of the two outer dimensions after the other.

    `in_memory` False copies the numbers from the device they lie on first.
    """
    n_bytes = libggml.ggml_nbytes(ctypes.addressof(tensor))
    if tensor.type != QuantType.F32 or tensor.nb[0] != 4:
        raise ValueError("expected a tensor of 32-bit floats, those of a row side by side")
    if in_memory:
        content = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(tensor.data))
    else:
        content = np.empty(n_bytes, np.uint8)
        libggml.ggml_backend_tensor_get(ctypes.addressof(tensor), content.ctypes.data, 0, n_bytes)
    shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
    stacked: Rows = np.ndarray(shape, np.float32, content.data, 0, strides)
    for outer in stacked:
        yield from outer


def _other_build(difference: str) -> ConvertError:
    return ConvertError(
        f"this build of llama.cpp is not the tested one: {difference}. "
        f"Run: pip install llama-cpp-python=={TESTED_VERSION}"
    )
