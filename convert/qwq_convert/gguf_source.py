"""A GGUF of 32- or 16-bit floats as the source of a conversion. The parts of a split model are read as one.

To the pipeline it looks like a checkpoint (`tensors` and `read`), with key-values in place of documents.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from gguf import GGUFValue, GGUFValueType, Keys

from qwq_convert.architecture import FIGURES, KEY_LENGTH, ModelShape, shape_of
from qwq_convert.architectures import find_architecture, supported
from qwq_convert.disk import InputFile, identity_of
from qwq_convert.file_types import FLOAT_TYPES, QuantType
from qwq_convert.gguf_file import GgufHeader, read_parts
from qwq_convert.key_values import KeyValues, split_keys
from qwq_convert.model_config import NamedTensor
from qwq_convert.safetensors import SourceTensor
from qwq_local.errors import ConvertError

_LAYER = re.compile(r"blk\.(\d{1,4})\.")


class GgufSource:
    """An open GGUF, or all parts of a split one; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the files and read the headers. Raises ConvertError for what cannot be converted."""
        self._path = path
        self._headers = read_parts(path)
        self._first = self._headers[0]
        name = self._first.get(Keys.General.ARCHITECTURE)
        architecture = find_architecture(name)
        if architecture is None:
            raise ConvertError(f"{path}: architecture {name!r} is not supported, only {supported()}.")
        self._architecture = architecture
        self.tensors = {tensor.name: tensor for header in self._headers for tensor in _sources(header)}
        if not self.tensors:
            raise ConvertError(f"{path}: holds no tensors. Use the GGUF with the weights, or the checkpoint.")
        with ExitStack() as opened:
            files = [opened.enter_context(InputFile(header.path)) for header in self._headers]
            self._open_files = opened.pop_all()
        self._files = {file.path.name: file for file in files}

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    @property
    def identity(self) -> str:
        """A digest of the files' names, sizes and times; it differs when a part was changed."""
        return identity_of(self._files.values())

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of `tensor` from its byte `start`; several threads may call it at once."""
        return self._files[tensor.shard].read(n_bytes, tensor.place(start, n_bytes))

    def named_tensors(self) -> tuple[NamedTensor, ...]:
        """The tensors in llama-quantize's order. Those that are not quantized keep their types."""
        named = [
            NamedTensor(name, int(m[1]) if (m := _LAYER.match(name)) else -1, source, QuantType[source.dtype])
            for name, source in self.tensors.items()
        ]
        return tuple(sorted(named, key=lambda tensor: (tensor.layer, tensor.name)))

    def shape(self) -> ModelShape:
        """The shape that the header states."""
        figures = {}
        for figure in FIGURES:
            key = self._architecture.key(figure.key)
            value = self._first.get(key)
            if not isinstance(value, int) or not 0 < value <= figure.most:
                raise ConvertError(f"{self._path}: {key} is {value!r}. Download it again.")
            figures[figure.field] = value
        stated = self._first.get(self._architecture.key(KEY_LENGTH))
        head_dim = stated if isinstance(stated, int) else None
        n_vocab = self._first.array_length(Keys.Tokenizer.LIST) or 0
        try:
            return shape_of(self._architecture, figures, head_dim, n_vocab)
        except ValueError as error:
            raise ConvertError(f"{self._path}: {error}.") from None

    def key_values(self, name: str | None) -> KeyValues:
        """Every key-value but those of the layout of its files; `name` replaces general.name."""
        header, values = self._first, KeyValues()
        for key in header.keys:
            # The new file has its own layout, with the format's default alignment.
            if key == Keys.General.ALIGNMENT or key in split_keys(0, 1, 0):
                continue
            kind, item = header.kinds(key)
            if item is not None and not header.array_length(key):
                raise ConvertError(
                    f"{self._path}: {key} is an empty list. Convert from the checkpoint instead."
                )
            values[key] = GGUFValue(header.value(key), kind, item)
        if name is not None:
            values[Keys.General.NAME] = GGUFValue(name, GGUFValueType.STRING)
        return values


def _sources(header: GgufHeader) -> list[SourceTensor]:
    sources = []
    for tensor in header.tensors:
        if tensor.kind not in FLOAT_TYPES:
            raise ConvertError(
                f"{header.path}: {tensor.name} is {tensor.kind.name} already, and quantizing twice loses "
                "much. Use the F32, F16 or BF16 GGUF, or the checkpoint."
            )
        start = header.data_start + tensor.offset
        sources.append(
            SourceTensor(tensor.name, tensor.kind.name, tensor.shape, header.path.name, start, tensor.n_bytes)
        )
    return sources
