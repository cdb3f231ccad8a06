"""QwQ-32B's files before they are here: a file type in, exact bytes of every layer out.

Dimensions are those of its config.json, names and types those that the converter gives its tensors. So a plan
can be made before 20 GB are fetched.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_convert.architectures.qwen2 import ARCHITECTURE
from qwq_convert.file_types import QuantType, find_file_type, tensor_bytes
from qwq_convert.quant_types import NO_OPTIONS, Figures, choose_types, is_quantizable
from qwq_convert.safetensors import SourceTensor
from qwq_convert.tensor_names import NamedTensor

from qwq_local.errors import ConvertError
from qwq_local.models.architecture import QWQ_32B
from qwq_local.planning.shape import ModelShape, ModelSizes

_OUTSIDE = -1


def known_sizes(file_type: str) -> ModelSizes | None:
    """The bytes of QwQ-32B in that file type, made without an importance matrix; None for an unknown type."""
    try:
        wanted = find_file_type(file_type)
    except ConvertError:
        return None
    shape = QWQ_32B
    tensors = list(_tensors(shape))
    figures = Figures(shape.n_layers, shape.n_heads // shape.n_kv_heads)
    kinds = choose_types(tensors, wanted, figures, NO_OPTIONS, has_imatrix=False)
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
    """Every tensor in llama-quantize's order, as BF16 that lies nowhere."""
    sizes = {
        "vocab": shape.n_vocab,
        "hidden": shape.hidden,
        "kv": shape.kv_width,
        "intermediate": shape.intermediate,
    }

    def named(name: str, words: tuple[str, ...], layer: int) -> NamedTensor:
        dimensions = tuple(sizes[word] for word in words)
        kept = QuantType.BF16 if is_quantizable(name, dimensions) else QuantType.F32
        return NamedTensor(name, layer, SourceTensor(name, "BF16", dimensions, "", 0, 0), kept)

    for name, words in sorted(ARCHITECTURE.outer_tensors.values()):
        yield named(name, words, _OUTSIDE)
    for layer in range(shape.n_layers):
        for name, words in sorted(ARCHITECTURE.layer_tensors.values()):
            yield named(f"blk.{layer}.{name}", words, layer)
