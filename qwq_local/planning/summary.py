"""Plans and turns as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.events import Ledger, Planned, TurnStats
from qwq_local.planning.plan import Plan, Reduction
from qwq_local.text import binary_size


def plan_line(plan: Plan) -> str:
    """The plan on one line: context, scaling, KV type, place, budget, memory."""
    held = [
        f"{use.name} {binary_size(use.total)} of {binary_size(use.usable)}" for use in plan.uses if use.total
    ]
    parts = [f"context {plan.n_ctx:,}", _scaling(plan), f"{plan.kv_type} KV", _place(plan)]
    parts += [f"thinking {plan.thinking_budget:,}", ", ".join(held)]
    if plan.reductions:
        parts.append(f"given up: {', '.join(reduction_texts(plan))}")
    return " · ".join(part for part in parts if part)


def reduction_texts(plan: Plan) -> tuple[str, ...]:
    """What the plan reduces, in words."""
    n_left = plan.n_offloadable - plan.n_gpu_layers
    texts = {
        Reduction.KV_Q8: "f16 KV for q8_0",
        Reduction.THINKING: f"thinking of {plan.needs.thinking_budget:,} for {plan.thinking_budget:,}",
        Reduction.KV_Q4: "q8_0 KV for q4_0",
        Reduction.LAYERS: f"{n_left} of {plan.n_offloadable} GPU layers",
    }
    return tuple(texts[reduction] for reduction in plan.reductions)


def shortage_line(plan: Plan) -> str:
    """What the plan reduces because memory is short; empty when nothing."""
    if not plan.reductions:
        return ""
    return f"the memory is short, given up: {', '.join(reduction_texts(plan))}."


def scaling_line(plan: Plan) -> str:
    """That the window is stretched, and why; empty when it is not."""
    if not plan.rope.is_on:
        return ""
    return f"{_needed(plan)} need {_scaling(plan)}: a context of {plan.n_ctx:,}."


def switch_line(before: Plan, plan: Plan) -> str:
    """That the conversation continues with another scaling, and what that costs."""
    if not plan.rope.is_on:
        return f"{_needed(plan)} fit the native window again: YaRN is off, the prompt is read anew."
    verb = "outgrow" if plan.rope.factor > before.rope.factor else "need no more than"
    window = int(before.rope.factor * plan.rope.origin) if verb == "outgrow" else plan.n_ctx
    return f"{_needed(plan)} {verb} {window:,}: {_scaling(plan)} from here, the prompt is read anew."


def choice_rows(planned: Planned) -> Iterator[tuple[str, str]]:
    """The plan, one row for each choice: what it is about, and what was chosen."""
    yield (
        "context",
        f"{planned.n_ctx:,} tokens: prompt {planned.prompt_tokens:,}, "
        f"thinking {planned.thinking_budget:,}, answer {planned.answer_reserve:,}",
    )
    scaling = f"factor {planned.yarn_factor:g} over {planned.yarn_origin:,}"
    yield "YaRN", scaling if planned.yarn_factor > 1 else "off: it fits the native window"
    yield "KV cache", f"{planned.kv_type}, flash attention {'on' if planned.flash_attention else 'off'}"
    layers = f"{planned.n_gpu_layers} on the GPU" if planned.n_gpu_layers else "all on the CPU"
    yield "layers", f"{layers}; batches of {planned.n_batch}, {planned.n_ubatch} at once"
    if planned.reductions:
        yield "given up", ", ".join(planned.reductions)


def ledger_line(ledger: Ledger, n_ctx: int) -> str:
    """Who has the context, in tokens."""
    return (
        f"context {n_ctx:,} tok: system {ledger.system:,} + files {ledger.files:,} + history "
        f"{ledger.history:,} + prompt {ledger.prompt:,} + free {ledger.free:,} · thinking spared "
        f"{ledger.thinking_dropped:,}"
    )


def stats_line(stats: TurnStats) -> str:
    """The figures of a turn on one line."""
    return (
        f"prompt {stats.prompt_tokens:,} tok ({stats.cached_tokens:,} cached) in {stats.prefill_s:.2f} s, "
        f"{stats.prefill_rate:.1f} tok/s · thinking {stats.thinking_tokens:,} + answer "
        f"{stats.answer_tokens:,} tok in {stats.decode_s:.2f} s, {stats.decode_rate:.1f} tok/s"
    )


def _needed(plan: Plan) -> str:
    needed = plan.needs.prompt_tokens + plan.thinking_budget + plan.answer_reserve
    return f"{needed:,} tokens of prompt, thinking and answer"


def _scaling(plan: Plan) -> str:
    if not plan.rope.is_on:
        return ""
    name = "YaRN" if plan.rope.kind == "yarn" else "linear scaling"
    return f"{name} {plan.rope.factor:g} over {plan.rope.origin:,}"


def _place(plan: Plan) -> str:
    if not plan.has_gpu:
        return "on the CPU"
    place = f"{plan.n_gpu_layers} of {plan.n_offloadable} layers on the GPU"
    split = plan.placement.split
    return f"{place}s ({'+'.join(map(str, split))})" if len(split) > 1 else place
