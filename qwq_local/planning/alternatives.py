"""What else would fit: what to offer when no plan does, and a table of contexts against KV types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from types import MappingProxyType

from qwq_local.errors import DoesNotFit, PromptTooLong, UsageError
from qwq_local.planning.memory import DeviceUse
from qwq_local.planning.plan import KV_PREFERENCE, NothingFits, Plan, Request, largest, make_plan
from qwq_local.planning.shape import GRANULE, ModelSizes, can_store
from qwq_local.planning.window import Needs
from qwq_local.text import binary_size

_SMALLEST = 8  # an eighth of the native window
MOST = 3
# File type -> bits a weight, from the sizes of QwQ-32B's files; other models come close.
BITS: Mapping[str, float] = MappingProxyType(
    {
        "F32": 32.0,
        "BF16": 16.0,
        "F16": 16.0,
        "Q8_0": 8.5,
        "Q6_K": 6.56,
        "Q5_K_M": 5.69,
        "Q5_0": 5.53,
        "Q4_K_M": 4.85,
        "Q4_K_S": 4.59,
        "IQ4_XS": 4.32,
        "Q3_K_M": 3.89,
        "Q3_K_S": 3.51,
    }
)


def plan_or_explain(request: Request) -> Plan:
    """The plan. Raises DoesNotFit with the numbers and the three nearest alternatives."""
    try:
        return make_plan(request)
    except NothingFits as failed:
        offers = enumerate(islice(_offers(request, failed.least), MOST), 1)
        fitting = "; ".join(f"({number}) {offer}" for number, offer in offers)
        raise DoesNotFit(f"{_shortage(failed.least)} What would fit: {fitting}.") from None


def _shortage(least: Plan) -> str:
    short = _short_of(least.uses)
    parts = ", ".join(
        f"{what} {binary_size(n_bytes)}"
        for what, n_bytes in (("weights", short.weights), ("KV", short.kv_cache), ("compute", short.compute))
    )
    settings = f"{least.n_ctx:,} tokens, {least.kv_type} KV"
    return (
        f"does not fit: needs {binary_size(short.total)} of {short.name} memory ({parts}) for {settings}; "
        f"{binary_size(short.usable)} may be used."
    )


def _short_of(uses: tuple[DeviceUse, ...]) -> DeviceUse:
    """The device that lacks most; with unified memory, all of them as one."""
    short = min(uses, key=lambda use: use.free)
    if short.free < 0 or len(uses) == 1:
        return short
    return DeviceUse(
        name="unified",
        weights=sum(use.weights for use in uses),
        kv_cache=sum(use.kv_cache for use in uses),
        compute=sum(use.compute for use in uses),
        usable=uses[-1].usable,
    )


def _offers(request: Request, least: Plan) -> Iterator[str]:
    """Nearest first: fewer settings, a smaller context, a shorter prompt, smaller files, more memory."""
    choices, needs = request.choices, request.needs
    if choices.kv_type is not None and _works(replace(request, choices=replace(choices, kv_type=None))):
        yield "--set kv_type=auto"
    free_layers = replace(request, choices=replace(choices, n_gpu_layers=None))
    if choices.n_gpu_layers is not None and _works(free_layers):
        yield "--set n_gpu_layers=auto"
    if needs.n_ctx is not None:
        if n_ctx := _largest_fit(request, needs.n_ctx, lambda tokens: replace(needs, n_ctx=tokens)):
            yield f"--set n_ctx={n_ctx}"
    elif prompt := _largest_fit(
        request, needs.prompt_tokens, lambda tokens: replace(needs, prompt_tokens=tokens)
    ):
        yield f"a prompt of at most {prompt:,} tokens, not {needs.prompt_tokens:,}"
    too_large = []
    for file_type, model in _smaller_files(request.target.model):
        tried = replace(request, target=replace(request.target, model=model))
        try:
            make_plan(tried)
            yield f"{file_type} (about {binary_size(model.total_bytes)})"
        except NothingFits as failed:
            too_large.append(f"{file_type} and {_more(failed.least.uses)}")
    yield _more(least.uses)
    yield from reversed(too_large)


def _more(uses: tuple[DeviceUse, ...]) -> str:
    short = _short_of(uses)
    return f"{binary_size(-short.free)} more free {short.name} memory"


def _works(request: Request) -> bool:
    try:
        make_plan(request)
    except (NothingFits, PromptTooLong, UsageError):
        return False
    return True


def _largest_fit(request: Request, limit: int, needs_for: Callable[[int], Needs]) -> int:
    """The largest number of tokens up to the limit that fits, in whole granules; 0 is not tried."""

    def works(n_granules: int) -> bool:
        return not n_granules or _works(replace(request, needs=needs_for(n_granules * GRANULE)))

    return (largest(limit // GRANULE, works) or 0) * GRANULE


def _smaller_files(model: ModelSizes) -> Iterator[tuple[str, ModelSizes]]:
    """The model in each smaller file type, largest first, its bytes estimated from the bits of a weight."""
    bits = BITS.get(model.file_type, 0.0)
    for file_type, fewer in BITS.items():
        if fewer < bits:
            share = fewer / bits
            smaller = replace(
                model,
                layer_bytes=tuple(int(size * share) for size in model.layer_bytes),
                input_bytes=int(model.input_bytes * share),
                output_bytes=int(model.output_bytes * share),
                tied_bytes=int(model.tied_bytes * share),
                file_type=file_type,
            )
            yield file_type, smaller


class FitLevel(StrEnum):
    """Whether a combination fits."""

    FITS = "fits"  # with every layer where it computes fastest
    PARTLY = "partly"  # with some layers left to the CPU
    NOT = "not"


@dataclass(frozen=True, slots=True)
class TableCell:
    """One combination: its bytes on all devices together, and the layers that GPUs would hold."""

    kv_type: str
    fit: FitLevel
    total_bytes: int
    n_gpu_layers: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """One context in tokens, the YaRN factor it takes, and a cell for each KV type."""

    n_ctx: int
    yarn_factor: float
    cells: tuple[TableCell, ...]


def context_table(request: Request) -> tuple[TableRow, ...]:
    """Rows from an eighth of the native window up to the largest window, each twice the one before."""
    window, asked = request.window, request.choices.kv_type
    kv_types = [kv_type for kv_type in KV_PREFERENCE if can_store(request.target.model.shape, kv_type)]
    if asked is not None and asked not in kv_types:
        kv_types.append(asked)
    n_ctx = max(256, window.native // _SMALLEST)
    rows = []
    while n_ctx <= window.largest:
        cells = tuple(_cell(request, n_ctx, kv_type) for kv_type in kv_types)
        rows.append(TableRow(n_ctx, window.factor_for(n_ctx), cells))
        n_ctx *= 2
    return tuple(rows)


def _cell(request: Request, n_ctx: int, kv_type: str) -> TableCell:
    needs = Needs(prompt_tokens=0, thinking_budget=0, answer_reserve=1, n_ctx=n_ctx)
    tried = replace(request, needs=needs, choices=replace(request.choices, kv_type=kv_type))
    fit = FitLevel.FITS
    try:
        plan = make_plan(tried)
        if plan.has_gpu and plan.n_gpu_layers < plan.n_offloadable:
            fit = FitLevel.PARTLY
    except NothingFits as failed:
        plan, fit = failed.least, FitLevel.NOT
    return TableCell(kv_type, fit, sum(use.total for use in plan.uses), plan.n_gpu_layers)
