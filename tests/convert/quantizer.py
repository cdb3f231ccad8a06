"""llama.cpp's own quantizer as an oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from qwq_convert.file_types import FILE_TYPES, QuantType

NO_TYPE = 10**4  # anything from GGML_TYPE_COUNT on means that no type is asked for
INT, FLOAT, BOOL, TEXT = range(4)  # enum llama_model_kv_override_type
FIELDS = {INT: "val_i64", FLOAT: "val_f64", BOOL: "val_bool", TEXT: "val_str"}


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of llama-quantize; overrides are (key, kind, value)."""

    importance: Mapping[str, NDArray[np.float32]] | None = None
    overrides: Sequence[tuple[str, int, int | float | bool | str]] = ()
    patterns: Sequence[tuple[str, QuantType]] = ()
    output: QuantType | None = None
    embedding: QuantType | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)


def llama_quantize(source: Path, file_type: str, out: Path, options: QuantizeOptions | None = None) -> int:
    """Run llama_model_quantize; 0 when it wrote `out`."""
    options = options or QuantizeOptions()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type].number
    parameters.nthread = 2
    if options.output is not None:
        parameters.output_tensor_type = options.output
    if options.embedding is not None:
        parameters.token_embedding_type = options.embedding
    for name, value in options.flags.items():
        setattr(parameters, name, value)
    kept = [_importance(parameters, options), _overrides(parameters, options), _patterns(parameters, options)]
    status: int = llama_cpp.llama_model_quantize(bytes(source), bytes(out), parameters)
    del kept  # the arrays must live until here
    return status


def _importance(parameters: llama_cpp.llama_model_quantize_params, options: QuantizeOptions) -> object:
    if options.importance is None:
        return None
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        llama_cpp.llama_model_imatrix_data(name.encode(), values.ctypes.data_as(pointer), values.size)
        for name, values in options.importance.items()
    ]
    array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    parameters.imatrix = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return array


def _overrides(parameters: llama_cpp.llama_model_quantize_params, options: QuantizeOptions) -> object:
    if not options.overrides:
        return None
    array = (llama_cpp.llama_model_kv_override * (len(options.overrides) + 1))()
    for entry, (key, kind, value) in zip(array, options.overrides, strict=False):
        entry.key, entry.tag = key.encode(), kind
        setattr(entry.value, FIELDS[kind], value.encode() if isinstance(value, str) else value)
    parameters.kv_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_kv_override))
    return array


def _patterns(parameters: llama_cpp.llama_model_quantize_params, options: QuantizeOptions) -> object:
    if not options.patterns:
        return None
    array = (llama_cpp.llama_model_tensor_override * (len(options.patterns) + 1))()
    for entry, (pattern, kind) in zip(array, options.patterns, strict=False):
        entry.pattern, entry.type = pattern.encode(), kind
    parameters.tt_overrides = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))
    return array
