"""The tensors of a checkpoint in, the same tensors under their GGUF names out, in file order.

Names and shapes come from the architecture's tables, so that a checkpoint that does not fit its config.json
is refused before it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwq_convert.architecture import Shape
from qwq_convert.file_types import QuantType
from qwq_convert.model_config import ModelConfig
from qwq_convert.safetensors import SourceTensor
from qwq_convert.strict_json import shown
from qwq_local.errors import ConvertError

READABLE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of the source and the name it has in the GGUF; `layer` is -1 outside the blocks.

    `kept` is the type it has in a GGUF of the source's own dtype, and keeps where nothing is quantized.
    """

    name: str
    layer: int
    source: SourceTensor
    kept: QuantType


@dataclass(frozen=True, slots=True)
class _Expected:
    name: str
    layer: int
    shape: tuple[int, ...]


def name_tensors(tensors: Mapping[str, SourceTensor], config: ModelConfig) -> tuple[NamedTensor, ...]:
    """Every tensor that goes into the GGUF, in the order of llama-quantize: by layer, then by name.

    ConvertError when one is missing, unknown, of another shape than config.json says, or not F32/F16/BF16.
    """
    architecture, expected = config.architecture, _expected_tensors(config)
    if config.tied and "lm_head.weight" not in tensors:
        del expected["lm_head.weight"]
    missing = [name for name in expected if name not in tensors]
    if missing:
        count = f"{len(missing)} tensors are missing, first" if len(missing) > 1 else "1 tensor is missing,"
        raise ConvertError(f"config.json: {count} {missing[0]}. Download the checkpoint again.")
    for tensor in tensors.values():
        if tensor.name not in expected and not tensor.name.endswith(architecture.ignored_suffixes):
            place = f"{tensor.shard}: tensor {shown(tensor.name)}"
            raise ConvertError(f"{place} is not part of a {architecture.name} model.")
    named = [_match(entry, tensors[name]) for name, entry in expected.items()]
    return tuple(sorted(named, key=lambda tensor: (tensor.layer, tensor.name)))


def _expected_tensors(config: ModelConfig) -> dict[str, _Expected]:
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "kv": config.kv_size,
        "intermediate": config.intermediate_size,
    }

    def shaped(shape: Shape) -> tuple[int, ...]:
        return tuple(sizes[word] for word in shape)

    architecture = config.architecture
    expected = {
        source: _Expected(name, -1, shaped(shape))
        for source, (name, shape) in architecture.outer_tensors.items()
    }
    for layer in range(config.n_layers):
        for source, (name, shape) in architecture.layer_tensors.items():
            entry = _Expected(f"blk.{layer}.{name}", layer, shaped(shape))
            expected[f"model.layers.{layer}.{source}"] = entry
    return expected


def _match(expected: _Expected, source: SourceTensor) -> NamedTensor:
    place = f"{source.shard}: {source.name}"
    if source.shape != expected.shape:
        raise ConvertError(
            f"{place} has shape {list(source.shape)}, config.json says {list(expected.shape)}. "
            "The two do not belong together: download both again."
        )
    if source.dtype not in READABLE_DTYPES:
        raise ConvertError(f"{place} is {source.dtype}. Use the original F32, F16 or BF16 weights.")
    is_vector = len(source.shape) < 2 or not expected.name.endswith(".weight")
    kept = QuantType.F32 if is_vector else QuantType[source.dtype]
    return NamedTensor(expected.name, expected.layer, source, kept)
