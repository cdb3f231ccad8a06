"""The sizes of QwQ-32B's files before they are on this disk: the exact bytes of every layer, by file type.

The shape is that of its config.json, and the converter's rules give the types. So a plan can be made before
20 GB are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_convert.architecture import ModelShape
from qwq_convert.file_types import find_file_type, tensor_bytes
from qwq_convert.quant_types import NO_OPTIONS, choose_types
from qwq_convert.safetensors import SourceTensor
from qwq_convert.tensor_names import NamedTensor, named_tensor

from qwq_local.errors import ConvertError
from qwq_local.models.architecture import QWQ_32B
from qwq_local.planning.shape import ModelSizes

_OUTSIDE = -1


def known_sizes(file_type: str) -> ModelSizes | None:
    """The bytes of QwQ-32B in that file type, made without an importance matrix; None for an unknown type."""
    try:
        wanted = find_file_type(file_type)
    except ConvertError:
        return None
    shape = QWQ_32B
    tensors = list(_tensors(shape))
    kinds = choose_types(tensors, wanted, shape, NO_OPTIONS, has_imatrix=False)
    layers = [0] * shape.n_layers
    input_bytes = output_bytes = 0
    for tensor, kind in zip(tensors, kinds, strict=True):
        n_bytes = tensor_bytes(kind, tensor.source.n_elements)
        if tensor.layer != _OUTSIDE:
            layers[tensor.layer] += n_bytes
        elif tensor.name == "token_embd.weight":
            input_bytes += n_bytes
        else:
            output_bytes += n_bytes
    return ModelSizes(
        shape=shape,
        layer_bytes=tuple(layers),
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        file_type=wanted.name,
    )


def _tensors(shape: ModelShape) -> Iterator[NamedTensor]:
    """Every tensor in llama-quantize's order, as BF16; the tensors have no bytes."""
    expected = [tensor for tensor in shape.tensors() if tensor.name != "output.bias"]
    for tensor in sorted(expected, key=lambda tensor: (tensor.layer, tensor.name)):
        yield named_tensor(tensor, SourceTensor(tensor.source, "BF16", tensor.shape, "", 0, 0))
