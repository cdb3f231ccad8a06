"""The pager, the editor and the clipboard."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwq_local.chat.events import Page
from qwq_local.errors import QwqError
from qwq_local.terminal.repl.fullscreen import MAX_OSC_BYTES, EditorProcess, copy, editor_command
from qwq_local.terminal.repl.pager import PagerText
from tests.terminal.repl_terminal import (
    BACKSPACE,
    DOWN,
    END,
    ENTER,
    ESCAPE,
    HOME,
    PAGE_DOWN,
    PAGE_UP,
    UP,
    Chat,
    Shared,
    chatting,
    ctrl,
)

EDIT = ctrl("x") + ctrl("e")
PAGER_KEYS = (
    (DOWN, 2),
    ("j", 3),
    (ENTER, 4),
    (UP, 3),
    ("k", 2),
    (" ", 25),
    ("b", 2),
    ("f", 25),
    (PAGE_UP, 2),
    (PAGE_DOWN, 25),
    (ctrl("b"), 2),
    (ctrl("f"), 25),
    ("u", 14),
    ("d", 25),
    (ctrl("u"), 14),
    (ctrl("d"), 25),
    ("G", 279),
    ("g", 1),
    (END, 279),
    (HOME, 1),
    ("k", 1),
)
"""The keys that scroll the pager, pressed one after the other, and the row that is the first then."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    chats = Shared(tmp_path_factory.mktemp("chats"))
    yield chats
    chats.end()


@pytest.fixture
def reading(shared: Shared) -> Iterator[Chat]:
    """A chat with a page of 300 lines open."""
    chat = shared.chat()
    chat.type("before" + ENTER)
    chat.is_idle(1)
    chat.type("page 300" + ENTER)
    chat.wait_for(lambda: chat.status.startswith("thought 1 · line 23/301"))
    yield chat
    if chat.screen.is_alternate:
        chat.type("q")
        chat.wait_for(lambda: not chat.screen.is_alternate)


def test_the_pager_scrolls_by_rows_pages_and_to_the_ends(reading: Chat) -> None:
    for key, first in PAGER_KEYS:
        reading.type(key)
        reading.wait_for(lambda: reading.visible.startswith(f"page row {first} of"))  # noqa: B023
    reading.type("G")
    reading.wait_for(lambda: "100%" in reading.status)


def test_the_pager_searches_forward_and_back(reading: Chat) -> None:
    reading.type("/ROW 77" + ENTER)
    reading.sees("1 of 1")
    assert "page row 77 of" in reading.visible
    reading.type("/row 1" + ENTER)
    reading.sees("of 111")
    hit = reading.status
    reading.type("n")
    reading.wait_for(lambda: reading.status != hit)
    reading.type("N")
    reading.wait_for(lambda: reading.status == hit)
    reading.type("/nowhere" + ENTER)
    reading.sees("not found: nowhere")
    for key in (ESCAPE, ctrl("c"), ctrl("g")):
        reading.type("/zz" + BACKSPACE)
        reading.wait_for(lambda: reading.status == "/z")
        reading.type(key)
        reading.sees("line ")


def test_hits_are_reversed(reading: Chat) -> None:
    reading.type("/row 77" + ENTER)
    reading.sees("1 of 1")
    y = next(y for y, row in enumerate(reading.screen.display) if "row 77" in row)
    cells = [reading.screen.buffer[y][x] for x in range(80)]
    assert "".join(cell.data for cell in cells if cell.reverse) == "row 77"


@pytest.mark.parametrize("key", ["q", "Q", ESCAPE, ctrl("c"), ctrl("t")])
def test_leaving_the_pager_returns_to_the_chat(reading: Chat, key: str) -> None:
    assert reading.screen.is_alternate
    reading.type(key)
    reading.wait_for(lambda: not reading.screen.is_alternate and reading.input_rows == ["❯"])
    assert "❯ before" in reading.visible
    assert "page row" not in reading.text
    reading.type("after" + ENTER)
    reading.is_idle(2)


def test_the_pager_follows_the_window(reading: Chat) -> None:
    reading.type("/row 77" + ENTER)
    reading.sees("1 of 1")
    first = reading.screen.display[0][: len("page row 70 of the")]
    reading.resize(20, 10)
    reading.wait_for(lambda: reading.visible.startswith(f"{first}\nthought,"))
    reading.type("q")
    reading.wait_for(lambda: reading.input_rows == ["❯"])


