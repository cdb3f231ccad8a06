"""A Hugging Face checkpoint: its documents, the headers of its tensors and their bytes.

`Checkpoint` is the seam between the pipeline and the place that weights come from. A checkpoint that arrives
over the network implements the same members.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from qwq_convert.disk import identity_of
from qwq_convert.safetensors import Shard, SourceTensor
from qwq_convert.strict_json import Fields, parse_object, shown
from qwq_local.errors import ConvertError

INDEX = "model.safetensors.index.json"
MAX_DOCUMENT_BYTES = 256 * 1024**2
MAX_FILE_NAME_BYTES = 255
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")


class Checkpoint(Protocol):
    """The interface of a source of weights. Names of documents are bare file names."""

    @property
    def label(self) -> str | None:
        """The repository id (owner/name) or the folder's name; None when there is no useful name."""

    @property
    def identity(self) -> str:
        """A text that differs for other weights. A conversion resumes only with the same one."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, from headers alone."""

    def document(self, name: str) -> bytes | None:
        """The content of a small file such as config.json; None when it does not exist."""

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of a tensor from its byte `start`; several threads may call it at once."""


class CheckpointFolder:
    """A checkpoint in a local folder or in a snapshot of the Hugging Face cache."""

    def __init__(self, folder: Path) -> None:
        """Open every shard and read the headers. Raises ConvertError when one is missing or damaged."""
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "no such file or folder"
            raise ConvertError(f"{folder}: {what}. Give the folder that holds config.json, or a float GGUF.")
        self._folder = folder
        self.label = label_of(folder)
        self._open_files = ExitStack()
        try:
            self._shards, self.tensors = self._open_shards()
        except BaseException:
            self._open_files.close()
            raise

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    @property
    def identity(self) -> str:
        """A digest of the shards' names, sizes and times."""
        return identity_of(self._shards.values())

    def document(self, name: str) -> bytes | None:
        """The content of the file `name`; None when it does not exist."""
        path = self._folder / name
        try:
            if not path.is_file():
                return None
            if (n_bytes := path.stat().st_size) > MAX_DOCUMENT_BYTES:
                raise ConvertError(f"{name}: has {n_bytes} bytes, too many for such a file.")
            return path.read_bytes()
        except OSError as error:
            raise ConvertError(f"{name}: cannot be read ({error.strerror}).") from None

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of `tensor` from its byte `start`."""
        return self._shards[tensor.shard].read(n_bytes, tensor.place(start, n_bytes))

    def _open_shards(self) -> tuple[dict[str, Shard], dict[str, SourceTensor]]:
        index = self._read_index()
        names = self._shard_names(index)
        missing = [name for name in names if not (self._folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ConvertError(f"{self._folder}: {missing[0]}{more} missing. Download the missing files.")
        shards = {name: self._open_files.enter_context(Shard(self._folder / name)) for name in names}
        tensors: dict[str, SourceTensor] = {}
        for tensor in (tensor for shard in shards.values() for tensor in shard.tensors):
            if tensor.name in tensors:
                first = tensors[tensor.name].shard
                place = f"{tensor.shard}: {shown(tensor.name)}"
                raise ConvertError(f"{place} is in {first} too. Remove the file that is not part of it.")
            tensors[tensor.name] = tensor
        if index is not None:
            _check_index(index, tensors)
        return shards, tensors

    def _read_index(self) -> Fields | None:
        content = self.document(INDEX)
        if content is None:
            return None
        weight_map = parse_object(content, INDEX).optional_object("weight_map")
        if weight_map is None or not weight_map.values:
            raise ConvertError(f"{INDEX}: weight_map is missing. Download the file again.")
        return weight_map

    def _shard_names(self, index: Fields | None) -> list[str]:
        if index is not None:
            return sorted({_bare_name(index, tensor) for tensor in index.values})
        names = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if not names:
            raise ConvertError(f"{self._folder}: no *.safetensors file. Download the checkpoint's weights.")
        if len(names) > 1 and "model.safetensors" not in names:
            raise ConvertError(f"{self._folder}: {INDEX} is missing for {len(names)} shards. Download it.")
        return names if len(names) == 1 else ["model.safetensors"]


def label_of(folder: Path) -> str | None:
    """The repository id (owner/name) of a cache snapshot, else the folder's name, unless it is a hash."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return None if COMMIT_HASH.fullmatch(folder.name) else folder.name or None


def required_document(checkpoint: Checkpoint, name: str) -> Fields:
    """The fields of a JSON document. Raises ConvertError when it does not exist."""
    content = checkpoint.document(name)
    if content is None:
        raise ConvertError(f"{name}: missing from {checkpoint.label or 'the checkpoint'}. Download it.")
    return parse_object(content, name)


def optional_document(checkpoint: Checkpoint, name: str) -> Fields:
    """The fields of a JSON document; none when it does not exist."""
    content = checkpoint.document(name)
    return Fields(name, {}) if content is None else parse_object(content, name)


def _bare_name(index: Fields, tensor: str) -> str:
    name = index.optional_text(tensor) or ""
    # An index must not reach outside its folder.
    is_path = name in ("", ".", "..") or any(sign in name for sign in "/\\\0:")
    if is_path or len(name.encode()) > MAX_FILE_NAME_BYTES:
        index.fail(f"{shown(tensor)} points to {shown(name)}, which is no file name. Download it again.")
    return name


def _check_index(index: Fields, tensors: Mapping[str, SourceTensor]) -> None:
    for name, tensor in tensors.items():
        if index.values.get(name) != tensor.shard:
            raise ConvertError(f"{INDEX}: does not place {shown(name)} in {tensor.shard}. Download it again.")
    lost = [name for name in index.values if name not in tensors]
    if lost:
        raise ConvertError(f"{index.values[lost[0]]}: {shown(lost[0])} is missing. Download the file again.")
