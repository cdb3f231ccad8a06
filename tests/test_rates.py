"""How long passes take by rough rates: the weights' place decides, and what is asked is added up."""

from __future__ import annotations

import pytest

from qwq_local.events import DeviceBytes
from qwq_local.planning.rates import Rates, estimated_rates

GIB = 1 << 30
CPU, GPU = DeviceBytes("CPU", 0, 0, 0, 64 * GIB), DeviceBytes("GPU", 20 * GIB, 0, 0, 24 * GIB)


def test_a_model_of_32_billion_is_fast_on_a_card_and_slow_beside_it() -> None:
    """Within a factor of three of what such cards and such boards are known to do at Q4_K_M."""
    card = estimated_rates((GPU, CPU), 1000)
    board = estimated_rates((DeviceBytes("CPU", 20 * GIB, 0, 0, 64 * GIB),), 1000)

    assert 10 < card.decode < 100
    assert 300 < card.prefill < 3000
    assert 0.3 < board.decode < 3
    assert not card.is_measured


def test_layers_beside_the_card_take_most_of_the_time() -> None:
    half = (DeviceBytes("GPU", 10 * GIB, 0, 0, 24 * GIB), DeviceBytes("CPU", 10 * GIB, 0, 0, 64 * GIB))

    assert estimated_rates(half, 1000).decode < estimated_rates((GPU, CPU), 1000).decode / 5


def test_a_tiny_model_is_not_taken_for_infinitely_fast() -> None:
    assert estimated_rates((DeviceBytes("CPU", 1000, 0, 0, GIB),), 100).decode < 1000


def test_reading_and_writing_add_up() -> None:
    assert Rates(100.0, 10.0, 50.0).seconds(1000, 3) == pytest.approx(10 + 15)
