"""The region at the bottom of an emulated screen: random frames against the expected rows."""

from __future__ import annotations

import random

import pytest

from qwq_local.terminal.layout import Row
from qwq_local.terminal.live_region import Cursor, Region
from tests.terminal.fake_terminal import Terminal

WORDS = ("", "a", "words", "中文", "wide 字 and narrow", "\x1b[2mdim\x1b[0m", "as long as the row is" * 3)


def row(draw: random.Random, columns: int) -> Row:
    plain = draw.choice(WORDS)
    if plain.startswith("\x1b"):
        return Row(plain, 3)
    cells = 0
    for end, character in enumerate(plain):
        cells += 2 if character in "中文字" else 1
        if cells > columns:
            return Row(plain[:end], cells)
    return Row(plain, cells)


def shown(row: Row) -> str:
    return row.written.replace("\x1b[2m", "").replace("\x1b[0m", "").rstrip()


def lines(terminal: Terminal) -> list[str]:
    # The emulator keeps an empty cell after each wide character.
    return [line.rstrip() for line in terminal.lines()]


@pytest.mark.parametrize("seed", range(40))
def test_any_frames_leave_the_final_rows_and_the_last_live_ones(seed: int) -> None:
    draw = random.Random(seed)
    terminal = Terminal(draw.choice([12, 40, 80]), draw.choice([6, 24]))
    region = Region(terminal.output())
    final: list[Row] = []
    for _ in range(60):
        if draw.random() < 0.1:
            terminal.resize(draw.choice([12, 33, 80]), terminal.rows)
        now = [row(draw, terminal.columns) for _ in range(draw.choice([0, 0, 0, 1, 9]))]
        rows = [row(draw, terminal.columns) for _ in range(draw.randint(1, terminal.rows))]
        cursor = Cursor(draw.randrange(terminal.columns), draw.randrange(len(rows)))
        if draw.random() < 0.1:
            terminal.write(region.erase())
        terminal.write(region.frame(now, rows, cursor))
        final += now
        bottom = lines(terminal)[len(final) :]
        assert bottom == [shown(row) for row in rows][: len(bottom)]
        assert not any(shown(row) for row in rows[len(bottom) :])
        assert terminal.screen.cursor.x == min(cursor.x, terminal.columns - 1)
    cut = [shown(row) for row in final]
    for line, whole in zip(lines(terminal), cut, strict=False):
        assert whole.startswith(line)  # a narrower window cuts its rows


def test_an_unchanged_frame_writes_nothing() -> None:
    terminal = Terminal()
    region = Region(terminal.output())
    rows = [Row("one", 3), Row("two", 3)]
    assert region.frame((), rows, Cursor(1, 1))
    assert region.frame((), rows, Cursor(1, 1)) == ""
    changed = region.frame((), [rows[0], Row("2", 1)], Cursor(1, 1))
    assert "one" not in changed


def test_a_region_higher_than_the_window_keeps_the_cursor_in_it() -> None:
    terminal = Terminal(20, 4)
    region = Region(terminal.output())
    rows = [Row(f"row {n}", 5) for n in range(9)]
    terminal.write(region.frame((), rows, Cursor(0, 2)))
    assert terminal.lines() == ["row 2", "row 3", "row 4", "row 5"]
    terminal.write(region.frame((), rows, Cursor(0, 8)))
    assert terminal.lines() == ["row 5", "row 6", "row 7", "row 8"]
