"""Plans a conversion from headers and small documents alone: every file, key-value and type.

Nothing is written. A source that cannot become a sound GGUF is refused here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from qwq_convert import ggml
from qwq_convert.architecture import ModelShape
from qwq_convert.checkpoint import Checkpoint, CheckpointFolder, required_document
from qwq_convert.file_types import FILE_TYPES, FLOAT_TYPES, FileType, QuantType, find_file_type
from qwq_convert.gguf_source import GgufSource
from qwq_convert.imatrix.file import ImportanceMatrix, read_imatrix
from qwq_convert.key_values import KeyValues, Override, Yarn, finish, stretch
from qwq_convert.layout import PlannedFile, PlannedTensor, encode_header, lay_out, plan_files
from qwq_convert.metadata import build_key_values
from qwq_convert.model_config import NamedTensor, name_tensors, read_config
from qwq_convert.quant_types import NO_OPTIONS, TypeOptions, choose_types, needs_imatrix
from qwq_local.errors import ConvertError

Source = Checkpoint | GgufSource


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What to convert, to which type and where.

    `source` is a checkpoint folder or a float GGUF. `name` replaces the model's own name. `types` overrules
    the file type for single tensors. A new file begins where the tensors of one would exceed
    `split_max_bytes`. `threads` None means every core. A crash costs at most `record_every_s` seconds of
    work; smaller values sync the disk more often.
    """

    source: Path
    file_type: str
    out: Path
    name: str | None = None
    threads: int | None = None
    types: TypeOptions = NO_OPTIONS
    overrides: tuple[Override, ...] = ()
    yarn: Yarn | None = None
    imatrix: Path | None = None
    split_max_bytes: int | None = None
    allow_nonfinite: bool = False
    record_every_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Description:
    """A model as its source describes it; the tensors are in llama-quantize's order."""

    tensors: tuple[NamedTensor, ...]
    key_values: KeyValues
    shape: ModelShape


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """A whole conversion before its first byte. A later run resumes when its `fingerprint` is the same."""

    file_type: FileType
    files: tuple[PlannedFile, ...]
    importance: Mapping[str, ggml.Rows]
    unweighted: tuple[str, ...]
    fingerprint: str

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """The tensors of all files, in order."""
        return tuple(tensor for file in self.files for tensor in file.layout.tensors)

    @property
    def n_bytes(self) -> int:
        """The size of all files."""
        return sum(file.n_bytes for file in self.files)

    def bytes_of(self, names: Container[str] | None = None) -> int:
        """The size of the tensors with these names, or of all, without padding."""
        return sum(tensor.n_bytes for tensor in self.tensors if names is None or tensor.name in names)


@dataclass(frozen=True, slots=True)
class TypeSize:
    """The size of a source in a file type; `n_bytes` is None when its shapes do not allow the type.

    `bits_per_weight` counts the tensors alone, without the vocabulary.
    """

    name: str
    n_bytes: int | None
    bits_per_weight: float
    needs_imatrix: bool


def open_source(path: Path) -> CheckpointFolder | GgufSource:
    """The source at `path`, a folder or a GGUF, as a context manager. Raises ConvertError for others."""
    is_gguf = path.is_file() and path.suffix != ".safetensors"
    return GgufSource(path) if is_gguf else CheckpointFolder(path)


def describe(source: Source, name: str | None = None) -> Description:
    """Read and check what the source says about its model; `name` replaces the model's own."""
    if isinstance(source, GgufSource):
        return Description(source.named_tensors(), source.key_values(name), source.shape())
    config = read_config(required_document(source, "config.json"))
    tensors = name_tensors(source.tensors, config)
    n_parameters = sum(tensor.source.n_elements for tensor in tensors)
    key_values = build_key_values(source, config, n_parameters, name)
    return Description(tensors, key_values, config.shape)


