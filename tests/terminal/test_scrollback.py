"""The screen and the scrollback: long answers, narrow windows, resizes during streaming."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from qwq_local.terminal.sanitizer import sanitize
from tests.terminal.queued_talk import EXOTIC
from tests.terminal.repl_terminal import ALT_ENTER, ENTER, UP, Chat, chatting, ctrl

SIZES = [(80, 24), (200, 50), (20, 10)]
LINE = re.compile(r"^• line (\d+)\s*$", re.MULTILINE)


def lines_of(chat: Chat) -> list[int]:
    """The numbers of the answer's lines in scrollback and screen."""
    return [int(number) for number in LINE.findall(chat.text)]


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_a_long_answer_is_in_the_scrollback_once_and_in_order(
    tmp_path: Path, columns: int, rows: int
) -> None:
    with chatting(tmp_path, columns=columns, rows=rows) as chat:
        chat.type("lines 1000" + ENTER)
        chat.wait_for(lambda: "line 1000" in chat.visible and bool(chat.input_rows))
        chat.leave()
        assert lines_of(chat) == list(range(1, 1001))
        assert chat.text.count("❯") == 1  # that of the question; the input line is gone


def test_a_question_that_begins_with_a_path_is_shown_once(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("/etc/hosts: what is it?" + ENTER)
        chat.is_idle(1)
        assert chat.text.count("/etc/hosts") == 1


def test_a_thought_of_twenty_thousand_tokens_is_one_line(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("think 20000" + ENTER)
        chat.is_idle(1)
        assert "20,000 tok" in chat.visible
        assert "w19999" not in chat.text
        assert chat.text.count("▸ thought 1") == 1


def test_a_thought_in_full_is_in_the_scrollback_once_and_in_order(tmp_path: Path) -> None:
    with chatting(tmp_path, "--view", "full") as chat:
        chat.type("think 5000" + ENTER)
        chat.is_idle(1)
        words = [int(number) for number in re.findall(r"\bw(\d+)\b", chat.text)]
        assert words == list(range(5000))


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_exotic_characters_are_shown_and_their_sequences_are_not(
    tmp_path: Path, columns: int, rows: int
) -> None:
    with chatting(tmp_path, "--view", "full", columns=columns, rows=rows) as chat:
        chat.type("exotic" + ENTER)
        chat.sees("end of the exotic")
        chat.wait_for(lambda: "^C" not in chat.status and "stop" not in chat.status)
        shown = "".join(chat.text.split())
        assert "中文字符。日本語のテキスト、" in shown
        for sequence in (b"\x1b[2J", b"\x1b[31m", b"\x07", "\u202e".encode(), b"\x9b5A"):
            assert sequence not in bytes(chat.raw)
        assert "\x1b" not in sanitize(EXOTIC)


def test_no_color_writes_no_color(tmp_path: Path) -> None:
    with chatting(tmp_path, NO_COLOR="1") as chat:
        chat.type("/th")
        chat.sees("/thank")
        chat.type(ctrl("c") + "exotic" + ENTER)
        chat.is_idle(1)
        codes = {code for group in re.findall(rb"\x1b\[([0-9;]*)m", chat.raw) for code in group.split(b";")}
        assert {int(code) for code in codes if code} <= {0, 1, 2, 3, 4, 7}


def test_the_bottom_fits_a_very_small_window(tmp_path: Path) -> None:
    with chatting(tmp_path, columns=20, rows=5) as chat:
        chat.type("hold" + ENTER)
        chat.sees("step 0.")
        for number in range(5):
            chat.type(f"waiting number {number}" + ENTER)
        chat.sees("⋯ 3 more waiting")
        chat.type("typed")
        chat.has_input("❯ typed")
        chat.type(ctrl("c"))
        chat.wait_for(lambda: "number 4" in chat.visible)


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_queueing_steering_and_views_work_in_a_window_of_any_size(
    tmp_path: Path, columns: int, rows: int
) -> None:
    with chatting(tmp_path, columns=columns, rows=rows) as chat:
        chat.type("hold" + ENTER)
        chat.sees("step 0.")
        chat.type("later" + ALT_ENTER + "on" + ENTER)
        chat.sees("⋯ waiting: later on")
        chat.type(ctrl("s") + "look again")
        chat.has_input("steer ❯ look again")
        chat.type(ENTER)
        chat.sees("▏you: look")
        chat.type(UP)
        chat.has_input("❯ later", "  on")
        chat.type(ctrl("t"))
        chat.hinted("thinking: full")
        chat.type(ctrl("g"))
        chat.sees("held")
        chat.wait_for(lambda: chat.status.startswith("QwQ"))
        chat.type(ENTER)
        chat.sees("got 8 characters")
        chat.type("hold" + ENTER)
        chat.wait_for(lambda: ["submit", "hold"] in chat.calls[-1:])
        chat.wait_for(lambda: "^C" in chat.status)
        chat.type(ctrl("c"))
        chat.sees("■ stopped")
        chat.type("/th")
        chat.sees("/thank")
        chat.type(ctrl("c"))
        chat.has_input("❯")
        assert chat.leave() == 0


def test_the_window_changes_while_it_thinks(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("hold" + ENTER)
        chat.sees("step 0.")
        for columns, rows in ((20, 24), (200, 50), (34, 16), (120, 30), (80, 24)):
            chat.resize(columns, rows)
            chat.wait_for(lambda: chat.status.startswith("thinking"))
            chat.has_input("❯")
        chat.type(ctrl("g"))
        chat.is_idle(1)
        assert chat.text.count("❯ hold") == 1
        assert "▾" not in chat.text


def test_the_view_of_a_thought_changes_while_it_runs(tmp_path: Path) -> None:
    with chatting(tmp_path, "--view", "off") as chat:
        chat.type("hold" + ENTER)
        chat.wait_for(lambda: chat.status.startswith("thinking"))
        assert "step 0." not in chat.text
        chat.type(ctrl("t"))
        chat.sees("▾ step 0.")
        chat.type(ctrl("t"))
        chat.sees("▾ thought 1 · thinking …\nthinking begins. step 0.")
        chat.type(ctrl("t"))
        chat.wait_for(lambda: "▾" not in chat.visible and "thinking begins. step 0." in chat.visible)
        chat.type(ctrl("g"))
        chat.is_idle(1)
        trace, _, _ = chat.text.partition("▸ thought 1")
        assert trace.count("thinking begins. step 0.") == 1


@dataclass
class Streaming:
    """An answer of numbered lines that a test releases one by one."""

    chat: Chat
    release: BinaryIO
    released: int = 0

    def let(self, n_lines: int) -> None:
        """Release this many more lines."""
        self.released += n_lines
        self.release.write(b".." * n_lines)

    def came(self) -> None:
        """Wait until the last released line is on the screen."""
        self.chat.sees(f"line {self.released}\n")


@pytest.fixture
def streaming(tmp_path: Path) -> Iterator[Streaming]:
    fifo = tmp_path / "release"
    os.mkfifo(fifo)
    with (
        fifo.open("r+b", buffering=0) as release,
        chatting(tmp_path, "--release", str(fifo)) as chat,
    ):
        chat.type("lines 1000" + ENTER)
        yield Streaming(chat, release)


def test_a_storm_of_resizes_while_it_streams_leaves_nothing_behind(streaming: Streaming) -> None:
    chat = streaming.chat
    for size in [(60, 24), (33, 24), (100, 30), (24, 12), (120, 24), (40, 8), (80, 24)]:
        chat.resize(*size)
        for columns in (50, 49, 48, 47):  # faster than anything is drawn
            streaming.let(5)
            chat.resize(columns, chat.rows)
        streaming.came()
    chat.resize(80, 24)
    streaming.let(1000 - streaming.released)
    streaming.came()
    chat.is_idle(1)
    assert lines_of(chat) == list(range(1, 1001))
    chat.has_input("❯")
    assert chat.text.count("❯") == 2


def test_a_resize_while_typing_keeps_one_input_line(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("lines 5" + ENTER)
        chat.is_idle(1)
        chat.type("z" * 70)
        chat.has_input("❯ " + "z" * 70)
        for columns in (30, 50, 25, 100, 72, 73):
            chat.resize(columns, 24)
            chat.wait_for(lambda: "".join(chat.input_rows).count("z") == chat.text.count("z") == 70)
            chat.wait_for(lambda: chat.text.count("❯") == 2)
            assert lines_of(chat) == [1, 2, 3, 4, 5]


def test_streaming_does_not_disturb_typing(streaming: Streaming) -> None:
    chat = streaming.chat
    text = "what the user types while it streams"
    for character in text:
        streaming.let(5)
        chat.type(character)
    chat.has_input(f"❯ {text}")
    chat.type(ENTER)
    chat.sees(f"⋯ waiting: {text}")
    streaming.let(1000 - streaming.released + 10)
    chat.is_idle(2)
    assert chat.submitted[-1] == text
    assert lines_of(chat) == list(range(1, 1001))
