"""A file type's name in, the quantization type of every tensor out: llama-quantize's rules as tables.

Follows llama.cpp's src/llama-quant.cpp (`llama_ftype_get_default_type`, `tensor_allows_quantization`,
`tensor_type_fallback`). Knows names and row lengths, never data.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGMLQuantizationType as QuantType
from gguf import LlamaFileType

from qwq_convert import ggml
from qwq_local.errors import ConvertError


@dataclass(frozen=True, slots=True)
class FileType:
    """What a user asks for: its name, its number in the GGUF, and the type most tensors get."""

    name: str
    number: LlamaFileType
    default: QuantType


FILE_TYPES = {
    file_type.name: file_type
    for file_type in (
        FileType("F32", LlamaFileType.ALL_F32, QuantType.F32),
        FileType("F16", LlamaFileType.MOSTLY_F16, QuantType.F16),
        FileType("BF16", LlamaFileType.MOSTLY_BF16, QuantType.BF16),
        FileType("Q8_0", LlamaFileType.MOSTLY_Q8_0, QuantType.Q8_0),
    )
}


def find_file_type(name: str) -> FileType:
    """The file type called `name`, in any case; ConvertError lists the known ones."""
    file_type = FILE_TYPES.get(name.upper())
    if file_type is None:
        raise ConvertError(f"file type {name!r} is unknown. Choose from {', '.join(FILE_TYPES)}.")
    return file_type


def tensor_type(name: str, shape: tuple[int, ...], file_type: FileType) -> QuantType:
    """The type that the tensor `name` has in a file of `file_type`."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return QuantType.F32
    return _fitting(file_type.default, shape[-1])


def _fitting(wanted: QuantType, n_per_row: int) -> QuantType:
    # A row must be whole blocks; what fits no smaller block type becomes F16.
    return wanted if n_per_row % ggml.block_size(wanted) == 0 else QuantType.F16
