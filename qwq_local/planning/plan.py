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
    RopeScaling,
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


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided, and the bytes that each device will hold (`uses`)."""

    needs: Needs
    shares: Shares
    placement: Placement
    uses: tuple[DeviceUse, ...]
    reductions: tuple[Reduction, ...]
    n_offloadable: int
    has_gpu: bool

    @property
    def n_ctx(self) -> int:
        """The context in tokens."""
        return self.shares.n_ctx

    @property
    def thinking_budget(self) -> int:
        """Tokens for the thinking."""
        return self.shares.thinking_budget

    @property
    def answer_reserve(self) -> int:
        """Tokens kept for the answer while it thinks."""
        return self.shares.answer_reserve

    @property
    def rope(self) -> RopeScaling:
        """The rope scaling."""
        return self.shares.rope

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
    return search.enlarged(found) if request.needs.takes_largest else found


def with_context(request: Request, plan: Plan, n_ctx: int) -> Plan | None:
    """The same plan with another context and the layers where they are; None when it does not fit."""
    context = replace(plan.placement.context, n_ctx=n_ctx)
    placement = replace(plan.placement, context=context)
    uses = device_uses(request.target, placement)
    if not fits(request.target, uses):
        return None
    return replace(plan, shares=replace(plan.shares, n_ctx=n_ctx), placement=placement, uses=uses)


@dataclass(frozen=True, slots=True)
class _Step:
    """One step down: a KV type, whether the thinking budget may shrink, and what is reduced by then."""

    kv_type: str
    shrinks: bool
    reductions: tuple[Reduction, ...]


class _Search:
    """Searches the least reduction that fits, for a number of GPU layers."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._shape = request.target.model.shape
        # Raises before it looks at memory when the tokens do not fit the window.
        self._full = share_window(request.needs, request.window)

    def all_layers(self) -> int:
        """The layers that can be on GPUs, or as many as the user asked for."""
        if not self._request.target.machine.gpus:
            return 0
        most = self._request.target.model.n_offloadable
        wanted = self._request.choices.n_gpu_layers
        return most if wanted is None or wanted < 0 else min(wanted, most)

    def on_layers(self, n_layers: int) -> Plan | None:
        """The plan that reduces least with this many layers on GPUs, None when none fits."""
        for step in self._steps():
            if not step.shrinks:
                found = self._tried(self._full, step, n_layers)
            else:
                found = self._with_largest_budget(step, n_layers)
            if found is not None:
                return found
        return None

    def gpus_hold(self, n_layers: int) -> bool:
        """Whether the GPUs can hold this many layers when everything else is reduced."""
        placement = self._placement(self._smallest(), self._last_step(), n_layers)
        if placement is None:
            return False
        return all(use.free >= 0 for use in device_uses(self._request.target, placement)[:-1])

    def least(self) -> Plan:
        """The least demanding plan, whether it fits or not."""
        n_layers = self.all_layers()
        if self._request.choices.n_gpu_layers is None:
            n_layers = largest(n_layers, self.gpus_hold) or 0
        return self._planned(self._smallest(), self._last_step(), n_layers)

    def enlarged(self, plan: Plan) -> Plan:
        """The same plan with the largest native context that fits without further reduction."""
        native = self._request.window.native
        if plan.rope.is_on or self._request.needs.n_ctx is not None or plan.n_ctx >= native:
            return plan

        def with_more(n_granules: int) -> Plan | None:
            return with_context(self._request, plan, plan.n_ctx + n_granules * GRANULE)

        most = (native - plan.n_ctx) // GRANULE
        count = largest(most, lambda n: with_more(n) is not None)
        return (with_more(count) if count else None) or plan

    def _steps(self) -> Iterator[_Step]:
        reductions: tuple[Reduction, ...] = ()
        shrinks = self._request.needs.n_ctx is None
        for kv_type in self._kv_types():
            if kv_type == "q4_0" and self._request.choices.kv_type is None:
                reductions = (*reductions, Reduction.KV_Q4)
            elif kv_type == "q8_0" and self._request.choices.kv_type is None:
                reductions = (*reductions, Reduction.KV_Q8)
            yield _Step(kv_type, False, reductions)
            # The budget shrinks before q4_0 is tried, and after q8_0 where that is possible.
            if shrinks and (kv_type != "f16" or len(self._kv_types()) == 1):
                yield _Step(kv_type, True, reductions)

    def _last_step(self) -> _Step:
        return list(self._steps())[-1]

    def _kv_types(self) -> tuple[str, ...]:
        choices = self._request.choices
        if choices.kv_type is not None:
            return (choices.kv_type,)
        if choices.flash_attention is False:
            return ("f16",)
        return tuple(kv_type for kv_type in KV_PREFERENCE if can_store(self._shape, kv_type))

    def _smallest(self) -> Shares:
        """The shares with the thinking at its floor."""
        needs, window = self._request.needs, self._request.window
        return share_window(replace(needs, thinking_budget=thinking_floor(needs, window)), window)

    def _with_largest_budget(self, step: _Step, n_layers: int) -> Plan | None:
        needs, window = self._request.needs, self._request.window
        floor = thinking_floor(needs, window)
        steps = (self._full.thinking_budget - floor) // GRANULE

        def with_steps(count: int) -> Plan | None:
            shares = share_window(replace(needs, thinking_budget=floor + count * GRANULE), window)
            return self._tried(shares, step, n_layers)

        count = largest(steps, lambda n: with_steps(n) is not None)
        return with_steps(count) if count is not None else None

    def _tried(self, shares: Shares, step: _Step, n_layers: int) -> Plan | None:
        placement = self._placement(shares, step, n_layers)
        if placement is None:
            return None
        plan = self._at(shares, step, placement)
        return plan if fits(self._request.target, plan.uses) else None

    def _planned(self, shares: Shares, step: _Step, n_layers: int) -> Plan:
        gpus = len(self._request.target.machine.gpus)
        placement = self._placement(shares, step, n_layers)
        if placement is None:
            # This only serves the message: all layers on the first GPU.
            placement = Placement(self._context(shares, step), (n_layers, *(0,) * (gpus - 1)))
        return self._at(shares, step, placement)

    def _at(self, shares: Shares, step: _Step, placement: Placement) -> Plan:
        target = self._request.target
        reductions = step.reductions
        if shares.thinking_budget < self._full.thinking_budget:
            reductions = tuple(sorted({*reductions, Reduction.THINKING}, key=list(Reduction).index))
        return Plan(
            needs=self._request.needs,
            shares=shares,
            placement=placement,
            uses=device_uses(target, placement),
            reductions=reductions,
            n_offloadable=target.model.n_offloadable,
            has_gpu=bool(target.machine.gpus),
        )

    def _placement(self, shares: Shares, step: _Step, n_layers: int) -> Placement | None:
        context = self._context(shares, step)
        split = split_layers(self._request.target, context, n_layers)
        return Placement(context, split) if split is not None else None

    def _context(self, shares: Shares, step: _Step) -> ContextShape:
        choices = self._request.choices
        wanted = choices.flash_attention
        if wanted is None:
            # CPUs always can; CUDA has no kernel for smaller heads. A quantized V cache needs it.
            wanted = not self._request.target.machine.gpus or self._shape.head_dim >= _FLASH_HEAD_DIM
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