def plan_conversion(source: Source, request: ConvertRequest) -> ConversionPlan:
    """Plan the conversion. Raises ConvertError, in one line, when it is impossible."""
    file_type = find_file_type(request.file_type)
    if not request.out.name:
        raise ConvertError(f"{request.out}: is a folder. Give the name of the file to write.")
    matrix, named = None, None
    if request.imatrix is not None:
        matrix = read_imatrix(request.imatrix)
        named = (request.imatrix.name, matrix)
    model = describe(source, request.name)
    kinds = choose_types(model.tensors, file_type, model.shape, request.types, matrix is not None)
    importance = {} if matrix is None else _importance(matrix, model.tensors)
    _check_importance(model.tensors, kinds, file_type, importance)

    key_values = model.key_values if request.yarn is None else stretch(model.key_values, request.yarn)
    finish(key_values, file_type, request.overrides, named)
    files = plan_files(request.out, lay_out(model.tensors, kinds, request.split_max_bytes), key_values)
    quantized = [t.name for t, kind in zip(model.tensors, kinds, strict=True) if kind not in FLOAT_TYPES]
    unweighted = tuple(name for name in quantized if matrix is not None and name not in importance)
    return ConversionPlan(file_type, files, importance, unweighted, _fingerprint(source, files, importance))


def sizes(model: Description) -> list[TypeSize]:
    """The model's size in every file type."""
    n_elements = sum(tensor.source.n_elements for tensor in model.tensors)
    # The header has the same length for every type: a type is a number.
    finish(model.key_values, FILE_TYPES["F32"], (), None)
    (floats,) = lay_out(model.tensors, [QuantType.F32] * len(model.tensors))
    header_bytes = len(encode_header(model.key_values, floats))
    rows = []
    for file_type in FILE_TYPES.values():
        try:
            kinds = choose_types(model.tensors, file_type, model.shape, NO_OPTIONS, has_imatrix=False)
        except ConvertError:
            rows.append(TypeSize(file_type.name, None, 0.0, needs_imatrix=False))
            continue
        n_bytes = lay_out(model.tensors, kinds)[0].n_bytes
        typed = zip(model.tensors, kinds, strict=True)
        needs = any(needs_imatrix(tensor.name, kind, file_type) for tensor, kind in typed)
        rows.append(TypeSize(file_type.name, header_bytes + n_bytes, 8 * n_bytes / n_elements, needs))
    return rows


def _importance(matrix: ImportanceMatrix, tensors: tuple[NamedTensor, ...]) -> dict[str, ggml.Rows]:
    """The importance of each tensor's columns. Raises ConvertError when the matrix is another model's."""
    names = {tensor.name for tensor in tensors}
    foreign = [name for name in matrix.sums if name not in names]
    if foreign:
        count = f"{len(foreign)} of {len(matrix.sums)} tensors"
        raise ConvertError(f"--imatrix: {count} are not part of this model, first {foreign[0][:60]}.")
    importance = {}
    for tensor in tensors:
        values = matrix.importance(tensor.name)
        if values is None:
            continue
        n_columns = tensor.source.shape[-1]
        if values.size != n_columns:
            raise ConvertError(
                f"--imatrix: {tensor.name} has {values.size} columns there and {n_columns} in the model. "
                "It belongs to another model."
            )
        if not np.isfinite(values).all():
            raise ConvertError(f"--imatrix: {tensor.name} holds values that are no numbers. Make it anew.")
        importance[tensor.name] = np.ascontiguousarray(values, dtype=np.float32)
    return importance


def _check_importance(
    tensors: tuple[NamedTensor, ...],
    kinds: list[QuantType],
    file_type: FileType,
    importance: Mapping[str, ggml.Rows],
) -> None:
    for tensor, kind in zip(tensors, kinds, strict=True):
        needed = needs_imatrix(tensor.name, kind, file_type) or ggml.requires_importance(kind)
        if needed and tensor.name not in importance:
            lack = "the one given lacks it" if importance else "none is given"
            raise ConvertError(
                f"{file_type.name}: {tensor.name} as {kind.name} needs an importance matrix, and {lack}. "
                "Make one with `qwq imatrix MODEL.gguf TEXT` and give it as --imatrix."
            )


def _fingerprint(source: Source, files: tuple[PlannedFile, ...], importance: Mapping[str, ggml.Rows]) -> str:
    digest = hashlib.sha256(source.identity.encode())
    # Another build of the library may round differently.
    digest.update(version("llama-cpp-python").encode())
    for file in files:
        digest.update(os.fsencode(file.path.name))
        digest.update(file.header)
    for name, values in importance.items():
        digest.update(name.encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
