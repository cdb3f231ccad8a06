"""What the header of a model says: its sizes for a plan, its rope scaling, its tensors by type.

For a model that is not on this disk, `known_sizes` gives the sizes of QwQ-32B's files, and `Fit` estimates
how many tokens of context fit beside the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_convert.architecture import ModelShape

from qwq_local.errors import ConvertError, ModelFileError
from qwq_local.models.architecture import QWQ_32B, check_architecture, file_type
from qwq_local.models.header import Header, read_header
from qwq_local.planning.shape import GRANULE, ModelSizes, kv_token_bytes
from qwq_local.planning.window import RopeScaling, Scaling
from qwq_local.text import GIB

if TYPE_CHECKING:
    from qwq_convert.model_config import NamedTensor

_EMBEDDING = "token_embd.weight"
_MAX_FACTOR = 64.0
COMPUTE_RESERVE_BYTES = int(0.8 * GIB)  # what llama.cpp took on a 24 GB card
MIN_CONTEXT = 16_384


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """What a header says. `tensors` is their number by type, `template_chars` the chat template's length."""

    name: str
    architecture: str
    shape: ModelShape
    template_chars: int
    tensors: Mapping[str, int]


def read_facts(path: Path) -> HeaderFacts:
    """The facts of a GGUF. Raises ModelFileError when qwq cannot run it."""
    header = read_header(path)
    shape = check_architecture(header)
    kinds = Counter(tensor.kind.name for tensor in header.tensors.values())
    return HeaderFacts(
        name=header.text("general.name"),
        architecture=header.text("general.architecture"),
        shape=shape,
        template_chars=len(header.text("tokenizer.chat_template")),
        tensors=dict(kinds.most_common()),
    )


def shape_or_reason(path: Path) -> ModelShape | str:
    """The shape of a GGUF, or the reason why qwq cannot run it: one bad file does not hide the others."""
    try:
        return read_facts(path).shape
    except ModelFileError as error:
        return str(error)


def model_sizes(header: Header, shape: ModelShape) -> ModelSizes:
    """The bytes of every layer, and of what comes before and after the layers, from the table of tensors."""
    layers = [0] * shape.n_layers
    input_bytes = output_bytes = 0
    for name, tensor in header.tensors.items():
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if first == "blk" and number.isdecimal() and int(number) < shape.n_layers:
            layers[int(number)] += tensor.n_bytes
        elif name == _EMBEDDING:
            input_bytes += tensor.n_bytes
        else:
            output_bytes += tensor.n_bytes
    tied = "output.weight" not in header.tensors
    return ModelSizes(
        shape=shape,
        layer_bytes=tuple(layers),
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        tied_bytes=header.tensors[_EMBEDDING].n_bytes if tied else 0,
        file_type=file_type(header),
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
    from qwq_convert.quant_types import NO_OPTIONS, choose_types

    try:
        wanted = find_file_type(wanted_type)
    except ConvertError:
        return None
    shape = QWQ_32B
    tensors = list(_tensors(shape))
    kinds = choose_types(tensors, wanted, shape, NO_OPTIONS, has_imatrix=False)
    layers = [0] * shape.n_layers
    input_bytes = output_bytes = 0
    for tensor, kind in zip(tensors, kinds, strict=True):
        n_bytes = tensor_bytes(kind, tensor.source.n_elements)
        if tensor.layer >= 0:
            layers[tensor.layer] += n_bytes
        elif tensor.name == _EMBEDDING:
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
    from qwq_convert.model_config import named_tensor
    from qwq_convert.safetensors import SourceTensor

    expected = [tensor for tensor in shape.tensors() if tensor.name != "output.bias"]
    for tensor in sorted(expected, key=lambda tensor: (tensor.layer, tensor.name)):
        yield named_tensor(tensor, SourceTensor(tensor.source, "BF16", tensor.shape, "", 0, 0))


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes that a model may take, and the name of that memory for the user."""

    free_bytes: int
    place: str


@dataclass(frozen=True, slots=True)
class Fit:
    """The memory for weights, KV cache and the reserve together, and the type of the KV cache.

    `native` is the trained window in tokens, `window` is the window with YaRN.
    """

    memory: Memory
    kv_type: str
    native: int
    window: int

    def context(self, weight_bytes: int, shape: ModelShape = QWQ_32B) -> int:
        """The tokens of context that fit beside the weights; 0 when the weights do not fit."""
        left = self.memory.free_bytes - weight_bytes - COMPUTE_RESERVE_BYTES
        tokens = left // kv_bytes_per_token(shape, self.kv_type)
        # QwQ's header states more than the trained window. One that states less is of a smaller model.
        window = self.window if shape.context_length >= self.native else shape.context_length
        return max(0, min(tokens, window) // GRANULE * GRANULE)


def kv_bytes_per_token(shape: ModelShape, kv_type: str) -> int:
    """The bytes of K and V in all layers for one token. `kv_type` as in a profile."""
    return shape.n_layers * kv_token_bytes(shape, kv_type, kv_type)
