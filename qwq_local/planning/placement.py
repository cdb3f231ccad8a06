"""What goes where: layers on devices, and what each device then holds in bytes.

llama.cpp puts the last layers on the GPUs, in order, the output after them; the embedding stays with the CPU,
as do the layers that are left. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwq_local.planning.devices import Machine
from qwq_local.planning.shape import ContextShape, ModelSizes, kv_layer_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """A context and the layers that each GPU gets; the output counts as one, after the last layer."""

    context: ContextShape
    split: tuple[int, ...] = ()

    @property
    def n_gpu_layers(self) -> int:
        """Layers on all GPUs together."""
        return sum(self.split)


ComputeBytes = Callable[[Layout], tuple[int, ...]]
"""Gives the compute buffers of a layout: one figure per GPU, the CPU's last."""


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
        """What is left; negative when it does not fit."""
        return self.usable - self.total


@dataclass(frozen=True, slots=True)
class Demand:
    """What asks for memory, and what offers it: `reserve_bytes` of every device are kept free."""

    model: ModelSizes
    machine: Machine
    compute: ComputeBytes
    reserve_bytes: int = 0


def device_uses(demand: Demand, layout: Layout) -> tuple[DeviceUse, ...]:
    """What every device holds under a layout: the GPUs in their order, then the CPU."""
    model, machine = demand.model, demand.machine
    compute = demand.compute(layout)
    kv = kv_layer_bytes(model.shape, layout.context)
    parts = (*model.layer_bytes, model.output_bytes + model.tied_bytes)
    first = len(parts) - layout.n_gpu_layers
    uses = []
    for gpu, count, buffer in zip(machine.gpus, layout.split, compute[:-1], strict=True):
        mine = range(first, first + count)
        weights = sum(parts[i] for i in mine)
        layers = sum(i < len(model.layer_bytes) for i in mine)
        usable = max(0, gpu.free_bytes - demand.reserve_bytes)
        uses.append(DeviceUse(gpu.name, weights, layers * kv, buffer, usable))
        first += count
    left = range(len(parts) - layout.n_gpu_layers)
    weights = model.input_bytes + sum(parts[i] for i in left)
    # On the CPU a tied output is the embedding itself.
    weights -= model.tied_bytes if len(left) == len(parts) else 0
    layers = sum(i < len(model.layer_bytes) for i in left)
    usable = max(0, machine.available_bytes - demand.reserve_bytes)
    return (*uses, DeviceUse("CPU", weights, layers * kv, compute[-1], usable))


def fits(demand: Demand, uses: tuple[DeviceUse, ...]) -> bool:
    """Whether every device has what it is to hold; unified memory must hold the sum as well."""
    if any(use.free < 0 for use in uses):
        return False
    return not demand.machine.is_unified or sum(use.total for use in uses) <= uses[-1].usable


def split_layers(demand: Demand, context: ContextShape, n_gpu_layers: int) -> tuple[int, ...] | None:
    """How many of the layers each GPU gets, in proportion to what it can take; None when they cannot.

    With one GPU there is nothing to decide.
    """
    n_gpus = len(demand.machine.gpus)
    if n_gpus <= 1 or not n_gpu_layers:
        return (n_gpu_layers,) * n_gpus
    room = _room(demand, context, n_gpu_layers)
    if sum(room) < n_gpu_layers:
        return None
    split = [n_gpu_layers * taken // sum(room) for taken in room]
    for index in sorted(range(n_gpus), key=lambda i: split[i] - room[i]):
        split[index] += min(room[index] - split[index], n_gpu_layers - sum(split))
    return tuple(split)


def _room(demand: Demand, context: ContextShape, n_gpu_layers: int) -> list[int]:
    """How many layers each GPU could take, filled one after the other beside its compute buffer."""
    model, machine = demand.model, demand.machine
    even = tuple(
        n_gpu_layers // len(machine.gpus) + (i < n_gpu_layers % len(machine.gpus))
        for i in range(len(machine.gpus))
    )
    compute = demand.compute(Layout(context, even))
    kv = kv_layer_bytes(model.shape, context)
    # The largest layer stands for all: which ones a GPU gets is not known yet.
    layer = max(model.layer_bytes) + kv
    aside = demand.reserve_bytes
    spare = [gpu.free_bytes - aside - buffer for gpu, buffer in zip(machine.gpus, compute[:-1], strict=True)]
    room = [max(0, left // layer) for left in spare]
    # The last GPU holds the output besides.
    output = model.output_bytes + model.tied_bytes
    room[-1] = (spare[-1] - output) // layer + 1 if spare[-1] >= output else 0
    return room
