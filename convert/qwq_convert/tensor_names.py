"""The tensors of a checkpoint under their GGUF names, checked against the architecture's description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwq_convert.architecture import ExpectedTensor
from qwq_convert.file_types import FLOAT_TYPES, QuantType
from qwq_convert.model_config import ModelConfig
from qwq_convert.safetensors import SourceTensor
from qwq_convert.strict_json import shown
from qwq_local.errors import ConvertError

OUTPUT = "output.weight"


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of the source and its name in the GGUF; `layer` is -1 outside the layers.

    `kept` is its type in a GGUF of the source's own dtype. A tensor that is not quantized keeps it.
    """

    name: str
    layer: int
    source: SourceTensor
    kept: QuantType


def name_tensors(tensors: Mapping[str, SourceTensor], config: ModelConfig) -> tuple[NamedTensor, ...]:
    """Every tensor that goes into the GGUF, in the order of llama-quantize: by layer, then by name.

    Raises ConvertError when one is missing or unknown, has another shape than config.json says, or is not
    F32, F16 or BF16.
    """
    expected = {tensor.source: tensor for tensor in config.shape.tensors()}
    missing = [
        source
        for source, tensor in expected.items()
        if source not in tensors and (not tensor.is_optional or (tensor.name == OUTPUT and not config.tied))
    ]
    if missing:
        count = f"{len(missing)} tensors are missing, first" if len(missing) > 1 else "1 tensor is missing,"
        raise ConvertError(f"config.json: {count} {missing[0]}. Download the checkpoint again.")
    architecture = config.shape.architecture
    for tensor in tensors.values():
        if tensor.name not in expected and not tensor.name.endswith(architecture.ignored_suffixes):
            place = f"{tensor.shard}: tensor {shown(tensor.name)}"
            raise ConvertError(f"{place} is not part of a {architecture.name} model.")
    named = [named_tensor(entry, tensors[source]) for source, entry in expected.items() if source in tensors]
    return tuple(sorted(named, key=lambda tensor: (tensor.layer, tensor.name)))


def named_tensor(expected: ExpectedTensor, source: SourceTensor) -> NamedTensor:
    """The source under its GGUF name. Raises ConvertError for another shape or an unknown dtype."""
    place = f"{source.shard}: {source.name}"
    if source.shape != expected.shape:
        raise ConvertError(
            f"{place} has shape {list(source.shape)}, config.json says {list(expected.shape)}. "
            "The two do not belong together: download both again."
        )
    if source.dtype not in (kind.name for kind in FLOAT_TYPES):
        raise ConvertError(f"{place} is {source.dtype}. Use the original F32, F16 or BF16 weights.")
    is_vector = len(source.shape) < 2 or not expected.name.endswith(".weight")
    kept = QuantType.F32 if is_vector else QuantType[source.dtype]
    return NamedTensor(expected.name, expected.layer, source, kept)
