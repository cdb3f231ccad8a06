"""The progress line, on terminals of several sizes and without one."""

from __future__ import annotations

import io

import pytest

from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import WorkLine
from qwq_local.terminal.sanitizer import cell_width
from tests.terminal.fake_terminal import Clock, Terminal

TOTAL = 1_000_000_000
LABEL = "blk.12.ffn_down.weight"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(line: WorkLine, clock: Clock, until: float, rate: float = 50e6, done: int = 0) -> int:
    """Run the work at a rate in bytes per second, with ten updates a second. Returns how much is done."""
    while clock.now < until - 1e-9:
        clock.now += 0.1
        done += int(rate / 10)
        line.update(LABEL, done)
    return done


def test_the_line_has_name_bar_share_rate_and_time_left(clock: Clock) -> None:
    terminal = Terminal()
    run(WorkLine(terminal.output(), TOTAL, clock), clock, 110)
    assert terminal.lines() == [f"{LABEL} {'█' * 12}{'░' * 12} · 50 % · 50.0 MB/s · 10 s left"[:79]]


@pytest.mark.parametrize("columns", [1, 2, 10, 20, 30, 40, 50, 60, 79, 80, 120, 200])
def test_the_line_is_never_wider_than_the_window(columns: int, clock: Clock) -> None:
    """First the bar disappears, then the name; the figures stay as long as they fit."""
    terminal = Terminal(columns, 24)
    run(WorkLine(terminal.output(), TOTAL, clock), clock, 105)
    lines = terminal.lines()
    assert len(lines) <= 1
    (shown,) = lines or [""]
    assert cell_width(shown) < columns
    assert ("25 % · 50.0 MB/s · 15 s left" in shown) == (columns >= 30)
    assert ("░" in shown) == (columns >= 62)


def test_a_window_made_narrower_gets_a_line_that_fits(clock: Clock) -> None:
    terminal = Terminal(200, 50)
    line = WorkLine(terminal.output(), TOTAL, clock)
    done = run(line, clock, 101)
    terminal.resize(40, 50)
    run(line, clock, 102, done=done)
    assert all(cell_width(text) < 40 for text in terminal.lines())


def test_the_line_comes_after_a_moment_and_ten_times_a_second_at_most(clock: Clock) -> None:
    terminal = Terminal()
    line = WorkLine(terminal.output(), TOTAL, clock)
    line.update(LABEL, 1)
    assert terminal.written == ""
    for _ in range(2000):
        clock.now += 0.001
        line.update(LABEL, 10**6)
    assert 0 < terminal.writes <= 18


def test_an_erased_line_is_gone_and_comes_back(clock: Clock) -> None:
    terminal = Terminal()
    line = WorkLine(terminal.output(), TOTAL, clock)
    done = run(line, clock, 102)
    line.erase()
    assert terminal.lines() == []
    run(line, clock, 103, done=done)
    assert len(terminal.lines()) == 1


def test_the_rate_is_that_of_the_last_seconds(clock: Clock) -> None:
    """A slow type after a fast one: the time left follows the current rate."""
    terminal = Terminal(120)
    line = WorkLine(terminal.output(), TOTAL, clock)
    done = run(line, clock, 105, rate=100e6)
    assert "100.0 MB/s · 5 s left" in terminal.lines()[-1]
    run(line, clock, 135, rate=2e6, done=done)
    assert "2.0 MB/s · 3m39s left" in terminal.lines()[-1]


def test_bytes_from_before_do_not_count_in_the_rate(clock: Clock) -> None:
    terminal = Terminal(120)
    line = WorkLine(terminal.output(), TOTAL, clock, done=TOTAL // 2)
    run(line, clock, 102, rate=10e6, done=TOTAL // 2)
    assert "52 % · 10.0 MB/s · 48 s left" in terminal.lines()[-1]


def test_a_hundred_percent_is_shown_only_at_the_end(clock: Clock) -> None:
    terminal = Terminal(120)
    line = WorkLine(terminal.output(), TOTAL, clock)
    clock.now += 10
    line.update(LABEL, TOTAL - 1)
    assert " 99 % " in terminal.lines()[-1]
    clock.now += 10
    line.update(LABEL, TOTAL)
    assert "░" not in terminal.lines()[-1]
    assert " 100 % " in terminal.lines()[-1]


def test_work_that_stalls_or_is_empty_has_no_rate(clock: Clock) -> None:
    terminal = Terminal(120)
    line = WorkLine(terminal.output(), 0, clock)
    clock.now += 10
    line.update(LABEL, 0)
    assert terminal.lines()[-1].endswith(" · 0 %")


def test_a_name_from_outside_cannot_write_to_the_terminal(clock: Clock) -> None:
    terminal = Terminal(120)
    clock_line = WorkLine(terminal.output(), TOTAL, clock)
    clock.now += 10
    clock_line.update("\x1b[2J\x1b]0;title\x07blk\nnext\r", 1)
    assert "\x1b[2J" not in terminal.written
    assert "\x07" not in terminal.written
    assert len(terminal.lines()) == 1


def test_without_a_terminal_a_plain_line_comes_every_half_minute(clock: Clock) -> None:
    stream = io.StringIO()
    line = WorkLine(Output(stream), TOTAL, clock)
    done = run(line, clock, 129.9, rate=5e6)
    assert stream.getvalue() == ""
    run(line, clock, 200, rate=5e6, done=done)
    first, second, third = stream.getvalue().splitlines()
    assert first == f"{LABEL} · 15 % · 5.0 MB/s · 2m49s left"
    assert (second.split(" · ")[1], third.split(" · ")[1]) == ("30 %", "45 %")
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_a_terminal_that_cannot_draw_over_gets_plain_lines(clock: Clock) -> None:
    terminal = Terminal()
    run(WorkLine(terminal.output(is_dumb=True), TOTAL, clock), clock, 165, rate=5e6)
    assert len(terminal.lines()) == 2
    assert "\x1b" not in terminal.written
