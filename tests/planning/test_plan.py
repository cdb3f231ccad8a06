"""The plan: its reductions and their order, as properties, and its texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_local.errors import DoesNotFit
from qwq_local.models.architecture import QWQ_32B
from qwq_local.planning.alternatives import plan_or_explain
from qwq_local.planning.compute import described_compute
from qwq_local.planning.memory import Device, DeviceKind, Machine, Placement, Target, device_uses, fits
from qwq_local.planning.plan import Choices, NothingFits, Plan, Reduction, Request, make_plan
from qwq_local.planning.shape import ContextShape, ModelSizes
from qwq_local.planning.summary import plan_line, scaling_line, shortage_line
from qwq_local.planning.window import Needs, RopeScaling, Window, share_window
from qwq_local.text import GIB

SHAPE = QWQ_32B
WINDOW = Window(native=32_768, factors=(1, 2, 4), origin=32_768)
ORDER = list(Reduction)


def qwq(gib: float = 18.48, file_type: str = "Q4_K_M") -> ModelSizes:
    """QwQ-32B in a file of that size; embedding and output as they are in Q4_K_M."""
    embedding, output = 437_944_320, 638_668_800
    layer = (int(gib * GIB) - embedding - output) // 64
    return ModelSizes(SHAPE, (layer,) * 64, embedding, output, file_type=file_type)


def machine(*gpus_gib: float, memory_gib: float = 64, unified: bool = False) -> Machine:
    devices = tuple(
        Device(f"GPU{i}", "card", DeviceKind.GPU, int(gib * GIB), int(gib * GIB))
        for i, gib in enumerate(gpus_gib)
    )
    memory = int(memory_gib * GIB)
    return Machine("test", devices, memory, memory, cores=8, is_unified=unified)


def request(needs: Needs, where: Machine, model: ModelSizes | None = None, **choices: object) -> Request:
    model = model or qwq()
    target = Target(model, where, described_compute(model, where), reserve_bytes=GIB // 2)
    return Request(needs, WINDOW, target, Choices(**choices))  # type: ignore[arg-type]


def planned(asked: Request) -> Plan | NothingFits:
    try:
        return make_plan(asked)
    except NothingFits as failed:
        return failed


USUAL = Needs(1_000, 16_384, 4_096)


def test_with_enough_memory_nothing_is_reduced() -> None:
    plan = make_plan(request(USUAL, machine(32)))
    assert (plan.kv_type, plan.n_gpu_layers, plan.thinking_budget) == ("f16", 65, 16_384)
    assert (plan.n_ctx, plan.rope, plan.reductions) == (21_760, RopeScaling(), ())
    assert shortage_line(plan) == scaling_line(plan) == ""


@pytest.mark.parametrize(
    ("gib", "reductions", "kv_type", "layers", "budget"),
    [
        (26.0, (), "f16", 65, 16_384),
        (23.5, (Reduction.KV_Q8,), "q8_0", 65, 16_384),
        (21.0, (Reduction.KV_Q8, Reduction.THINKING), "q8_0", 65, 11_520),
        (19.7, (Reduction.KV_Q8, Reduction.THINKING, Reduction.KV_Q4), "q4_0", 65, 8_704),
        (12.0, tuple(Reduction), "q4_0", 40, 2_048),
    ],
)
def test_the_order_of_reductions(
    gib: float, reductions: tuple[Reduction, ...], kv_type: str, layers: int, budget: int
) -> None:
    """As the card gets smaller: KV type, thinking, KV type again, layers. The line names each."""
    plan = make_plan(request(USUAL, machine(gib)))
    assert (plan.reductions, plan.kv_type) == (reductions, kv_type)
    assert abs(plan.n_gpu_layers - layers) <= 2
    assert abs(plan.thinking_budget - budget) <= 1_024
    words = ("f16 KV for q8_0", "thinking of 16,384 for", "q8_0 KV for q4_0", "of 65 GPU layers")
    for reduction in Reduction:
        for line in (plan_line(plan), shortage_line(plan)):
            assert (words[ORDER.index(reduction)] in line) == (reduction in reductions), line
            assert "\n" not in line


MACHINES = st.builds(
    lambda gpus, memory, unified: machine(*gpus, memory_gib=memory, unified=unified),
    st.lists(st.floats(0.5, 40), max_size=3),
    st.floats(1, 80),
    st.booleans(),
)
NEEDS = st.builds(
    Needs, st.integers(0, 100_000), st.integers(0, 30_000), st.integers(1, 8_000), takes_largest=st.booleans()
)
FILES = st.sampled_from([qwq(), qwq(8.0), qwq(32.42, "Q8_0")])


@settings(max_examples=60)
@given(MACHINES, NEEDS, FILES)
def test_no_plan_takes_more_than_the_available_memory(
    where: Machine, needs: Needs, model: ModelSizes
) -> None:
    asked = request(needs, where, model)
    plan = planned(asked)
    if isinstance(plan, NothingFits):
        assert not fits(asked.target, plan.least.uses)
        return
    assert fits(asked.target, plan.uses)
    assert plan.uses == device_uses(asked.target, plan.placement)
    assert sum(use.weights for use in plan.uses) == model.total_bytes
    assert plan.n_gpu_layers == sum(plan.placement.split) <= 65
    assert needs.prompt_tokens + plan.thinking_budget + plan.answer_reserve <= plan.n_ctx


def could_be_had(asked: Request, kv_type: str, budget: int, n_gpu_layers: int) -> bool:
    """Whether these values fit with any split, found without the tested search."""
    shares = share_window(replace(asked.needs, thinking_budget=budget), asked.window)
    context = ContextShape(shares.n_ctx, 512, 512, kv_type, kv_type)
    gpus = len(asked.target.machine.gpus)
    splits = [(n_gpu_layers,)] if gpus == 1 else [()]
    return any(fits(asked.target, device_uses(asked.target, Placement(context, split))) for split in splits)


@settings(max_examples=60)
@given(st.floats(4, 40), NEEDS.map(lambda needs: replace(needs, takes_largest=False)), FILES)
def test_no_reduction_is_larger_than_needed(gib: float, needs: Needs, model: ModelSizes) -> None:
    """Each reduction was needed: without it, and with all that comes before it, nothing fits."""
    asked = request(needs, machine(gib), model)
    try:
        plan = make_plan(asked)
    except NothingFits:
        return
    full = share_window(needs, WINDOW).thinking_budget
    floor = min(2_048, full)
    if plan.reductions:
        assert not could_be_had(asked, "f16", full, 65)
    if Reduction.THINKING in plan.reductions:
        assert not could_be_had(asked, "q8_0", full, 65)
    if Reduction.KV_Q4 in plan.reductions:
        assert not could_be_had(asked, "q8_0", floor, plan.n_gpu_layers)
    if Reduction.LAYERS in plan.reductions:
        assert not could_be_had(asked, "q4_0", floor, 65)
        assert not could_be_had(asked, "q4_0", floor, plan.n_gpu_layers + 1)
    assert list(plan.reductions) == sorted(plan.reductions, key=ORDER.index)


def worth(plan: Plan) -> tuple[float, ...]:
    """Larger is better, in the order of the reductions."""
    kv = ("q4_0", "q8_0", "f16").index(plan.kv_type)
    return (plan.n_gpu_layers, min(kv, 1), plan.thinking_budget, kv)


@settings(max_examples=40)
@given(st.floats(4, 40), st.floats(0, 8), NEEDS.map(lambda needs: replace(needs, takes_largest=False)))
def test_more_memory_never_makes_a_worse_plan(gib: float, more: float, needs: Needs) -> None:
    try:
        small = make_plan(request(needs, machine(gib)))
    except NothingFits:
        return
    assert worth(make_plan(request(needs, machine(gib + more)))) >= worth(small)


def test_a_plan_keeps_the_users_settings() -> None:
    plan = make_plan(request(USUAL, machine(24), kv_type="q5_1", n_gpu_layers=30, n_batch=256, n_ubatch=64))
    assert (plan.kv_type, plan.n_gpu_layers, plan.reductions) == ("q5_1", 30, ())
    assert (plan.placement.context.n_batch, plan.placement.context.n_ubatch) == (256, 64)
    with pytest.raises(NothingFits):
        make_plan(request(USUAL, machine(12), n_gpu_layers=-1))


def test_without_flash_attention_the_cache_is_not_quantized() -> None:
    plan = make_plan(request(Needs(100, 4_096, 512), machine(24), flash_attention=False))
    assert (plan.kv_type, plan.placement.context.flash_attention) == ("f16", False)


def test_two_cards_share_the_layers_in_proportion_and_hold_them() -> None:
    even = make_plan(request(USUAL, machine(16, 16)))
    assert sum(even.placement.split) == 65
    assert abs(even.placement.split[0] - even.placement.split[1]) <= 3
    uneven = make_plan(request(USUAL, machine(24, 8)))
    assert uneven.placement.split[0] > 2 * uneven.placement.split[1] > 0


def test_a_card_may_hold_what_the_processors_memory_alone_could_not() -> None:
    plan = make_plan(request(USUAL, machine(24, memory_gib=16), qwq(32.42, "Q8_0")))
    assert 0 < plan.n_gpu_layers < 65
    with pytest.raises(NothingFits):
        make_plan(request(USUAL, machine(memory_gib=16), qwq(32.42, "Q8_0")))


def test_unified_memory_is_counted_once() -> None:
    make_plan(request(USUAL, machine(24, memory_gib=26, unified=True)))
    with pytest.raises(NothingFits):
        make_plan(request(USUAL, machine(24, memory_gib=19, unified=True)))


def test_a_roomy_plan_takes_the_largest_native_context_that_fits() -> None:
    roomy = replace(USUAL, takes_largest=True)
    assert make_plan(request(roomy, machine(80))).n_ctx == 32_768
    plan = make_plan(request(roomy, machine(23.5)))
    assert (plan.kv_type, plan.reductions) == ("q8_0", (Reduction.KV_Q8,))
    assert 21_760 < plan.n_ctx <= 32_768
    assert plan.n_ctx == 32_768 or plan.uses[0].free < 256 * 64 * 2176 + (1 << 20)


def test_the_plan_says_why_yarn_is_on() -> None:
    plan = make_plan(request(Needs(40_000, 16_384, 4_096), machine(80)))
    assert (plan.rope, plan.n_ctx) == (RopeScaling(2, 32_768), 60_672)
    assert "YaRN 2 over 32,768" in plan_line(plan)
    assert scaling_line(plan) == (
        "60,480 tokens of prompt, thinking and answer need YaRN 2 over 32,768: a context of 60,672."
    )


def offers_of(asked: Request) -> tuple[str, list[str]]:
    with pytest.raises(DoesNotFit) as refused:
        plan_or_explain(asked)
    message, _, offered = str(refused.value).partition(" What would fit: ")
    assert "\n" not in offered
    return message, [offer.split(") ", 1)[1] for offer in offered.rstrip(".").split("; ")]


def test_a_plan_that_never_fits_is_refused_with_the_three_nearest_alternatives() -> None:
    message, offers = offers_of(request(USUAL, machine(memory_gib=16), qwq(32.42, "Q8_0")))
    assert "needs 33.1 GiB of CPU memory (weights 32.4 GiB, KV 0.5 GiB, compute 0.2 GiB)" in message
    assert "15.5 GiB may be used" in message
    assert offers == [
        "Q3_K_S (about 13.4 GiB)",
        "17.6 GiB more free CPU memory",
        "Q3_K_M and 42.3 MiB more free CPU memory",
    ]


def test_settings_that_prevent_a_plan_are_the_nearest_alternatives() -> None:
    _, offers = offers_of(request(USUAL, machine(20), kv_type="f32", n_gpu_layers=-1))
    assert offers[:2] == ["--set kv_type=auto", "--set n_gpu_layers=auto"]
    needs = replace(USUAL, n_ctx=131_072)
    _, offers = offers_of(request(needs, machine(memory_gib=22)))
    assert offers[0].startswith("--set n_ctx=")
    n_ctx = int(offers[0].removeprefix("--set n_ctx="))
    make_plan(request(replace(needs, n_ctx=n_ctx), machine(memory_gib=22)))
    with pytest.raises(NothingFits):
        make_plan(request(replace(needs, n_ctx=n_ctx + 256), machine(memory_gib=22)))


def test_a_shorter_prompt_is_offered_and_fits() -> None:
    _, offers = offers_of(request(Needs(60_000, 16_384, 4_096), machine(memory_gib=22)))
    prompt = int(offers[0].split(" tokens")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert 0 < prompt < 60_000
    make_plan(request(Needs(prompt, 16_384, 4_096), machine(memory_gib=22)))
