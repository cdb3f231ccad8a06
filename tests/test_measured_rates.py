"""How fast turns were is kept by what decides it, and makes the next estimate; damage is measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwq_local.backend.measured import FILE, MeasuredRates
from qwq_local.events import DeviceBytes, Finished, FinishReason, Planned, TurnStats

PLANNED = Planned(
    "QwQ 32B Q4_K_M", 32768, 3000, 16384, 4096, 1.0, "f16", 0, 7,
    devices=(DeviceBytes("CPU", 20_000_000_000, 0, 0, 10**11),),
)  # fmt: skip
STATS = TurnStats(prompt_tokens=3000, thinking_tokens=300, answer_tokens=100, prefill_s=30.0, decode_s=200.0)


def turn(stats: TurnStats = STATS, reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(reason, stats, "", "")


def kept(cache: Path, *turns: Finished, planned: Planned = PLANNED) -> MeasuredRates:
    """What another process finds after one had these turns."""
    rates = MeasuredRates(cache)
    for each in turns:
        assert list(rates.noted([planned, each], planned, 8)) == [planned, each]
    rates.save()
    return MeasuredRates(cache)


def test_a_later_process_finds_what_such_turns_took(tmp_path: Path) -> None:
    found = kept(tmp_path / "cache", turn()).of(replace(PLANNED, prompt_tokens=2500, seed=8), 8)

    assert found is not None
    assert (found.prefill, found.decode, found.written) == pytest.approx((100, 2, 400))
    assert found.is_measured
    assert found.seconds(6000, 2) == pytest.approx(60 + 400)


@pytest.mark.parametrize(
    "other",
    [
        {"kv_type": "q8_0"},
        {"n_gpu_layers": 10},
        {"model": "QwQ 32B Q8_0"},
        {"devices": (DeviceBytes("CPU", 30_000_000_000, 0, 0, 10**11),)},
        {"prompt_tokens": 100},
        {"prompt_tokens": 100_000},
    ],
)
def test_turns_of_another_kind_or_length_tell_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    rates = kept(tmp_path, turn())
    assert rates.of(replace(PLANNED, **other), 8) is None
    assert rates.of(PLANNED, 4) is None


def test_the_nearest_length_decides(tmp_path: Path) -> None:
    kept(tmp_path, turn())
    long = replace(STATS, prompt_tokens=9000, prefill_s=900.0)
    rates = kept(tmp_path, turn(long), planned=replace(PLANNED, prompt_tokens=9000))

    for prompt_tokens, prefill in ((3000, 100), (9000, 10), (6000, 10), (1500, 100)):
        found = rates.of(replace(PLANNED, prompt_tokens=prompt_tokens), 8)
        assert found is not None
        assert found.prefill == pytest.approx(prefill)


def test_later_turns_weigh_more_and_cached_or_stopped_ones_say_nothing_of_reading(tmp_path: Path) -> None:
    slower = replace(STATS, prefill_s=60.0)
    from_cache = replace(STATS, cached_tokens=2990, prefill_s=1.0)
    stopped = replace(STATS, prefill_s=9000.0, decode_s=9000.0)
    rates = kept(tmp_path, *[turn()] * 3, *[turn(slower)] * 20, *[turn(from_cache)] * 20)
    kept(tmp_path, turn(stopped, FinishReason.INTERRUPTED))

    found = rates.of(PLANNED, 8)
    assert found is not None
    assert found.prefill == pytest.approx(50, rel=0.1)
    assert found.decode == pytest.approx(2)


def test_private_turns_leave_nothing(tmp_path: Path) -> None:
    private = MeasuredRates(tmp_path / "cache", is_private=True)
    list(private.noted([turn()], PLANNED, 8))
    private.save()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "7",
        '{"format": 2, "rates": {}}',
        '{"format": 1, "rates": [1]}',
        '{"format": 1, "rates": {"KEY": [1, 2, 3]}}',
        '{"format": 1, "rates": {"KEY": [1, 2, 3, 4, "5"]}}',
        '{"format": 1, "rates": {"KEY": [1, 2, 3, 4, NaN]}}',
        '{"format": 1, "rates": {"KEY": [1, 2, 3, 4, 1e999]}}',
        '{"format": 1, "rates": {"KEY": [-1, 2, 3, 4, 5]}}',
        '{"format": 1, "rates": {"KEY": [0, 0, 3, 4, 5]}}',
    ],
)
def test_a_damaged_file_is_as_none_and_is_written_anew(tmp_path: Path, content: str) -> None:
    kept(tmp_path, turn())
    (key,) = json.loads((tmp_path / FILE).read_text())["rates"]
    (tmp_path / FILE).write_text(content.replace("KEY", key))

    assert MeasuredRates(tmp_path).of(PLANNED, 8) is None
    assert kept(tmp_path, turn()).of(PLANNED, 8) is not None


def test_the_file_stays_small_and_forgets_the_oldest(tmp_path: Path) -> None:
    rates = MeasuredRates(tmp_path)
    for n in range(700):
        list(rates.noted([turn()], replace(PLANNED, model=f"model {n}"), 8))
    rates.save()

    again = MeasuredRates(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 2**17
    assert again.of(replace(PLANNED, model="model 0"), 8) is None
    assert again.of(replace(PLANNED, model="model 699"), 8) is not None
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
