"""The chat in a real tmux, which wraps old rows again when its window changes, and has a shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import TIMEOUT_S, environment
from tests.terminal.repl_terminal import PROGRAM

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux")


class Tmux:
    """One window of a tmux server of its own, with a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        variables = environment(folder, TERM="xterm-256color", PS1="$ ", ENV="", HISTFILE="")
        self._variables = {k: v for k, v in variables.items() if not k.startswith("TMUX")}
        self._socket = str(folder / "socket")
        self._ask("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "/bin/sh", "-i")

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names for them; anything else is typed."""
        self._ask("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """Change the window's size."""
        self._ask("resize-window", "-x", str(columns), "-y", str(rows))

    @property
    def text(self) -> str:
        """Scrollback and screen, rows that were wrapped joined again."""
        return self._ask("capture-pane", "-p", "-J", "-S", "-").rstrip()

    @property
    def visible(self) -> str:
        """The screen alone."""
        return self._ask("capture-pane", "-p").rstrip()

    @property
    def buffer(self) -> str:
        """The text that tmux would paste."""
        return self._ask("show-buffer")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Poll until the condition holds: tmux does not report what it has drawn."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until the screen stays the same: a window that changes within a redraw is another test."""
        before, n_same = "", 0
        while n_same < 20:
            now = self.text
            n_same, before = (n_same + 1 if now == before else 0), now
            time.sleep(0.02)

    def end(self) -> None:
        self._ask("kill-server")

    def _ask(self, *arguments: str) -> str:
        command = ["tmux", "-S", self._socket, *arguments]
        result = subprocess.run(
            command, env=self._variables, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
        )
        return result.stdout


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    server = Tmux(tmp_path)
    try:
        yield server
    finally:
        server.end()


def start(tmux: Tmux, *arguments: str, before: str = "") -> None:
    """Start the chat from the shell, after another command, and wait until it is ready."""
    tmux.press(before + " ".join([*PROGRAM, str(tmux.folder / "log"), *arguments]), "Enter")
    tmux.wait_for(lambda: "QwQ-32B · Q4_K_M · ctx 0/32,768" in tmux.visible)


def lines_of(tmux: Tmux) -> list[int]:
    return [int(number) for number in re.findall(r"^• line (\d+)\s*$", tmux.text, re.MULTILINE)]


def test_a_window_that_gets_narrower_leaves_nothing_behind(tmux: Tmux) -> None:
    start(tmux)
    tmux.press("lines 30", "Enter")
    tmux.wait_for(lambda: "ctx 100/" in tmux.visible)
    tmux.press("z" * 130 + "中文" * 10)
    for columns, rows in [(40, 24), (61, 24), (25, 24), (40, 18), (79, 30), (24, 24), (120, 24), (80, 24)]:
        tmux.resize(columns, rows)
        # The first row of the input shows that it was drawn for this width, not wrapped by tmux.
        first = f"❯ {'z' * (columns - 2)}"
        tmux.wait_for(lambda: first in tmux.visible.split("\n"))  # noqa: B023
        tmux.wait_for(lambda: [tmux.text.count(c) for c in "z中文❯"] == [130, 10, 10, 2])
        tmux.wait_for(lambda: tmux.text.count("QwQ-32B") == 1)
        tmux.settle()
    tmux.wait_for(lambda: lines_of(tmux) == list(range(1, 31)))


def test_a_storm_of_resizes_while_it_streams_loses_no_line(tmux: Tmux) -> None:
    fifo = tmux.folder / "release"
    os.mkfifo(fifo)
    with fifo.open("r+b", buffering=0) as release:
        start(tmux, "--release", str(fifo))
        tmux.press("lines 400", "Enter")
        released = 0
        for columns, rows in [(60, 24), (33, 24), (100, 30), (24, 12), (120, 24), (40, 8), (80, 24)]:
            for step in range(4):  # faster than anything is drawn
                release.write(b".." * 5)
                released += 5
                tmux.resize(columns + step, rows)
            tmux.wait_for(lambda: lines_of(tmux)[-1:] == [released])  # noqa: B023
        release.write(b".." * (400 - released))
        tmux.wait_for(lambda: "ctx 100/" in tmux.visible)
        assert lines_of(tmux) == list(range(1, 401))


def test_nothing_of_the_bottom_gets_into_the_scrollback_of_an_empty_window(tmux: Tmux) -> None:
    start(tmux, before="printf '\\033[H\\033[2J'; ")
    tmux.press("hello", "Enter")
    tmux.wait_for(lambda: "ctx 100/" in tmux.visible)
    assert tmux.text.count("QwQ-32B") == 1
    assert tmux.text.count("❯") == 2


def test_the_pager_restores_the_screen(tmux: Tmux) -> None:
    start(tmux)
    tmux.press("lines 50", "Enter")
    tmux.wait_for(lambda: "ctx 100/" in tmux.visible)
    before = tmux.text
    tmux.press("C-t")
    tmux.wait_for(lambda: "page row 1 of the thought" in tmux.visible)
    tmux.press("q")
    tmux.wait_for(lambda: tmux.text == before)


def test_copied_text_is_in_a_buffer_of_tmux(tmux: Tmux) -> None:
    start(tmux, before="unset DISPLAY WAYLAND_DISPLAY; ")
    tmux.press("/copy 12", "Enter")
    tmux.wait_for(lambda: "copied the answer (12 characters) to tmux" in tmux.visible)
    assert tmux.buffer == "x" * 12


def test_ctrl_z_suspends_the_chat_and_fg_resumes_it(tmux: Tmux) -> None:
    start(tmux)
    tmux.press("typed before")
    tmux.wait_for(lambda: "❯ typed before" in tmux.visible)
    tmux.press("C-z")
    tmux.wait_for(lambda: "Stopped" in tmux.visible and tmux.visible.endswith("$"))
    assert "❯" not in tmux.visible
    tmux.press("echo in the $((40 + 2)) shell", "Enter")
    tmux.wait_for(lambda: "in the 42 shell" in tmux.visible)
    tmux.press("fg", "Enter")
    tmux.wait_for(lambda: "❯ typed before" in tmux.visible)
    tmux.press(" and after", "Enter")
    tmux.wait_for(lambda: "got 22 characters" in tmux.visible)
    tmux.press("C-d")
    tmux.wait_for(lambda: "left with 0" in tmux.visible)


def test_leaving_keeps_the_conversation_and_nothing_else(tmux: Tmux) -> None:
    start(tmux)
    tmux.press("lines 60", "Enter")
    tmux.wait_for(lambda: "ctx 100/" in tmux.visible)
    tmux.press("C-d")
    tmux.wait_for(lambda: "left with 0" in tmux.visible)
    rows = tmux.text.split("\n")
    said = rows[1 : rows.index("left with 0")]
    assert [row for row in said if row] == ["❯ lines 60", *(f"• line {n}" for n in range(1, 61))]
