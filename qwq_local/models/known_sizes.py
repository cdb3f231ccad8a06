"""QwQ-32B's files before they are here: a file type in, exact bytes of every layer out.

The dimensions are those of its config.json, the types of the tensors those that llama-quantize chooses
without an importance matrix (llama.cpp, src/llama-quant.cpp). So a plan can be made before 20 GB are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qwq_local.planning.shape import ModelShape, ModelSizes

QWQ_32B = ModelShape(64, 5120, 27648, 40, 8, 152_064)
# Quantization type -> values in a block and bytes of it.
_BLOCKS = {"Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_K": (256, 176), "Q5_0": (32, 22), "Q4_K": (256, 144)}
# File type -> most tensors, the output, and what some layers' value and down projections are raised to.
_FILE_TYPES: Mapping[str, tuple[str, str, str | None]] = MappingProxyType(
    {
        "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
        "Q5_0": ("Q5_0", "Q6_K", None),
        "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
        "Q6_K": ("Q6_K", "Q6_K", None),
        "Q8_0": ("Q8_0", "Q8_0", None),
    }
)
_F32 = 4


def known_sizes(file_type: str) -> ModelSizes | None:
    """The bytes of QwQ-32B in that file type; None for a type that is not known here."""
    if file_type not in _FILE_TYPES:
        return None
    usual, output, raised = _FILE_TYPES[file_type]
    shape = QWQ_32B
    vocabulary = shape.n_vocab * shape.hidden
    return ModelSizes(
        shape=shape,
        layer_bytes=tuple(
            _layer_bytes(shape, usual, raised if raised and is_raised(layer, shape.n_layers) else usual)
            for layer in range(shape.n_layers)
        ),
        input_bytes=_bytes(vocabulary, usual),
        output_bytes=_bytes(vocabulary, output) + shape.hidden * _F32,
        file_type=file_type,
    )


def known_file_types() -> tuple[str, ...]:
    """The file types whose sizes are known, smallest first."""
    return tuple(_FILE_TYPES)


def _layer_bytes(shape: ModelShape, usual: str, of_value_and_down: str) -> int:
    square, narrow = shape.hidden * shape.hidden, shape.hidden * shape.kv_width
    wide = shape.hidden * shape.intermediate
    usual_values = 2 * square + narrow + 2 * wide
    biases_and_norms = shape.hidden + 2 * shape.kv_width + 2 * shape.hidden
    return _bytes(usual_values, usual) + _bytes(narrow + wide, of_value_and_down) + biases_and_norms * _F32


def is_raised(layer: int, n_layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth, and every third layer between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _bytes(n_values: int, kind: str) -> int:
    values, n_bytes = _BLOCKS[kind]
    return n_values // values * n_bytes
