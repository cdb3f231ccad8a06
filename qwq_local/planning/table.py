"""Context against KV type: a request in, what each combination would take and whether it fits, out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from qwq_local.planning.plan import KV_PREFERENCE, NothingFits, Request, make_plan
from qwq_local.planning.shape import can_store
from qwq_local.planning.window import Wish

_SMALLEST = 8  # an eighth of the native window


class Fit(StrEnum):
    """Whether a combination can be had."""

    FITS = "fits"  # with every layer where it computes fastest
    PARTLY = "partly"  # with some layers left to the CPU
    NOT = "not"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: its bytes on all devices together, and the layers that GPUs would hold."""

    kv_type: str
    fit: Fit
    total_bytes: int
    n_gpu_layers: int


@dataclass(frozen=True, slots=True)
class Row:
    """One context in tokens, the YaRN factor it takes, and a cell for each KV type."""

    n_ctx: int
    yarn_factor: float
    cells: tuple[Cell, ...]


def context_table(request: Request) -> tuple[Row, ...]:
    """Rows from an eighth of the native window up to the largest window, each twice the one before."""
    window = request.window
    n_ctx = max(256, window.native // _SMALLEST)
    rows = []
    while n_ctx <= window.largest:
        cells = tuple(_cell(request, n_ctx, kv_type) for kv_type in _kv_types(request))
        rows.append(Row(n_ctx, window.factor_for(n_ctx), cells))
        n_ctx *= 2
    return tuple(rows)


def _kv_types(request: Request) -> tuple[str, ...]:
    asked = request.choices.kv_type
    shape = request.demand.model.shape
    preferred = tuple(kv_type for kv_type in KV_PREFERENCE if can_store(shape, kv_type))
    return preferred if asked is None or asked in preferred else (*preferred, asked)


def _cell(request: Request, n_ctx: int, kv_type: str) -> Cell:
    wish = Wish(prompt_tokens=0, thinking_budget=0, answer_reserve=1, n_ctx=n_ctx)
    tried = replace(request, wish=wish, choices=replace(request.choices, kv_type=kv_type))
    try:
        plan = make_plan(tried)
    except NothingFits as failed:
        total = sum(use.total for use in failed.least.uses)
        return Cell(kv_type, Fit.NOT, total, failed.least.n_gpu_layers)
    is_whole = not plan.has_gpu or plan.n_gpu_layers == plan.n_offloadable
    total = sum(use.total for use in plan.uses)
    return Cell(kv_type, Fit.FITS if is_whole else Fit.PARTLY, total, plan.n_gpu_layers)
