"""A repository of weights as the converter's Checkpoint: headers at once, tensors as their shards arrive.

Names, shapes and documents come from the skeleton, bytes from the arriving shards, in the shards' order.
Which shards may go follows from the tensors that are finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping

from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.safetensors import SourceTensor

from qwq_local.hub.client import RemoteFile
from qwq_local.hub.shards import ArrivingShards, Headers


def headers_of(shards: Iterable[RemoteFile], skeleton: CheckpointFolder) -> Headers:
    """Each shard with its tensors, in the order in which a conversion reads them."""
    tensors: dict[str, set[SourceTensor]] = {}
    for tensor in skeleton.tensors.values():
        tensors.setdefault(tensor.shard, set()).add(tensor)
    return {shard: frozenset(tensors[shard.name]) for shard in shards if shard.name in tensors}


class RemoteCheckpoint:
    """The weights of one repository at one commit."""

    def __init__(
        self, repo: str, headers: Headers, skeleton: CheckpointFolder, arriving: ArrivingShards
    ) -> None:
        self._repo = repo
        self._headers = headers
        self._skeleton = skeleton
        self._arriving = arriving
        self._unreleased = {shard.name: {tensor.name for tensor in headers[shard]} for shard in headers}

    @property
    def label(self) -> str | None:
        """The repository id."""
        return self._repo

    @property
    def identity(self) -> str:
        """A digest of the shards' names and the hashes that the hub states for them."""
        states = "\n".join(f"{shard.name} {shard.content_hash.hexadecimal}" for shard in self._headers)
        return hashlib.sha256(states.encode()).hexdigest()

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor of every shard, by name."""
        return self._skeleton.tensors

    def document(self, name: str) -> bytes | None:
        """The content of the file `name`, or None when there is none."""
        return self._skeleton.document(name)

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of `tensor` from byte `start` of it, as soon as its shard is here."""
        return self._arriving.read(tensor.shard, tensor.place(start, n_bytes), n_bytes)

    def release_finished(self, finished: Container[str]) -> None:
        """Let go of every shard whose tensors, by their names in the checkpoint, are all finished."""
        for shard, names in list(self._unreleased.items()):
            if all(name in finished for name in names):
                del self._unreleased[shard]
                self._arriving.release(shard)