@pytest.mark.parametrize("key", ["c", "y"])
def test_the_pager_copies(reading: Chat, key: str) -> None:
    reading.type(key)
    reading.sees("copied the page")
    assert b"\x1b]52;c;" in reading.raw


def test_a_turn_continues_below_the_pager(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("page 300" + ENTER)
        chat.sees("page row 1 of the thought")
        # The pager takes what is typed into it, so the queued prompt must come first.
        chat.type("q")
        chat.wait_for(lambda: chat.input_rows == ["❯"])
        chat.type("hold" + ENTER)
        chat.sees("step 0.")
        for entry in ("page 300", "lines 40"):
            chat.type(entry + ENTER)
        chat.type(ctrl("g"))
        chat.sees("page row 1 of the thought")
        assert chat.submitted[:3] == ["page 300", "hold", "page 300"]
        chat.type("q")
        chat.sees("line 40")
        chat.is_idle(2)
        assert [row for row in chat.text.split("\n") if row.startswith("• line")] == [
            f"• line {n}" for n in range(1, 41)
        ]


def test_a_signal_ends_the_pager_and_the_chat(reading: Chat) -> None:
    reading.process.terminate()
    assert reading.read_to_end() == 143
    assert not reading.screen.is_alternate
    assert reading.calls[-1] == ["close"]


def test_a_page_finds_its_hits() -> None:
    page = PagerText(Page("a page", "One two\n\nthree one\n" + "x" * 30 + "one"))
    page.wrap(10)
    assert len(page.rows) == 7
    page.search("ONE")
    assert [(hit.line, hit.start, hit.end) for hit in page.hits] == [(0, 0, 3), (2, 6, 9), (3, 30, 33)]
    assert [page.row_of(hit) for hit in page.hits] == [0, 2, 6]
    assert page.fragments(2, page.hits[1]) == [("", "three "), ("class:here", "one"), ("", "")]


def test_each_steered_sentence_is_marked_once() -> None:
    page = PagerText(Page("a page", "Hm.\n\nmine\n\nYes. mine\nmine", steered=("mine",)))
    page.wrap(80)
    rows = [page.fragments(row, None) for row in range(len(page.rows))]
    assert rows[0] == [("", "Hm.")]
    assert rows[2] == [("class:steered", "▏you: mine")]
    assert rows[4:] == [[("", "Yes. mine")], [("", "mine")]]


# The editor.


def editor(folder: Path, body: str) -> str:
    """An editor for VISUAL that changes the file `path` with the Python code in `body`."""
    script = folder / "the editor.py"
    script.write_text(f"import sys, pathlib\npath = pathlib.Path(sys.argv[-1])\n{body}\n")
    return f"{sys.executable} '{script}' --wait"


def test_ctrl_x_ctrl_e_edits_the_line(tmp_path: Path) -> None:
    visual = editor(tmp_path, "path.write_text(path.read_text() + ' edited\\nand more\\n')")
    with chatting(tmp_path, VISUAL=visual) as chat:
        chat.type("typed" + EDIT)
        chat.has_input("❯ typed edited", "  and more")
        chat.type(ENTER)
        chat.is_idle(1)
        assert chat.submitted == ["typed edited\nand more"]


def test_an_edited_question_is_submitted_and_an_unsaved_one_is_not(tmp_path: Path) -> None:
    visual = editor(tmp_path, "if 'leave' not in path.read_text(): path.write_text('a better question\\n')")
    with chatting(tmp_path, VISUAL=visual) as chat:
        chat.type("/edit old question" + ENTER)
        chat.is_idle(1)
        assert chat.submitted == ["/edit old question", "a better question"]
        chat.type("/edit leave it" + ENTER)
        chat.sees("nothing was sent.")
        chat.wait_for(lambda: chat.submitted[2:] == ["/edit leave it", ""])  # the next question is a new one


def test_a_failed_editor_cancels_the_question(tmp_path: Path) -> None:
    with chatting(tmp_path, VISUAL="no-such-editor") as chat:
        chat.type("/edit old question" + ENTER + "another" + ENTER)
        chat.sees("there is no program no-such-editor")
        chat.wait_for(lambda: chat.submitted == ["/edit old question", "", "another"])


@pytest.mark.parametrize(
    ("visual", "said"),
    [
        ("no-such-editor", "there is no program no-such-editor"),
        ("'unbalanced", "cannot be read"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "ended with status 3; nothing was changed."),
        ("sh -c 'kill -15 $$'", "sh was ended by signal 15; nothing was changed."),
    ],
)
def test_a_failed_editor_is_one_line_and_the_text_stays(tmp_path: Path, visual: str, said: str) -> None:
    with chatting(tmp_path, columns=200, VISUAL=visual) as chat:
        chat.type("typed" + EDIT)
        chat.sees(said)
        chat.has_input("❯ typed")


def test_the_editor_is_visual_then_editor_then_a_usual_one(tmp_path: Path) -> None:
    assert editor_command({"VISUAL": f"{sys.executable} -w", "EDITOR": "x"}) == [sys.executable, "-w"]
    assert editor_command({"EDITOR": sys.executable}) == [sys.executable]
    usual = tmp_path / "vi"
    usual.write_text("#!/bin/sh\n")
    usual.chmod(0o755)
    assert editor_command({"PATH": str(tmp_path)}) == ["vi"]
    with pytest.raises(QwqError, match="no editor was found"):
        editor_command({"PATH": str(tmp_path / "none")})


def test_the_edited_file_is_private_and_removed_afterwards(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    mode = "path.parent.stat().st_mode & 0o777:o"
    body = f"pathlib.Path({str(seen)!r}).write_text(f'{{path}} {{{mode}}}')"
    environ = {"VISUAL": editor(tmp_path, body), "PATH": ""}
    assert EditorProcess("text", environ).run() is None
    path, mode = seen.read_text().split()
    assert mode == "700"
    assert not Path(path).parent.exists()


# The clipboard.


def program(folder: Path, name: str, status: int = 0) -> None:
    """A program that records its standard input and its arguments."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\n/bin/cat > "{folder}/{name}.text"\necho "$@" > "{folder}/{name}.args"\nexit {status}\n'
    )
    path.chmod(0o755)


def test_a_text_goes_to_the_program_of_the_display(tmp_path: Path) -> None:
    program(tmp_path, "xclip")
    environ = {"PATH": str(tmp_path), "DISPLAY": ":0"}
    copied = copy("some 中文", "the answer", environ)
    assert copied.line == "copied the answer (7 characters)."
    assert copied.sequence == ""
    assert (tmp_path / "xclip.text").read_text() == "some 中文"
    assert (tmp_path / "xclip.args").read_text() == "-selection clipboard\n"


@pytest.mark.parametrize("variables", [{}, {"DISPLAY": ":0"}, {"WAYLAND_DISPLAY": "w"}])
def test_without_a_working_program_the_terminal_is_asked(tmp_path: Path, variables: dict[str, str]) -> None:
    program(tmp_path, "xclip", status=1)
    copied = copy("text", "code 1", {"PATH": str(tmp_path), **variables})
    assert copied.sequence == f"\x1b]52;c;{base64.b64encode(b'text').decode()}\x07"
    assert "through the terminal" in copied.line


def test_the_sequence_for_tmux_is_wrapped() -> None:
    copied = copy("text", "it", {"PATH": "", "TMUX": "/tmp/socket,1,0"})
    assert copied.sequence == "\x1bPtmux;\x1b\x1b]52;c;dGV4dA==\x07\x1b\\"


def test_a_text_too_long_for_a_terminal_is_refused() -> None:
    copied = copy("x" * (MAX_OSC_BYTES + 1), "the answer", {"PATH": ""})
    assert copied.is_error
    assert copied.sequence == ""
    assert "100,001 characters" in copied.line


def test_copy_reports_what_it_copied(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("/copy 12" + ENTER)
        chat.sees("copied the answer (12 characters) through the terminal")
        assert b"\x1b]52;c;eHh4eHh4eHh4eHh4\x07" in chat.raw


def test_the_result_of_a_copy_is_shown_before_the_next_line(tmp_path: Path) -> None:
    program(tmp_path, "xclip")
    with chatting(tmp_path, DISPLAY=":0", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}") as chat:
        chat.type("/copy 12" + ENTER + "hello" + ENTER)
        chat.is_idle(1)
        chat.sees("copied the answer (12 characters).")
        assert chat.text.index("copied the answer") < chat.text.index("❯ hello")
