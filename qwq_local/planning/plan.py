"""The plan of a run: context, KV type, budgets and GPU layers, as a prompt needs and the memory allows.

When not everything fits, the plan reduces these, in this order and no more than needed:

    1  f16 KV cache              becomes q8_0
    2  the thinking budget       shrinks, to a sixteenth of the native window at least
    3  q8_0 KV cache             becomes q4_0
    4  layers on the GPU         become fewer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from qwq_local.errors import QwqError
from qwq_local.planning.memory import DeviceUse, Placement, Target, device_uses, fits, split_layers
from qwq_local.planning.shape import GRANULE, ContextShape, can_store, is_quantized, padded
from qwq_local.planning.window import (
    Needs,
    Shares,
    Window,
    share_window,
    thinking_floor,
)

KV_PREFERENCE = ("f16", "q8_0", "q4_0")
_FLASH_HEAD_DIM = 64


class Reduction(StrEnum):
    """What a plan reduces so that the rest fits, in this order."""

    KV_Q8 = "q8_0 KV"
    THINKING = "smaller thinking budget"
    KV_Q4 = "q4_0 KV"
    LAYERS = "fewer GPU layers"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user decides. None leaves it to the plan; -1 GPU layers means all of them."""

    kv_type: str | None = None
    n_gpu_layers: int | None = None
    flash_attention: bool | None = None
    n_batch: int = 512
    n_ubatch: int = 512


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that a plan depends on."""

    needs: Needs
    window: Window
    target: Target
    choices: Choices = Choices()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Shares):
    """What was decided, and the bytes that each device will hold (`uses`)."""

    needs: Needs
    placement: Placement
    uses: tuple[DeviceUse, ...]
    reductions: tuple[Reduction, ...]
    n_offloadable: int
    has_gpu: bool

    @property
    def kv_type(self) -> str:
        """The type of keys and values."""
        return self.placement.context.kv_type_k

    @property
    def n_gpu_layers(self) -> int:
        """Layers on GPUs, the output counted as one."""
        return self.placement.n_gpu_layers


class NothingFits(QwqError):
    """No plan fits. `least` is the least demanding one, for the message."""

    def __init__(self, least: Plan) -> None:
        super().__init__("no plan fits")
        self.least = least


def make_plan(request: Request) -> Plan:
    """The plan that reduces least. Raises NothingFits, PromptTooLong, UsageError."""
    search = _Search(request)
    all_layers = search.all_layers()
    found = search.on_layers(all_layers)
    if found is None and request.choices.n_gpu_layers is None:
        # With as many layers as the GPUs hold, the CPU has the least to hold.
        n_layers = largest(all_layers - 1, search.gpus_hold)
        found = search.on_layers(n_layers) if n_layers is not None else None
        if found is not None:
            found = replace(found, reductions=(*found.reductions, Reduction.LAYERS))
    if found is None:
        raise NothingFits(search.least())
    return _enlarged(request, found) if request.needs.takes_largest else found


def _enlarged(request: Request, plan: Plan) -> Plan:
    """The same plan with the largest native context that fits without further reduction."""
    native = request.window.native
    if plan.rope.is_on or request.needs.n_ctx is not None or plan.n_ctx >= native:
        return plan

    def with_more(n_granules: int) -> Plan | None:
        return with_context(request, plan, plan.n_ctx + n_granules * GRANULE)

    count = largest((native - plan.n_ctx) // GRANULE, lambda n: with_more(n) is not None)
    return with_more(count or 0) or plan


def with_context(request: Request, plan: Plan, n_ctx: int) -> Plan | None:
    """The same plan with another context and the layers where they are; None when it does not fit."""
    placement = replace(plan.placement, context=replace(plan.placement.context, n_ctx=n_ctx))
    uses = device_uses(request.target, placement)
    return replace(plan, n_ctx=n_ctx, placement=placement, uses=uses) if fits(request.target, uses) else None


@dataclass(frozen=True, slots=True)
class _Step:
    """One step down: a KV type, whether the thinking budget may shrink, and what is reduced by then."""

    kv_type: str
    shrinks: bool
    reductions: tuple[Reduction, ...]


class _Search:
    """Searches the least reduction that fits, for a number of GPU layers."""

    def __init__(self, request: Request) -> None:
        self._needs, self._window = request.needs, request.window
        self._target, self._choices = request.target, request.choices
        self._shape = request.target.model.shape
        # Raises before it looks at memory when the tokens do not fit the window.
        self._full = share_window(request.needs, request.window)
        self._floor = thinking_floor(request.needs, request.window)
        self._smallest = self._shares(self._floor)
        self._steps = tuple(self._each_step())

    def all_layers(self) -> int:
        """The layers that can be on GPUs, or as many as the user asked for."""
        if not self._target.machine.gpus:
            return 0
        most, wanted = self._target.model.n_offloadable, self._choices.n_gpu_layers
        return most if wanted is None or wanted < 0 else min(wanted, most)

    def on_layers(self, n_layers: int) -> Plan | None:
        """The plan that reduces least with this many layers on GPUs, None when none fits."""
        for step in self._steps:
            if not step.shrinks:
                found = self._fitting(self._full, step, n_layers)
            else:
                found = self._with_largest_budget(step, n_layers)
            if found is not None:
                return found
        return None

    def gpus_hold(self, n_layers: int) -> bool:
        """Whether the GPUs can hold this many layers when everything else is reduced."""
        plan = self._planned(self._smallest, self._steps[-1], n_layers)
        return plan is not None and all(use.free >= 0 for use in plan.uses[:-1])

    def least(self) -> Plan:
        """The least demanding plan, whether it fits or not."""
        n_layers = self.all_layers()
        if self._choices.n_gpu_layers is None:
            n_layers = largest(n_layers, self.gpus_hold) or 0
        shares, step = self._smallest, self._steps[-1]
        # All layers on the first GPU when they cannot be split; this only serves the message.
        first = (n_layers, *(0,) * (len(self._target.machine.gpus) - 1))
        return self._planned(shares, step, n_layers) or self._placed(shares, step, first)

    def _each_step(self) -> Iterator[_Step]:
        reductions: tuple[Reduction, ...] = ()
        reduction_of = {"q4_0": Reduction.KV_Q4, "q8_0": Reduction.KV_Q8}
        kv_types = self._kv_types()
        for kv_type in kv_types:
            if self._choices.kv_type is None and kv_type in reduction_of:
                reductions = (*reductions, reduction_of[kv_type])
            yield _Step(kv_type, False, reductions)
            # The budget shrinks before q4_0 is tried, and after q8_0 where that is possible.
            if self._needs.n_ctx is None and (kv_type != "f16" or len(kv_types) == 1):
                yield _Step(kv_type, True, reductions)

    def _kv_types(self) -> tuple[str, ...]:
        if self._choices.kv_type is not None:
            return (self._choices.kv_type,)
        if self._choices.flash_attention is False:
            return ("f16",)
        return tuple(kv_type for kv_type in KV_PREFERENCE if can_store(self._shape, kv_type))

    def _shares(self, thinking_budget: int) -> Shares:
        return share_window(replace(self._needs, thinking_budget=thinking_budget), self._window)

    def _with_largest_budget(self, step: _Step, n_layers: int) -> Plan | None:
        def with_steps(count: int) -> Plan | None:
            return self._fitting(self._shares(self._floor + count * GRANULE), step, n_layers)

        steps = (self._full.thinking_budget - self._floor) // GRANULE
        count = largest(steps, lambda n: with_steps(n) is not None)
        return with_steps(count) if count is not None else None

    def _fitting(self, shares: Shares, step: _Step, n_layers: int) -> Plan | None:
        plan = self._planned(shares, step, n_layers)
        return plan if plan is not None and fits(self._target, plan.uses) else None

    def _planned(self, shares: Shares, step: _Step, n_layers: int) -> Plan | None:
        split = split_layers(self._target, self._context(shares, step), n_layers)
        return None if split is None else self._placed(shares, step, split)

    def _placed(self, shares: Shares, step: _Step, split: tuple[int, ...]) -> Plan:
        placement = Placement(self._context(shares, step), split)
        reductions = step.reductions
        if shares.thinking_budget < self._full.thinking_budget:
            reductions = tuple(sorted({*reductions, Reduction.THINKING}, key=list(Reduction).index))
        return Plan(
            n_ctx=shares.n_ctx,
            thinking_budget=shares.thinking_budget,
            answer_reserve=shares.answer_reserve,
            rope=shares.rope,
            needs=self._needs,
            placement=placement,
            uses=device_uses(self._target, placement),
            reductions=reductions,
            n_offloadable=self._target.model.n_offloadable,
            has_gpu=bool(self._target.machine.gpus),
        )

    def _context(self, shares: Shares, step: _Step) -> ContextShape:
        choices = self._choices
        wanted = choices.flash_attention
        if wanted is None:
            # CPUs always can; CUDA has no kernel for smaller heads. A quantized V cache needs it.
            wanted = not self._target.machine.gpus or self._shape.head_dim >= _FLASH_HEAD_DIM
        flash = wanted or is_quantized(step.kv_type)
        n_batch = min(choices.n_batch, padded(shares.n_ctx))
        n_ubatch = min(choices.n_ubatch, n_batch)
        return ContextShape(shares.n_ctx, n_batch, n_ubatch, step.kv_type, step.kv_type, flash)


def largest(high: int, is_good: Callable[[int], bool]) -> int | None:
    """The largest good number from 0 to `high`, None if 0 is not good. Below a good one, all are good."""
    low = 0
    if high < low or not is_good(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if is_good(middle):
            low = middle
        else:
            high = middle - 1
    return low
