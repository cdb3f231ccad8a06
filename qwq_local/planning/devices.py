"""What a computer offers to a plan: its devices with their memory. Values only; machine/ finds them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class DeviceKind(StrEnum):
    """What a device is to ggml."""

    CPU = "cpu"
    GPU = "gpu"
    INTEGRATED = "integrated"  # a GPU that computes in the system's memory
    ACCELERATOR = "accelerator"  # helps the CPU; holds nothing of its own
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Device:
    """One device: ggml's name for it (CUDA0), the maker's, and its memory in bytes."""

    name: str
    description: str
    kind: DeviceKind
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """A computer: `available_bytes` of its memory can be had; `gpus` in the order in which they get layers.

    `is_unified`: what a GPU takes is taken from the same memory. `is_described`: read from a file, not found.
    """

    name: str
    gpus: tuple[Device, ...]
    memory_bytes: int
    available_bytes: int
    cores: int
    is_unified: bool = False
    is_described: bool = False

    def capped(self, limits: tuple[int, ...]) -> Machine:
        """The same machine with at most so many bytes free: one limit per GPU, the system's memory last."""
        gpus = tuple(
            replace(gpu, free_bytes=min(gpu.free_bytes, limit))
            for gpu, limit in zip(self.gpus, limits[:-1], strict=True)
        )
        return replace(self, gpus=gpus, available_bytes=min(self.available_bytes, limits[-1]))
