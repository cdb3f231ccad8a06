"""The form of a description of an architecture, which each module of architectures/ fills in.

The converter, the check of a GGUF's header, the planner and llama.cpp's dry run read the same description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS: more ends the process
KEY_LENGTH, VALUE_LENGTH = "attention.key_length", "attention.value_length"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name in a checkpoint, its name in a GGUF, and its shape in the words of `SIZES`.

    In `Architecture.layer_tensors` both names are those within a layer. A model loads without an optional
    tensor; output.weight is optional in this sense because token_embd.weight can take its place.
    """

    source: str
    name: str
    shape: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """What sets one architecture of dense decoders apart from the others.

    `class_name` is its name in config.json, `name` that in a GGUF. With `states_head_dim` a model may state
    the size of its heads; else all heads together are as wide as the model. The converter skips tensors with
    one of the `ignored_suffixes`. llama-quantize takes a model of `layers_of_70b` layers for the "70B model",
    whose small attn_v gets more bits.
    """

    class_name: str
    name: str
    outer_tensors: tuple[TensorSpec, ...]
    layer_tensors: tuple[TensorSpec, ...]
    states_head_dim: bool = False
    source_layers: str = "model.layers"
    ignored_suffixes: tuple[str, ...] = ()
    layers_of_70b: int | None = None

    def key(self, name: str) -> str:
        """The GGUF key for one of the architecture's figures, such as `qwen2.block_count`."""
        return f"{self.name}.{name}"


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a model of some shape has, rows first; `layer` is -1 outside the layers."""

    source: str
    name: str
    layer: int
    shape: tuple[int, ...]
    is_optional: bool


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a model of some architecture; `context_length` is the window that its file states."""

    architecture: Architecture
    n_layers: int
    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context_length: int

    @property
    def q_width(self) -> int:
        """Values of a token's query in one layer."""
        return self.head_dim * self.n_heads

    @property
    def kv_width(self) -> int:
        """Values of a token's key, and of its value, in one layer."""
        return self.head_dim * self.n_kv_heads

    def tensors(self) -> Iterator[ExpectedTensor]:
        """Every tensor that a model of this shape may have, first those outside the layers."""
        arch = self.architecture
        for layer in range(-1, self.n_layers):
            specs = arch.outer_tensors if layer < 0 else arch.layer_tensors
            source, name = ("", "") if layer < 0 else (f"{arch.source_layers}.{layer}.", f"blk.{layer}.")
            for spec in specs:
                shape = tuple(SIZES[word](self) for word in spec.shape)
                yield ExpectedTensor(source + spec.source, name + spec.name, layer, shape, spec.is_optional)

    def figures(self) -> dict[str, int]:
        """The figures by GGUF key, without the architecture's name, in the order of llama.cpp's converter."""
        return {figure.key: getattr(self, figure.field) for figure in FIGURES}


SIZES: Mapping[str, Callable[[ModelShape], int]] = MappingProxyType(
    {
        "vocab": lambda shape: shape.n_vocab,
        "hidden": lambda shape: shape.hidden,
        "intermediate": lambda shape: shape.intermediate,
        "q": lambda shape: shape.q_width,
        "kv": lambda shape: shape.kv_width,
        "head": lambda shape: shape.head_dim,
    }
)
"""The words that tell a tensor's rows and columns."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that every model states: its key in a GGUF and in config.json, its field in ModelShape."""

    key: str
    config_key: str
    field: str
    most: int


FIGURES = (
    Figure("block_count", "num_hidden_layers", "n_layers", MAX_LAYERS),
    Figure("context_length", "max_position_embeddings", "context_length", 1 << 30),
    Figure("embedding_length", "hidden_size", "hidden", 1 << 20),
    Figure("feed_forward_length", "intermediate_size", "intermediate", 1 << 22),
    Figure("attention.head_count", "num_attention_heads", "n_heads", 1 << 14),
    Figure("attention.head_count_kv", "num_key_value_heads", "n_kv_heads", 1 << 14),
)


def shape_of(
    architecture: Architecture, figures: Mapping[str, int], head_dim: int | None, n_vocab: int
) -> ModelShape:
    """The shape with these figures, by field of ModelShape. Raises ValueError when they disagree.

    Without a `head_dim`, llama.cpp divides the width of the model among its heads. It ends the process when
    the heads cannot be rotated because their size is odd.
    """
    hidden, n_heads, n_kv_heads = figures["hidden"], figures["n_heads"], figures["n_kv_heads"]
    if n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} attention heads do not divide among {n_kv_heads} key-value heads")
    size = hidden // n_heads if head_dim is None else head_dim
    is_free = architecture.states_head_dim and head_dim is not None
    if size < 2 or size % 2 or (not is_free and size * n_heads != hidden):
        raise ValueError(f"hidden size {hidden} is not {n_heads} heads of an even head_dim")
    return ModelShape(architecture=architecture, head_dim=size, n_vocab=n_vocab, **figures)
