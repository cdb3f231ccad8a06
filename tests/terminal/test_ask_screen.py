"""A turn on terminals, on dumb terminals and in pipes."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import closing

import pytest

from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Loading,
    Notice,
    Prefill,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.terminal.ask_screen import AskScreen, Think
from qwq_local.terminal.output import Output
from tests.terminal.fake_terminal import Clock, Terminal

FINISHED = Finished(FinishReason.STOP, TurnStats(), "", "")
CLOSED = ThinkingClosed(CloseReason.MODEL, 431, 72.4)
TURN: list[Event] = [Thinking("I co"), Thinking("unt.\n\n"), CLOSED, Answer("**3"), Answer("**"), FINISHED]


def show(events: list[Event], out: Output, err: Output, think: Think | None = None) -> None:
    clock = Clock()
    with closing(AskScreen(out, err, clock, think)) as screen:
        for event in events:
            screen.show(event)
            clock.now += 0.2


def piped(events: list[Event], think: Think | None = None) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    show(events, Output(out), Output(err), think)
    return out.getvalue(), err.getvalue()


def test_on_a_terminal_the_thinking_folds_above_the_rendered_answer() -> None:
    terminal = Terminal()
    show(TURN, terminal.output(), terminal.output())
    assert terminal.lines() == ["I count.", "▸ thought · 1m12s · 431 tok", "", "3"]
    assert "\x1b[2mI co\x1b[0m" in terminal.written


def test_in_a_pipe_stdout_is_the_exact_answer_and_stderr_is_silent() -> None:
    assert piped([*TURN[:3], Answer("**3**\x1b[1m"), FINISHED]) == ("**3**\x1b[1m\n", "")


def test_a_newline_is_added_only_where_it_is_missing() -> None:
    assert piped([Answer("a\n"), FINISHED])[0] == "a\n"
    assert piped([FINISHED])[0] == ""


def test_thinking_asked_for_in_a_pipe_goes_to_stderr() -> None:
    assert piped(TURN, "show") == ("**3**\n", "I count.\n\n▸ thought · 1m12s · 431 tok\n")


def test_hidden_thinking_shows_its_progress_and_its_figures() -> None:
    terminal = Terminal()
    show([Thinking("secret")] * 5 + TURN[2:], terminal.output(), terminal.output(), "hide")
    assert "thinking · 0s" in terminal.written
    assert "secret" not in terminal.written
    assert terminal.lines() == ["▸ thought · 1m12s · 431 tok", "3"]


@pytest.mark.parametrize(
    "reason", [CloseReason.BUDGET, CloseReason.CONTEXT, CloseReason.LOOP, CloseReason.ASKED]
)
def test_a_thought_not_ended_by_the_model_says_why(reason: CloseReason) -> None:
    terminal = Terminal()
    show([Thinking("x"), ThinkingClosed(reason, 5, 1.0)], terminal.output(), terminal.output())
    assert terminal.lines()[1].startswith("▸ thought · 1s · 5 tok · ended ")


def test_a_steered_sentence_is_shown_as_thinking_and_token_ids_are_not_shown() -> None:
    terminal = Terminal()
    events: list[Event] = [
        Prompted((1, 2)),
        Thinking("abc"),
        Thinking("\n\n"),
        Steered("Go on."),
        Generated(0, (3, 4), 2),
        Thinking("\n\n"),
        Thinking("def"),
        CLOSED,
    ]
    show(events, terminal.output(), terminal.output())
    assert terminal.lines()[:5] == ["abc", "", "Go on.", "", "def"]


def test_the_answer_continues_after_a_notice() -> None:
    terminal = Terminal()
    events: list[Event] = [Answer("one two"), Notice("yarn\n is on\x1b[2J"), Answer(" three"), FINISHED]
    show(events, terminal.output(), terminal.output())
    assert terminal.lines() == ["note: yarn is on", "one two three"]


def test_a_notice_within_the_thinking_ends_its_line() -> None:
    terminal = Terminal()
    show([Thinking("abc"), Notice("x"), Thinking("def"), CLOSED], terminal.output(), terminal.output())
    assert terminal.lines()[:3] == ["abc", "note: x", "def"]


def test_a_dumb_terminal_gets_plain_text_without_any_sequence() -> None:
    terminal = Terminal()
    output = terminal.output(is_dumb=True)
    show([Prefill(0, 10, 0)] * 4 + TURN[:-1] + [Notice("n"), Answer(" \x1b[1mx"), FINISHED], output, output)
    assert "\x1b" not in terminal.written
    assert "\r" not in terminal.written
    assert terminal.lines()[1:] == ["I count.", "▸ thought · 1m12s · 431 tok", "", "**3**", "note: n", " x"]


def test_control_sequences_in_the_thinking_reach_no_terminal() -> None:
    terminal = Terminal()
    show(
        [Thinking("a\x1b]0;t"), Thinking("itle\x07b\x1b[2"), Thinking("Jc")],
        terminal.output(),
        terminal.output(),
    )
    assert terminal.lines() == ["abc"]


def test_prefill_draws_a_bar_and_erases_it() -> None:
    terminal = Terminal()
    steps: list[Event] = [Prefill(done, 8000, 1000) for done in (1000, 2000, 3000, 4000)]
    show([*steps, *TURN], terminal.output(), terminal.output())
    assert f"reading {'█' * 12}{'░' * 12} 4,000 / 8,000 tokens · 5,000 tok/s · 1 s left" in terminal.written
    assert terminal.lines()[0] == "I count."


def test_loading_draws_a_bar_with_percents() -> None:
    terminal = Terminal()
    show([Loading("QwQ-32B Q4_K_M", share / 10) for share in range(5)], terminal.output(), terminal.output())
    assert "loading QwQ-32B Q4_K_M ████" in terminal.written
    assert " 40%" in terminal.written
    assert terminal.lines() == []


def test_short_work_and_pipes_draw_no_bar() -> None:
    terminal = Terminal()
    show([Prefill(0, 10, 0), Prefill(10, 10, 0), Answer("a"), FINISHED], terminal.output(), terminal.output())
    assert "reading" not in terminal.written
    assert piped([Prefill(done, 10, 0) for done in range(10)]) == ("", "")


def test_an_interrupted_turn_keeps_the_shown_text() -> None:
    terminal = Terminal()
    show([Answer("half an ans")], terminal.output(), terminal.output())
    assert terminal.lines() == ["half an ans"]
    assert terminal.screen.cursor.x == 0


def test_a_closed_pipe_is_raised_once() -> None:
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    screen = AskScreen(Output(ClosedPipe()), Output(io.StringIO()), Clock())
    with pytest.raises(BrokenPipeError):
        screen.show(Answer("a"))
    screen.close()


def test_no_rich_is_imported_before_an_answer_is_rendered() -> None:
    program = (
        "import sys\nfrom qwq_local.terminal import ask_screen\n"
        "print('rich' in sys.modules, 'markdown_it' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "False False\n"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "dumb"}, (True, True, True)),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, (False, False, True)),
        ({"TERM": "xterm", "XTERM_VERSION": "390"}, (False, True, False)),
    ],
)
def test_the_environment_says_what_a_terminal_can_do(
    environ: dict[str, str], expected: tuple[bool, bool, bool]
) -> None:
    output = Output.of(Terminal(), environ)
    assert output.is_terminal
    assert (output.is_dumb, output.has_color, output.reflows) == expected
