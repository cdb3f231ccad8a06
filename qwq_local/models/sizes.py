"""A checked GGUF header in, what planning needs out: exact bytes, rope scaling keys, tensor kinds."""

from __future__ import annotations

from qwq_convert.architecture import ModelShape

from qwq_local.errors import ModelFileError
from qwq_local.models.architecture import file_type
from qwq_local.models.header import Header
from qwq_local.planning.shape import ModelSizes
from qwq_local.planning.window import RopeScaling, Scaling

_EMBEDDING = "token_embd.weight"
_MAX_FACTOR = 64.0


def model_sizes(header: Header, shape: ModelShape) -> ModelSizes:
    """The bytes of every layer and of what comes before and after them: the tensors', nothing estimated."""
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
    """The scaling that the file's own keys ask for; factor 1 when there are none.

    An origin of 0 means that the file does not say. Raises ModelFileError for a factor out of bounds.
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
    """ggml's number for the type of every tensor, and its shape with the rows first."""
    return {name: (int(tensor.kind), tensor.shape) for name, tensor in header.tensors.items()}
