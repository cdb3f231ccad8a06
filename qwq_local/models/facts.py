"""What the header of a model says: its sizes for a plan, its rope scaling, its tensors by type.

For a model that is not on this disk, `known_sizes` gives the sizes of QwQ-32B's files, and `Fit` estimates
how many tokens of context fit beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwq_convert.architecture import ModelShape

from qwq_local.errors import ConvertError, ModelFileError
from qwq_local.models.architecture import QWQ_32B, file_type
from qwq_local.models.header import Header
from qwq_local.planning.shape import GRANULE, ModelSizes, kv_token_bytes
from qwq_local.planning.window import RopeScaling, Scaling
from qwq_local.text import GIB

_EMBEDDING = "token_embd.weight"
_MAX_FACTOR = 64.0
COMPUTE_RESERVE_BYTES = int(0.8 * GIB)  # what llama.cpp took on a 24 GB card
MIN_CONTEXT = 16_384


def model_sizes(header: Header, shape: ModelShape) -> ModelSizes:
    """The bytes of every layer, and of what comes before and after the layers, from the table of tensors."""
    tensor_bytes = {name: tensor.n_bytes for name, tensor in header.tensors.items()}
    return _sizes(shape, tensor_bytes, file_type(header))


def _sizes(shape: ModelShape, tensor_bytes: Mapping[str, int], file_type: str) -> ModelSizes:
    layers = [0] * shape.n_layers
    output_bytes = 0
    for name, n_bytes in tensor_bytes.items():
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if first == "blk" and number.isdecimal() and int(number) < shape.n_layers:
            layers[int(number)] += n_bytes
        elif name != _EMBEDDING:
            output_bytes += n_bytes
    embedding_bytes = tensor_bytes[_EMBEDDING]
    return ModelSizes(
        shape=shape,
        layer_bytes=tuple(layers),
        input_bytes=embedding_bytes,
        output_bytes=output_bytes,
        tied_bytes=0 if "output.weight" in tensor_bytes else embedding_bytes,
        file_type=file_type,
    )


def own_rope_scaling(header: Header) -> RopeScaling:
    """The scaling in the file's own keys; factor 1 when there are none.

    The origin is 0 when the file does not state it. Raises ModelFileError for a factor out of bounds.
    """
    prefix = f"{header.architecture}.rope.scaling"
    kind = header.text(f"{prefix}.type", "none")
    if kind not in (Scaling.YARN, Scaling.LINEAR):
        return RopeScaling()
    factor = header.scalar(f"{prefix}.factor")
    if not isinstance(factor, int | float) or not 1 <= factor <= _MAX_FACTOR:
        raise ModelFileError(f"{header.path} is damaged: {prefix}.factor is {factor}, allowed is 1 to 64.")
    origin = header.integer(f"{prefix}.original_context_length") or 0
    if origin < 0:
        raise ModelFileError(f"{header.path} is damaged: the window that it scales from is {origin}.")
    return RopeScaling(float(factor), origin, Scaling(kind))


def tensor_kinds(header: Header) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The ggml_type of every tensor, and its shape with the rows first."""
    return {name: (int(tensor.kind), tensor.shape) for name, tensor in header.tensors.items()}


def known_sizes(wanted_type: str) -> ModelSizes | None:
    """The sizes of QwQ-32B in that file type, without an importance matrix; None for an unknown type.

    The shape is that of its config.json, and the converter's rules give the types: so a user can plan before
    20 GB are downloaded.
    """
    from qwq_convert.file_types import find_file_type, tensor_bytes
    from qwq_convert.model_config import named_tensor
    from qwq_convert.quant_types import NO_OPTIONS, choose_types
    from qwq_convert.safetensors import SourceTensor

    try:
        wanted = find_file_type(wanted_type)
    except ConvertError:
        return None
    expected = [tensor for tensor in QWQ_32B.tensors() if tensor.name != "output.bias"]
    # In llama-quantize's order, on which the types depend.
    tensors = [
        named_tensor(tensor, SourceTensor(tensor.source, "BF16", tensor.shape, "", 0, 0))
        for tensor in sorted(expected, key=lambda tensor: (tensor.layer, tensor.name))
    ]
    kinds = choose_types(tensors, wanted, QWQ_32B, NO_OPTIONS, has_imatrix=False)
    n_bytes = {
        tensor.name: tensor_bytes(kind, tensor.source.n_elements)
        for tensor, kind in zip(tensors, kinds, strict=True)
    }
    return _sizes(QWQ_32B, n_bytes, wanted.name)


@dataclass(frozen=True, slots=True)
class Fit:
    """The memory for weights, KV cache and the reserve together, and the type of the KV cache.

    `place` is the memory's name for the user. `native` is the trained window in tokens, `window` is the
    window with YaRN.
    """

    free_bytes: int
    place: str
    kv_type: str
    native: int
    window: int

    def context(self, weight_bytes: int, shape: ModelShape = QWQ_32B) -> int:
        """The tokens of context that fit beside the weights; 0 when the weights do not fit."""
        left = self.free_bytes - weight_bytes - COMPUTE_RESERVE_BYTES
        tokens = left // kv_bytes_per_token(shape, self.kv_type)
        # QwQ's header states more than the trained window. One that states less is of a smaller model.
        window = self.window if shape.context_length >= self.native else shape.context_length
        return max(0, min(tokens, window) // GRANULE * GRANULE)


def kv_bytes_per_token(shape: ModelShape, kv_type: str) -> int:
    """The bytes of K and V in all layers for one token. `kv_type` as in a profile."""
    return shape.n_layers * kv_token_bytes(shape, kv_type, kv_type)
