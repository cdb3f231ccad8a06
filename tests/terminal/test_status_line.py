"""The status line in windows of any width, and the figures in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwq_local.chat.events import Asking, ChatStatus, ThinkView
from qwq_local.events import Answer, Generated, Loading, Planned, Prefill, Prompted, Thinking
from qwq_local.terminal.repl.status_line import Phase, StatusFigures, TokenCounter, status_rows
from qwq_local.terminal.sanitizer import cell_width
from tests.terminal.fake_terminal import Clock
from tests.terminal.turn_viewer import ASKING, CLOSED, FINISHED, PLANNED, Viewer

THINKING = StatusFigures(
    Phase.THINKING, 72.4, 2431, 16_384, 31.23, 4120, 32_768, 2.0, "QwQ-32B Q4_K_M", view="view"
)
IDLE = StatusFigures(
    used_tokens=4120,
    n_ctx=32_768,
    yarn_factor=2.0,
    model="QwQ-32B Q4_K_M",
    conversation="strawberries",
    attached=2,
    has_thought=True,
)


KEYS = "^T view ^G answer ^S steer ^C stop"


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (
            200,
            (
                "thinking 1m12s · 2,431/16,384 tok · 31.2 tok/s · ctx 4,120/32,768 · YaRN 2 · QwQ-32B Q4_K_M"
                f" · {KEYS}",
            ),
        ),
        (
            120,
            (
                "thinking 1m12s · 2,431/16,384 tok · 31.2 tok/s · ctx 4,120/32,768 · YaRN 2 · QwQ-32B Q4_K_M",
                KEYS,
            ),
        ),
        (80, ("thinking 1m12s · 2,431/16,384 · 31.2 tok/s · ctx 12% · YaRN 2 · QwQ-32B Q4_K_M", KEYS)),
        (60, ("thinking 1m12s · 2,431 tok · 31 tok/s · ctx 12% · QwQ-32B", KEYS)),
        (40, ("thinking 1m12s · 2,431 tok · 31 tok/s", KEYS)),
        (30, ("thinking 1m12s · 2,431 tok", "^T ^G answer ^S steer ^C stop")),
        (20, ("thinking 1m12s", "^T ^G answer ^S ^C")),
        (15, ("thinking 1m12s", "^T ^G ^S ^C")),
        (10, ("thinking…", "^T ^G ^C")),
    ],
)
def test_a_narrow_window_leaves_out_the_less_important_while_it_thinks(
    columns: int, rows: tuple[str, ...]
) -> None:
    assert status_rows(THINKING, columns, 24) == rows


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "thinking 1m12s · 2,431 tok · 31 tok/s · ctx 12% · QwQ-32B · ^T ^G ^S ^C"),
        (40, "thinking 1m12s · 2,431 tok · ^G ^C"),
        (20, "thinking 1m12s · ^C"),
    ],
)
def test_a_low_window_has_one_row_for_all_of_it(columns: int, line: str) -> None:
    assert status_rows(THINKING, columns, 11) == (line,)


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            120,
            "QwQ-32B Q4_K_M · ctx 4,120/32,768 · YaRN 2 · 2 files attached · strawberries · ^T thought /help",
        ),
        (80, "QwQ-32B Q4_K_M · ctx 4,120/32,768 · YaRN 2 · 2 files attached · /help"),
        (60, "QwQ-32B · ctx 12% · YaRN 2 · 2 files attached · /help"),
        (40, "QwQ-32B · ctx 12% · 2 files attached"),
        (30, "QwQ-32B · 2 files attached"),
        (20, "QwQ-32B · +2"),
    ],
)
def test_a_narrow_window_leaves_out_the_less_important_between_turns(columns: int, line: str) -> None:
    assert status_rows(IDLE, columns, 24) == (line,)


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        (StatusFigures(), "/help"),
        (StatusFigures(Phase.STARTING), "starting 0s · ^C stop"),
        (StatusFigures(Phase.LOADING, 3, model="QwQ-32B"), "loading 3s · QwQ-32B · ^C stop"),
        (
            replace(THINKING, phase=Phase.READING, tokens=0, budget=0, rate=0.0, yarn_factor=1.0),
            "reading 1m12s · ctx 4,120/32,768 · QwQ-32B Q4_K_M · ^C stop",
        ),
        (
            replace(THINKING, phase=Phase.ANSWERING, budget=0, rate=812.0, yarn_factor=1.0, model=""),
            "answering 1m12s · 2,431 tok · 812 tok/s · ctx 4,120/32,768 · ^C stop",
        ),
        (
            replace(THINKING, rate=0.34, n_ctx=0, model="", view="next off"),
            "thinking 1m12s · 2,431/16,384 tok · 0.3 tok/s · YaRN 2 · ^T next off ^G answer ^S steer ^C stop",
        ),
        (
            StatusFigures(model="m\x1b[2J", n_ctx=10, used_tokens=10, attached=1),
            "m · ctx 10/10 · 1 file attached · /help",
        ),
    ],
)
def test_each_phase_shows_the_known_figures(figures: StatusFigures, line: str) -> None:
    assert status_rows(figures, 200, 24) == (line,)


@pytest.mark.parametrize(
    "figures", [THINKING, IDLE, replace(IDLE, model="模型" * 30, conversation="名" * 90)]
)
def test_every_row_is_narrower_than_any_window_and_never_grows_when_that_shrinks(
    figures: StatusFigures,
) -> None:
    for window_rows in (24, 4):
        rows = [status_rows(figures, columns, window_rows) for columns in range(1, 250)]
        for columns, shown in enumerate(rows, start=1):
            assert all(cell_width(row) < columns for row in shown)
        for widths in ([cell_width(shown[n]) for shown in rows if len(shown) > n] for n in (0, 1)):
            assert widths == sorted(widths)


@pytest.mark.parametrize("columns", [20, 33, 80, 200])
def test_the_line_of_a_view_follows_the_turn(columns: int) -> None:
    viewer = Viewer(size=(columns, 24))
    shown = []
    for event in (
        ASKING,
        Loading("QwQ-32B", 0.1),
        PLANNED,
        Prefill(0, 4000, 0),
        Thinking("x"),
        CLOSED,
        Answer("y"),
        FINISHED,
    ):
        rows = viewer.show(event, each_s=1).frame().status
        assert all(cell_width(row) < columns for row in rows)
        shown.append(rows[0].split(" ")[0])
    phases = ["starting", "loading", "loading", "reading", "thinking", "answering", "answering", "saving"]
    assert shown == phases
    viewer.view.end_line()
    assert viewer.status().startswith("^T")


def test_counts_are_exact_when_reported_and_grow_by_pieces() -> None:
    viewer = Viewer(ThinkView.OFF, (200, 24)).show(ASKING, PLANNED, Prompted((1,) * 4100))
    viewer.show(*[Thinking("x")] * 7, each_s=1)
    assert "thinking 7s · 7/16,384 tok" in viewer.status()
    viewer.show(Generated(0, (1,) * 40, 40), Thinking("x"), each_s=1)
    line = viewer.status()
    assert "· 41/16,384 tok" in line
    assert "ctx 4,141/32,768" in line


def test_tokens_that_the_loop_guard_cuts_are_not_counted() -> None:
    viewer = Viewer(ThinkView.OFF, (200, 24)).show(ASKING, PLANNED)
    viewer.show(Thinking("x"), Generated(0, (1,) * 900, 900), Generated(400, (1,) * 20, 420), each_s=1)
    assert "· 420/16,384 tok" in viewer.status()


def test_the_answer_is_counted_apart_from_its_thinking() -> None:
    viewer = Viewer(ThinkView.OFF, (200, 24)).show(ASKING, PLANNED, Thinking("x"), Generated(0, (1,) * 9, 9))
    viewer.show(CLOSED, Answer("a"), Answer("b"), each_s=1)
    assert "answering 3s · 2 tok ·" in viewer.status()
    viewer.show(Generated(9, (1,) * 6, 10), each_s=1)
    line = viewer.status()
    assert "· 5 tok ·" in line
    assert "ctx 4,015/32,768" in line


def test_each_turn_is_counted_from_its_own_beginning() -> None:
    viewer = Viewer(ThinkView.OFF, (200, 24)).show(ASKING, PLANNED, *[Thinking("x")] * 5, CLOSED, Answer("y"))
    assert "ctx 4,006/32,768" in viewer.status()
    viewer.show(FINISHED, ASKING, PLANNED, Thinking("x"), each_s=1)
    assert "· 1/16,384 tok" in viewer.status()


def test_a_continued_turn_counts_its_earlier_tokens() -> None:
    viewer = Viewer(ThinkView.OFF, (200, 24)).show(Asking("q", 3, True, "One."), PLANNED, Thinking("x"))
    viewer.show(Generated(500, (1,), 501), each_s=1)
    assert "· 501/16,384 tok" in viewer.status()


def test_the_rate_is_that_of_the_last_five_seconds() -> None:
    clock = Clock()
    meter = TokenCounter(clock)
    rates = []
    for second in range(40):
        for _ in range(50 if second < 20 else 10):
            meter.piece(is_answer=False)
            clock.now += 1 / (50 if second < 20 else 10)
            rates.append(meter.rate())
    by_second = [rates[50 * second - 1] for second in range(2, 20)]
    assert by_second == pytest.approx([50] * 18, rel=0.03)
    assert rates[-1] == pytest.approx(10, rel=0.03)
    assert 10 < rates[1000 + 20] < 50


def test_a_rate_is_shown_after_enough_tokens_and_falls_when_nothing_comes() -> None:
    clock = Clock()
    meter = TokenCounter(clock)
    meter.piece(is_answer=False)
    assert meter.rate() == 0
    clock.now += 0.4
    meter.piece(is_answer=False)
    assert meter.rate() == 0
    clock.now += 0.6
    assert meter.rate() == pytest.approx(1)
    clock.now += 4
    assert meter.rate() == pytest.approx(0.2)
    clock.now += 60
    assert meter.rate() == 0


def test_no_rate_spans_tokens_that_were_cut() -> None:
    clock = Clock()
    meter = TokenCounter(clock)
    meter.piece(is_answer=False)
    clock.now += 1
    meter.count(Generated(0, (1,) * 900, 900))
    meter.rate()
    meter.count(Generated(400, (1,) * 20, 420))
    for _ in range(10):
        meter.piece(is_answer=False)
        clock.now += 0.1
    assert meter.rate() == pytest.approx(9)


def test_after_a_turn_the_context_is_that_of_the_turn() -> None:
    changed = ChatStatus("QwQ-32B", 32_768, 100, 1.0, attached=3)
    bigger = Planned("QwQ-32B", 65_536, 4000, 16_384, 4096, 2.0, "q8_0", 65, 1)
    viewer = Viewer(size=(120, 24)).show(changed, ASKING, bigger, Thinking("x"), CLOSED, Answer("y"))
    viewer.show(Generated(0, (1,) * 20, 9), FINISHED)
    assert viewer.status().startswith("saving 0s · ctx 4,020/65,536")
    viewer.view.end_line()
    assert viewer.status() == "QwQ-32B · ctx 4,020/65,536 · YaRN 2 · ^T thought /help"
    assert viewer.show(changed).status() == "QwQ-32B · ctx 100/32,768 · 3 files attached · ^T thought /help"


def test_loading_between_turns_is_shown() -> None:
    viewer = Viewer().show(Loading("QwQ-32B", 0.0))
    assert viewer.view.is_busy
    viewer.clock.now += 1
    assert viewer.show(Loading("QwQ-32B", 0.5)).live()
    viewer.show(Loading("QwQ-32B", 1.0), ChatStatus("QwQ-32B", 32_768, 0, 1.0))
    assert not viewer.view.is_busy
    assert viewer.live() == []


def test_the_key_hint_says_what_it_does_when_a_thought_is_shown_in_full() -> None:
    viewer = Viewer(ThinkView.FULL, (200, 24)).show(ASKING, Thinking("x"))
    assert "^T view" in viewer.status()
    viewer.view.cycle_view()
    assert "^T next off" in viewer.status()
