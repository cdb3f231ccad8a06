"""Checks the header of a GGUF against the description of its architecture, and returns the model's shape.

`check_architecture` refuses what ends the process in llama.cpp: figures that contradict each other, special
tokens outside the vocabulary. `check_completeness` also refuses what llama.cpp loads and then silently gets
wrong, or refuses itself with few words. Both raise ModelFileError with one line.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_convert.architecture import (
    FIGURES,
    KEY_LENGTH,
    VALUE_LENGTH,
    Architecture,
    Figure,
    ModelShape,
    shape_of,
)
from qwq_convert.architectures import find_architecture, supported
from qwq_convert.architectures.qwen2 import ARCHITECTURE as QWEN2
from qwq_convert.file_types import file_type_name
from qwq_convert.strict_json import named, shown

from qwq_local.errors import ModelFileError
from qwq_local.models.header import TOKENS_KEY, Header

QWQ_32B = ModelShape(
    architecture=QWEN2,
    n_layers=64,
    hidden=5120,
    intermediate=27648,
    n_heads=40,
    n_kv_heads=8,
    head_dim=128,
    n_vocab=152_064,
    context_length=131_072,
)
_ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
# What NVFP4 and its like carry beside a weight.
_OPTIONAL_SUFFIXES = (".scale", ".input_scale")
_NEEDED_KEYS = {
    "tokenizer.ggml.pre": "llama.cpp would split text in another way than the model was trained with",
    "tokenizer.ggml.token_type": "llama.cpp would take every special token for text",
}
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "padding", "unknown", "seperator", "mask")


def check_architecture(header: Header) -> ModelShape:
    """The shape of a model that llama.cpp can load without ending the process.

    Raises ModelFileError for an unknown architecture, a figure out of bounds, and a tensor that is missing or
    has another shape.
    """
    architecture = find_architecture(header.architecture)
    if architecture is None:
        kind = named(header.text("general.type", "model"))
        what = (
            f"holds a {kind} of architecture {shown(header.architecture)}"
            if header.architecture
            else "names no architecture"
        )
        raise ModelFileError(f"{header.path} {what}; supported: {supported()}.")
    figures = {figure.field: _figure(header, architecture, figure) for figure in FIGURES}
    head_dim = header.integer(architecture.key(KEY_LENGTH))
    try:
        shape = shape_of(architecture, figures, head_dim, _vocabulary_size(header))
    except ValueError as error:
        raise ModelFileError(f"{header.path} is damaged: {error}.") from None
    _check_heads(header, shape)
    _check_rope(header, architecture)
    _check_special_tokens(header, shape)
    _check_tensors(header, shape)
    return shape


def _figure(header: Header, architecture: Architecture, figure: Figure) -> int:
    key = architecture.key(figure.key)
    value = header.integer(key)
    if value is None and figure.field == "n_kv_heads":
        value = header.integer(architecture.key("attention.head_count"))
    if value is None or not 1 <= value <= figure.most:
        raise ModelFileError(f"{header.path} is damaged: {key} is {value}, allowed is 1 to {figure.most:,}.")
    return value


def _vocabulary_size(header: Header) -> int:
    n_tokens = header.array_length(TOKENS_KEY)
    if n_tokens is None or n_tokens < 2:
        raise ModelFileError(f"{header.path} has no vocabulary ({TOKENS_KEY}).")
    model = header.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelFileError(
            f"{header.path} has a tokenizer of kind {shown(model)}; Qwen models have 'gpt2'."
        )
    n_types = header.array_length("tokenizer.ggml.token_type")
    if n_types not in (None, n_tokens):
        raise ModelFileError(f"{header.path} is damaged: {n_tokens} tokens, {n_types} token types.")
    if header.array_length("tokenizer.ggml.merges") is None:
        raise ModelFileError(f"{header.path} has no merges (tokenizer.ggml.merges): its tokenizer is lost.")
    return n_tokens


def _check_heads(header: Header, shape: ModelShape) -> None:
    architecture = shape.architecture
    for name in (KEY_LENGTH, VALUE_LENGTH, "rope.dimension_count"):
        key = architecture.key(name)
        value = header.integer(key)
        if value is not None and value != shape.head_dim:
            raise ModelFileError(
                f"{header.path} is damaged: {key} is {value}, the heads have {shape.head_dim} values."
            )
    for name in ("expert_count", "nextn_predict_layers"):
        key = architecture.key(name)
        if header.integer(key):
            raise ModelFileError(f"{header.path} is damaged: {key} does not belong to this architecture.")


def _check_rope(header: Header, architecture: Architecture) -> None:
    scaling = header.text(architecture.key("rope.scaling.type"), "none")
    if scaling not in _ROPE_SCALING_TYPES:
        raise ModelFileError(f"{header.path} has the unknown rope scaling {shown(scaling)}.")
    for name in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
        key = architecture.key(name)
        value = header.scalar(key)
        if not isinstance(value, float) or not 0 < value < 1e12:
            raise ModelFileError(f"{header.path} is damaged: {key} is {shown(value)}.")


def _check_special_tokens(header: Header, shape: ModelShape) -> None:
    for name in _SPECIAL_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = header.integer(key)
        # 0xFFFFFFFF is llama.cpp's "none".
        if value is not None and value != 0xFFFFFFFF and not 0 <= value < shape.n_vocab:
            raise ModelFileError(f"{header.path} is damaged: {key} is {value} of {shape.n_vocab} tokens.")


def _check_tensors(header: Header, shape: ModelShape) -> None:
    for expected in shape.tensors():
        tensor = header.tensors.get(expected.name)
        if tensor is None and not expected.is_optional:
            raise ModelFileError(
                f"{header.path} lacks the tensor {expected.name}. Fetch or convert it again."
            )
        if tensor is not None and tensor.shape != expected.shape:
            raise ModelFileError(
                f"{header.path} is damaged: {expected.name} is {tensor.shape}, should be {expected.shape}."
            )


def check_completeness(header: Header) -> ModelShape:
    """The shape of a complete model. Raises ModelFileError for a missing key or a tensor too many."""
    shape = check_architecture(header)
    for key, consequence in _NEEDED_KEYS.items():
        if header.scalar(key) is None and header.array_length(key) is None:
            raise ModelFileError(f"{header.path} lacks {key}: {consequence}. Fetch or convert it again.")
    known = {tensor.name for tensor in shape.tensors()}
    unknown = [name for name in header.tensors if name not in known and not name.endswith(_OPTIONAL_SUFFIXES)]
    if unknown:
        raise ModelFileError(
            f"{header.path} holds {len(unknown)} tensors that no {header.architecture} model has, first "
            f"{unknown[0]!r}: llama.cpp would refuse it. Fetch or convert it again."
        )
    return shape


def notices(header: Header) -> Iterator[str]:
    """One line for each thing that a model should have and runs without."""
    if not header.text("tokenizer.chat_template"):
        yield "no chat template (tokenizer.chat_template): qwq uses its built-in one."
    if header.integer("tokenizer.ggml.eos_token_id") is None:
        yield "no end token (tokenizer.ggml.eos_token_id): an answer may not end by itself."


def model_name(header: Header) -> str:
    """The name to show for a model, with its quantization type: `QwQ 32B Q4_K_M`."""
    name = header.text("general.name") or header.path.stem
    return f"{name} {file_type(header)}".rstrip()


def file_type(header: Header) -> str:
    """The name of the file's quantization type, such as Q4_K_M; empty when it is unknown."""
    return file_type_name(header.integer("general.file_type"))
