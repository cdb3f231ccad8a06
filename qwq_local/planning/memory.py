"""The devices of a computer, and what each of them holds of a model, in bytes.

llama.cpp puts the last layers on the GPUs, in order, and the output after them. The embedding stays with the
CPU, as do the layers that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from qwq_local.planning.shape import ContextShape, ModelSizes, kv_layer_bytes


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
    """A computer: `available_bytes` of its memory are free; `gpus` in the order in which they get layers.

    `is_unified`: GPUs use the same memory. `is_described`: it was read from a file, it is not this computer.
    """

    name: str
    gpus: tuple[Device, ...]
    memory_bytes: int
    available_bytes: int
    cores: int
    is_unified: bool = False
    is_described: bool = False

    def capped(self, limits: tuple[int, ...]) -> Machine:
        """The same machine with limits on its free bytes: one for each GPU, the system's memory last."""
        gpus = tuple(
            replace(gpu, free_bytes=min(gpu.free_bytes, limit))
            for gpu, limit in zip(self.gpus, limits[:-1], strict=True)
        )
        return replace(self, gpus=gpus, available_bytes=min(self.available_bytes, limits[-1]))


@dataclass(frozen=True, slots=True)
class Placement:
    """A context and the layers that each GPU gets; the output counts as one, after the last layer."""

    context: ContextShape
    split: tuple[int, ...] = ()

    @property
    def n_gpu_layers(self) -> int:
        """Layers on all GPUs together."""
        return sum(self.split)


ComputeBytes = Callable[[Placement], tuple[int, ...]]
"""The compute buffers of a placement: one figure for each GPU, the CPU's last."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device holds, in bytes, and what of its memory may be used."""

    name: str
    weights: int
    kv_cache: int
    compute: int
    usable: int

    @property
    def total(self) -> int:
        """All that is held."""
        return self.weights + self.kv_cache + self.compute

    @property
    def free(self) -> int:
        """The bytes that are left; negative when it does not fit."""
        return self.usable - self.total


@dataclass(frozen=True, slots=True)
class Target:
    """A model and the machine that it runs on; `reserve_bytes` of each device stay free."""

    model: ModelSizes
    machine: Machine
    compute: ComputeBytes
    reserve_bytes: int = 0


def device_uses(target: Target, placement: Placement) -> tuple[DeviceUse, ...]:
    """What every device holds under a placement: the GPUs in their order, then the CPU."""
    model, machine = target.model, target.machine
    compute = target.compute(placement)
    kv = kv_layer_bytes(model.shape, placement.context)
    parts = (*model.layer_bytes, model.output_bytes + model.tied_bytes)

    def use(name: str, held: range, buffer: int, free_bytes: int) -> DeviceUse:
        layers = sum(i < len(model.layer_bytes) for i in held)
        usable = max(0, free_bytes - target.reserve_bytes)
        return DeviceUse(name, sum(parts[i] for i in held), layers * kv, buffer, usable)

    first = len(parts) - placement.n_gpu_layers
    cpu = use("CPU", range(first), compute[-1], machine.available_bytes)
    # On the CPU a tied output is the embedding itself.
    again = 0 if placement.n_gpu_layers else model.tied_bytes
    uses = []
    for gpu, count, buffer in zip(machine.gpus, placement.split, compute[:-1], strict=True):
        uses.append(use(gpu.name, range(first, first + count), buffer, gpu.free_bytes))
        first += count
    return (*uses, replace(cpu, weights=cpu.weights + model.input_bytes - again))


def fits(target: Target, uses: tuple[DeviceUse, ...]) -> bool:
    """Whether every device has what it is to hold; unified memory must hold the sum as well."""
    if any(use.free < 0 for use in uses):
        return False
    return not target.machine.is_unified or sum(use.total for use in uses) <= uses[-1].usable


def split_layers(target: Target, context: ContextShape, n_gpu_layers: int) -> tuple[int, ...] | None:
    """The layers of each GPU, in proportion to what it can hold; None when together they cannot."""
    n_gpus = len(target.machine.gpus)
    if n_gpus <= 1 or not n_gpu_layers:
        return (n_gpu_layers,) * n_gpus
    room = _room(target, context, n_gpu_layers)
    if sum(room) < n_gpu_layers:
        return None
    split = [n_gpu_layers * taken // sum(room) for taken in room]
    for index in sorted(range(n_gpus), key=lambda i: split[i] - room[i]):
        split[index] += min(room[index] - split[index], n_gpu_layers - sum(split))
    return tuple(split)


def _room(target: Target, context: ContextShape, n_gpu_layers: int) -> list[int]:
    """How many layers each GPU could take, filled one after the other beside its compute buffer."""
    model, machine = target.model, target.machine
    each, more = divmod(n_gpu_layers, len(machine.gpus))
    even = tuple(each + (i < more) for i in range(len(machine.gpus)))
    compute = target.compute(Placement(context, even))
    kv = kv_layer_bytes(model.shape, context)
    # The largest layer stands for all: it is not known yet which ones a GPU gets.
    layer = max(model.layer_bytes) + kv
    buffers = zip(machine.gpus, compute[:-1], strict=True)
    spare = [gpu.free_bytes - target.reserve_bytes - buffer for gpu, buffer in buffers]
    room = [max(0, left // layer) for left in spare]
    # The last GPU holds the output besides.
    output = model.output_bytes + model.tied_bytes
    room[-1] = (spare[-1] - output) // layer + 1 if spare[-1] >= output else 0
    return room
