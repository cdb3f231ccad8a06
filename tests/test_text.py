"""Amounts as people write them."""

from __future__ import annotations

import pytest

from qwq_local.text import binary_size, decimal_size, duration, plural, time_left


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (104_857, "104,857 bytes"),
        (104_858, "0.10 MiB"),
        (2_938_432, "2.80 MiB"),
        (107_374_182, "102.40 MiB"),
        (107_374_183, "0.10 GiB"),
        (19_851_336_256, "18.49 GiB"),
        (65_527_752_704 * 2, "122.05 GiB"),
        (2**50, "1,048,576.00 GiB"),
    ],
)
def test_memory_is_counted_in_powers_of_1024(n_bytes: int, text: str) -> None:
    assert binary_size(n_bytes, 2) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(99_999, "99,999 bytes"), (5_078_000, "5.1 MB"), (100_000_000, "0.1 GB"), (19_851_336_256, "19.9 GB")],
)
def test_downloads_are_counted_in_powers_of_1000(n_bytes: int, text: str) -> None:
    assert decimal_size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "passed", "left"),
    [
        (0.4, "0s", "0 s"),
        (-1, "0s", "0 s"),
        (21.6, "21s", "22 s"),
        (59.6, "59s", "59s"),
        (72, "1m12s", "1m12s"),
        (7320, "2h02m", "2h02m"),
    ],
)
def test_times_are_short(seconds: float, passed: str, left: str) -> None:
    assert duration(seconds) == passed
    assert time_left(max(seconds, 0)) == left


@pytest.mark.parametrize(
    ("count", "noun", "text"), [(1, "turn", "1 turn"), (0, "turn", "0 turns"), (1234, "pass", "1,234 passes")]
)
def test_counts_agree_with_their_noun(count: int, noun: str, text: str) -> None:
    assert plural(count, noun) == text
