"""A GGUF header in, the Qwen2 shape it describes out, every tensor checked against it.

llama.cpp asserts, and so ends the process, on hyperparameters that contradict each other and on special
tokens outside the vocabulary; all of that is found here first, in one line. Knows no llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gguf import LlamaFileType
from qwq_convert.strict_json import named, shown

from qwq_local.errors import ModelFileError
from qwq_local.models.header import TOKENS_KEY, Header
from qwq_local.planning.shape import ModelShape

SUPPORTED = ("qwen2",)
MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
_ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "padding", "unknown", "seperator", "mask")


@dataclass(frozen=True, slots=True)
class Shape(ModelShape):
    """The dimensions of a Qwen2 decoder, and the window in tokens that its file states."""

    context_length: int


QWQ_32B = Shape(64, 5120, 27648, 40, 8, 152_064, 131_072)


def check_architecture(header: Header) -> Shape:
    """The shape of a model that llama.cpp can load without asserting.

    Raises ModelFileError for another architecture, a header value out of bounds or a tensor that is
    missing or misshapen.
    """
    architecture = header.text("general.architecture")
    if architecture not in SUPPORTED:
        kind = named(header.text("general.type", "model"))
        what = (
            f"holds a {kind} of architecture {shown(architecture)}"
            if architecture
            else "names no architecture"
        )
        raise ModelFileError(f"{header.path} {what}; supported: {', '.join(SUPPORTED)}.")
    shape = Shape(
        n_layers=_dimension(header, "block_count", MAX_LAYERS),
        hidden=_dimension(header, "embedding_length", 1 << 20),
        intermediate=_dimension(header, "feed_forward_length", 1 << 22),
        n_heads=_dimension(header, "attention.head_count", 1 << 14),
        n_kv_heads=_dimension(header, "attention.head_count_kv", 1 << 14, "attention.head_count"),
        n_vocab=_vocabulary_size(header),
        context_length=_dimension(header, "context_length", 1 << 30),
    )
    _check_heads(header, shape)
    _check_rope(header, shape)
    _check_special_tokens(header, shape)
    _check_tensors(header, shape)
    return shape


def _dimension(header: Header, key: str, limit: int, fallback: str = "") -> int:
    value = header.integer(f"qwen2.{key}")
    if value is None and fallback:
        value = header.integer(f"qwen2.{fallback}")
    if value is None or not 1 <= value <= limit:
        raise ModelFileError(f"{header.path} is damaged: qwen2.{key} is {value}, allowed is 1 to {limit:,}.")
    return value


def _vocabulary_size(header: Header) -> int:
    n_tokens = header.array_length(TOKENS_KEY)
    if n_tokens is None or n_tokens < 2:
        raise ModelFileError(f"{header.path} has no vocabulary ({TOKENS_KEY}).")
    model = header.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelFileError(
            f"{header.path} has a tokenizer of kind {shown(model)}; Qwen2 models have 'gpt2'."
        )
    n_types = header.array_length("tokenizer.ggml.token_type")
    if n_types not in (None, n_tokens):
        raise ModelFileError(f"{header.path} is damaged: {n_tokens} tokens, {n_types} token types.")
    if header.array_length("tokenizer.ggml.merges") is None:
        raise ModelFileError(f"{header.path} has no merges (tokenizer.ggml.merges): its tokenizer is lost.")
    return n_tokens


def _check_heads(header: Header, shape: Shape) -> None:
    if shape.hidden % shape.n_heads or shape.n_heads % shape.n_kv_heads:
        raise ModelFileError(
            f"{header.path} is damaged: {shape.hidden} values do not divide into {shape.n_heads} heads "
            f"and {shape.n_kv_heads} KV heads."
        )
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        value = header.integer(f"qwen2.{key}")
        if value is not None and value != shape.head_dim:
            raise ModelFileError(
                f"{header.path} is damaged: qwen2.{key} is {value}, the heads have {shape.head_dim} values."
            )
    if shape.head_dim % 2:
        raise ModelFileError(f"{header.path} is damaged: heads of {shape.head_dim} values cannot be rotated.")
    for key in ("expert_count", "nextn_predict_layers"):
        if header.integer(f"qwen2.{key}"):
            raise ModelFileError(
                f"{header.path} is damaged: qwen2.{key} does not belong to this architecture."
            )


def _check_rope(header: Header, shape: Shape) -> None:
    scaling = header.text("qwen2.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALING_TYPES:
        raise ModelFileError(f"{header.path} has the unknown rope scaling {shown(scaling)}.")
    for key in ("qwen2.rope.freq_base", "qwen2.attention.layer_norm_rms_epsilon"):
        value = header.scalar(key)
        if not isinstance(value, float) or not 0 < value < 1e12:
            raise ModelFileError(f"{header.path} is damaged: {key} is {shown(value)}.")


def _check_special_tokens(header: Header, shape: Shape) -> None:
    for name in _SPECIAL_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = header.integer(key)
        # 0xFFFFFFFF is llama.cpp's "none".
        if value is not None and value != 0xFFFFFFFF and not 0 <= value < shape.n_vocab:
            raise ModelFileError(f"{header.path} is damaged: {key} is {value} of {shape.n_vocab} tokens.")


def _check_tensors(header: Header, shape: Shape) -> None:
    for name, expected in expected_tensors(shape):
        tensor = header.tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{header.path} lacks the tensor {name}. Fetch or convert it again.")
        if tensor.shape != expected:
            raise ModelFileError(f"{header.path} is damaged: {name} is {tensor.shape}, should be {expected}.")
    output = header.tensors.get("output.weight")
    if output is not None and output.shape != (shape.n_vocab, shape.hidden):
        raise ModelFileError(f"{header.path} is damaged: output.weight is {output.shape}.")


def expected_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape, rows first, of every tensor that a Qwen2 decoder must have."""
    kv_width = shape.head_dim * shape.n_kv_heads
    yield "token_embd.weight", (shape.n_vocab, shape.hidden)
    yield "output_norm.weight", (shape.hidden,)
    for layer in range(shape.n_layers):
        block = f"blk.{layer}"
        for name, width in (("attn_q", shape.hidden), ("attn_k", kv_width), ("attn_v", kv_width)):
            yield f"{block}.{name}.weight", (width, shape.hidden)
            yield f"{block}.{name}.bias", (width,)
        yield f"{block}.attn_output.weight", (shape.hidden, shape.hidden)
        yield f"{block}.attn_norm.weight", (shape.hidden,)
        yield f"{block}.ffn_norm.weight", (shape.hidden,)
        yield f"{block}.ffn_gate.weight", (shape.intermediate, shape.hidden)
        yield f"{block}.ffn_up.weight", (shape.intermediate, shape.hidden)
        yield f"{block}.ffn_down.weight", (shape.hidden, shape.intermediate)


def model_name(header: Header) -> str:
    """The model as a person knows it: its name and quantization type, such as `QwQ 32B Q4_K_M`."""
    name = header.text("general.name") or header.path.stem
    return f"{name} {file_type(header)}".rstrip()


def file_type(header: Header) -> str:
    """The file's quantization type as a person knows it, such as Q4_K_M; empty when it is not known."""
    number = header.integer("general.file_type")
    try:
        name = LlamaFileType(-1 if number is None else number).name
    except ValueError:
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")
