"""A plan in, the seconds its quantizing takes on this machine out, from one second of trying."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

from qwq_convert import ggml
from qwq_convert.plan import Plan
from qwq_convert.tensor_types import FLOAT_TYPES, QuantType

TRIAL_ELEMENTS = 2**14
SECONDS_IN_ALL = 1.0


def estimate_seconds(plan: Plan, threads: int) -> float:
    """How long quantizing takes on so many threads, each a core of its own; reading and writing apart."""
    amounts: Counter[QuantType] = Counter()
    for tensor in plan.tensors:
        if tensor.source.dtype != tensor.kind.name:
            amounts[tensor.kind] += tensor.source.n_elements
    budget_s = SECONDS_IN_ALL / max(1, len(amounts))
    core_seconds = sum(count * _seconds_per_element(kind, budget_s) for kind, count in amounts.items())
    return core_seconds / threads


def _seconds_per_element(kind: QuantType, budget_s: float) -> float:
    """Tried on normally distributed weights, as trained ones nearly are."""
    n_per_row = max(256, ggml.block_size(kind))
    rows = np.random.default_rng(0).normal(0, 0.02, TRIAL_ELEMENTS).astype(np.float32)
    importance = np.ones(n_per_row, dtype=np.float32)
    content = (rows.view(np.uint32) >> 16).astype("<u2").tobytes()
    ggml.quantize(rows, n_per_row, kind, importance)  # libggml makes its tables in the first call
    start, n_done = time.perf_counter(), 0
    while not n_done or time.perf_counter() - start < budget_s:
        widened = ggml.to_float(content, QuantType.BF16)
        quantized = ggml.quantize(widened, n_per_row, kind, None if kind in FLOAT_TYPES else importance)
        ggml.is_valid(quantized, kind)
        n_done += rows.size
    return (time.perf_counter() - start) / n_done
