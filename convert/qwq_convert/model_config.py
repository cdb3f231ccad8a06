"""The model that a checkpoint describes: its config.json, and its tensors under their GGUF names.

What would make llama.cpp abort is refused with a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf import Keys

from qwq_convert.architecture import FIGURES, Architecture, ExpectedTensor, ModelShape, shape_of
from qwq_convert.architectures import architectures
from qwq_convert.file_types import FLOAT_TYPES, QuantType
from qwq_convert.safetensors import SourceTensor
from qwq_convert.strict_json import Fields, shown
from qwq_local.errors import ConvertError

MAX_HEAD_DIM = 1 << 14
MAX_VOCABULARY = 1 << 22
OUTPUT = "output.weight"
# The names of YaRN's details in config.json, and their keys in a GGUF, in llama.cpp's order.
YARN_KEYS = {
    "extrapolation_factor": Keys.Rope.SCALING_YARN_EXT_FACTOR,
    "attention_factor": Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    "attn_factor": Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    "beta_fast": Keys.Rope.SCALING_YARN_BETA_FAST,
    "beta_slow": Keys.Rope.SCALING_YARN_BETA_SLOW,
}


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """How the checkpoint stretches its positions: `kind` is "linear" or "yarn".

    `original_context` and the `details`, by GGUF key, are YaRN's.
    """

    kind: str
    factor: float
    original_context: int | None
    details: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model and what else of config.json its tensors and key-values depend on.

    `states_head_dim` says that config.json has a head_dim, `tied` that lm_head.weight may be missing.
    """

    shape: ModelShape
    states_head_dim: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeParameters | None
    tied: bool


def read_config(config: Fields) -> ModelConfig:
    """Read `config`. Raises ConvertError for another architecture or figures that contradict each other."""
    architecture = _architecture(config)
    if config.values.get("quantization_config") is not None:
        config.fail("the weights are quantized already. Use the original F32, F16 or BF16 checkpoint.")
    if (activation := config.optional_text("hidden_act")) not in (None, "silu"):
        config.fail(f"hidden_act {shown(activation)} is not supported, only silu is.")
    figures = {figure.field: config.integer(figure.config_key, 1, figure.most) for figure in FIGURES}
    head_dim = config.optional_integer("head_dim", 1, MAX_HEAD_DIM)
    n_vocab = config.integer("vocab_size", 1, MAX_VOCABULARY)
    try:
        shape = shape_of(architecture, figures, head_dim, n_vocab)
    except ValueError as error:
        config.fail(f"{error}.")
    rope = config.optional_object("rope_parameters") or config.optional_object("rope_scaling")
    # transformers 5 moved rope_theta from the root into rope_parameters.
    with_theta = config if rope is None or rope.values.get("rope_theta") is None else rope
    return ModelConfig(
        shape=shape,
        states_head_dim=head_dim is not None,
        rms_norm_eps=config.positive("rms_norm_eps"),
        rope_theta=with_theta.positive("rope_theta"),
        rope_scaling=_rope_scaling(config, rope),
        tied=config.flag("tie_word_embeddings"),
    )


def _architecture(config: Fields) -> Architecture:
    names = config.items("architectures")
    by_class_name = {architecture.class_name: architecture for architecture in architectures()}
    stated = names[0] if len(names) == 1 else names
    if isinstance(stated, str) and stated in by_class_name:
        return by_class_name[stated]
    return config.fail(f"architecture {shown(stated)} is not supported, only {', '.join(by_class_name)}.")


def _rope_scaling(config: Fields, rope: Fields | None) -> RopeParameters | None:
    if rope is None:
        return None
    kind = rope.optional_text("rope_type") or rope.optional_text("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "yarn"):
        rope.fail(f"rope type {shown(kind)} is not supported, only linear and yarn are.")
    original = rope.optional_integer("original_max_position_embeddings", 1)
    if original is None:
        original = config.optional_integer("original_max_position_embeddings", 1)
    if kind == "yarn" and original is None:
        rope.fail("original_max_position_embeddings is missing; for QwQ-32B it is 32768.")
    details: dict[str, float] = {}
    for name, key in YARN_KEYS.items():
        if (value := rope.optional_number(name)) is not None:
            details.setdefault(key, value)
    if kind != "yarn":
        original, details = None, {}
    return RopeParameters(kind, rope.positive("factor"), original, details)


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
