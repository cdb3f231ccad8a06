"""A checkpoint that records reads, and a wait for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.safetensors import SourceTensor


class WatchedCheckpoint:
    """A source of weights that is not a folder; it records its reads in order."""

    def __init__(self, inner: CheckpointFolder) -> None:
        self.reads: list[str] = []
        self._inner = inner

    @property
    def label(self) -> str | None:
        return self._inner.label

    @property
    def identity(self) -> str:
        return self._inner.identity

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        return self._inner.tensors

    def document(self, name: str) -> bytes | None:
        return self._inner.document(name)

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        self.reads.append(tensor.name)
        return self._inner.read(tensor, start, n_bytes)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; fail after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
