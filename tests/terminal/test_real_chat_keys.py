"""Every key of `qwq chat`, pressed in the real process at three sizes of its window.

Those that take part in a thought are in test_real_chat.py, at the same sizes.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import cast

from prompt_toolkit.keys import Keys

from qwq_local.terminal.repl.key_bindings import KeyActions, bindings
from tests.terminal import test_real_chat
from tests.terminal.chat_terminal import (
    CERTAIN,
    COUNT,
    COUNTED,
    LONG,
    Terminal,
    at_every_size,
    bare,
    chatting,
    last_turn,
)
from tests.terminal.repl_terminal import (
    ALT_ENTER,
    BACKSPACE,
    CTRL_UNDERSCORE,
    DOWN,
    ENTER,
    ESCAPE,
    RIGHT,
    TAB,
    UP,
    ctrl,
    pasted,
)

Size = tuple[int, int]

PAGE_UP, PAGE_DOWN, HOME, END, ALT_F = "\x1b[5~", "\x1b[6~", "\x1b[H", "\x1b[F", "\x1bf"
N_TOKENS = {(80, 24): 1300, (200, 50): 300, (20, 24): 600}
"""Of a thought that is longer than the window."""

SCROLLS = (
    *(("j", "k"), (DOWN, UP), ("d", "u"), (ctrl("d"), ctrl("u")), (" ", "b"), ("f", "b")),
    *((ctrl("f"), ctrl("b")), (PAGE_DOWN, PAGE_UP), ("G", "g"), (END, HOME)),
)
"""Keys of the pager that go down, and those that go back up as far."""

PRESSED = {
    ("c-c",): 'ctrl("c")',
    ("c-d",): 'ctrl("d")',
    ("c-f",): 'ctrl("f")',
    ("c-g",): 'ctrl("g")',
    ("c-j",): 'ctrl("j")',
    ("c-l",): 'ctrl("l")',
    ("c-s",): 'ctrl("s")',
    ("c-t",): 'ctrl("t")',
    ("c-e",): 'ctrl("e")',
    ("c-x", "c-e"): 'ctrl("x") + ctrl("e")',
    ("c-m",): "ENTER",
    ("c-i",): "TAB",
    ("escape", "c-m"): "ALT_ENTER",
    ("escape", "f"): "ALT_F",
    ("escape",): "ESCAPE",
    ("up",): "UP",
    ("right",): "RIGHT",
    ("<any>",): "does(",
    ("<bracketed-paste>",): "pasted(",
}
"""The keys that are bound, and what stands in a test that presses them."""

WITH_A_SHELL = {("c-z",)}
"""Needs a shell to go back to: test_tmux.py has one."""


def clear(chat: Terminal) -> None:
    """Empty the input line."""
    chat.type(ctrl("c"))
    chat.wait_for(lambda: chat.is_whole)


@at_every_size
def test_entries_of_several_lines_are_sent_whole(cache: Path, tmp_path: Path, size: Size) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "%s, edited\\nand more" "$(cat "$1")" > "$1"\n')
    editor.chmod(0o755)
    short = (*CERTAIN, "--set", "thinking_budget=100", "--set", "max_tokens=40")
    with chatting(cache, tmp_path, *short, size=size, EDITOR=str(editor), VISUAL="") as chat:
        chat.type("one" + ALT_ENTER + "two" + ctrl("j") + "three")
        chat.has_input("❯ one", "  two", "  three")
        chat.type(UP + UP + "first ")
        chat.has_input("❯ onefirst", "  two", "  three")
        clear(chat)

        chat.type('"""How many r\'s are in' + ENTER + 'the word strawberry?"""')
        chat.has_typed(f'"""{COUNT}"""')
        chat.asks("", COUNTED)
        assert last_turn(tmp_path, "question") == ("How many r's are in\nthe word strawberry?",)

        chat.type(pasted("a\r\nb"))
        chat.has_input("❯ a", "  b")
        clear(chat)
        text = "\n".join(["x"] * 214)
        chat.type("see " + pasted(text))
        chat.has_typed("see [pasted 214 lines]")
        chat.type(BACKSPACE)
        chat.has_input("❯ see")
        chat.type(CTRL_UNDERSCORE)
        chat.has_typed("see [pasted 214 lines]")
        chat.asks("", "… 214 lines")
        assert last_turn(tmp_path, "question") == (f"see {text}",)

        chat.type("typed" + ctrl("x") + ctrl("e"))
        chat.has_typed("typed, edited and more")
        assert chat.input_rows[-1] == "  and more"
        clear(chat)
        assert chat.leave() == 0


@at_every_size
def test_what_is_typed_is_completed_suggested_and_found_again(
    cache: Path, tmp_path: Path, size: Size
) -> None:
    (tmp_path / "a_file.txt").write_text("x")
    with chatting(cache, tmp_path, *CERTAIN, size=size) as chat:
        chat.asks(COUNT, COUNTED)
        chat.does("/stats", "thought 1")
        chat.type(UP)
        chat.has_typed("/stats")
        chat.type(UP)
        chat.has_typed(COUNT)
        chat.type(DOWN + DOWN)
        chat.has_input("❯")
        chat.type(ctrl("r") + "STRAW")
        chat.wait_for(
            lambda: "search: STRAW" in chat.visible and bare(f"❯ {COUNT}search") in bare(chat.visible)
        )
        chat.type(ENTER)
        chat.has_typed(COUNT)
        clear(chat)
        for key in (RIGHT, ctrl("e"), ctrl("f")):
            chat.type("How")
            chat.has_typed(COUNT)
            chat.type(key + "!")
            chat.has_typed(f"{COUNT}!")
            clear(chat)
        chat.type("How ")
        chat.has_typed(COUNT)
        chat.type(ALT_F + "few")
        chat.has_typed("How many few")
        clear(chat)

        chat.type("/re")
        chat.wait_for(lambda: all(name in chat.visible for name in ("/regen ", "/retry-from ", "/resume ")))
        chat.type(TAB)
        chat.wait_for(lambda: chat.input_rows[:1] == ["❯ /regen"])
        chat.type(TAB + ENTER)  # Enter takes it
        chat.has_input("❯ /retry-from")
        clear(chat)
        chat.type("/re")
        chat.wait_for(lambda: "/resume " in chat.visible)
        chat.type(TAB)
        chat.wait_for(lambda: chat.input_rows[:1] == ["❯ /regen"])
        chat.type(ESCAPE)
        chat.has_input("❯ /re")
        clear(chat)
        for start, offer, whole in (
            ("/sta", "/stats", "/stats"),
            ("/set thinking_b", "thinking_budget", "/set thinking_budget"),
            ("/profile ma", "math", "/profile math"),
        ):
            chat.type(start)
            chat.sees(f"\n {offer}")
            chat.type(TAB)
            chat.has_typed(whole)
            clear(chat)
        chat.type(f"see @{tmp_path}/a_f" + TAB)
        chat.has_typed(f"see @{tmp_path}/a_file.txt")
        clear(chat)

        before, n_read = chat.text, len(chat.raw)
        chat.type(ctrl("l"))
        chat.wait_for(lambda: len(chat.raw) > n_read and chat.is_whole and chat.text == before)
        chat.type(ctrl("g"))
        chat.wait_for(lambda: b"no thought runs" in chat.raw)
        chat.type(ctrl("s") + "x")  # no line to steer with is opened
        chat.has_input("❯ x")
        chat.type(ctrl("c") + ctrl("c"))
        chat.wait_for(lambda: b"Ctrl-C again leaves" in chat.raw)
        chat.type(ctrl("c") + ctrl("c"))  # leaves with the second where the first came late
        assert chat.read_to_end() == 0


@at_every_size
def test_a_thought_is_read_in_the_pager(cache: Path, tmp_path: Path, size: Size) -> None:
    """At 200x50 no thought of the miniature's is longer than the window: nothing can scroll there."""
    budget = ("--set", f"thinking_budget={N_TOKENS[size]}")
    with chatting(cache, tmp_path, *LONG, *budget, size=size) as chat:
        chat.asks(COUNT, "ended at its budget")
        (thinking,) = last_turn(tmp_path, "thinking")
        before = chat.text
        chat.type(ctrl("t"))
        chat.reads("I count r in strawberry.", "%")
        top = chat.visible
        if size == (200, 50):
            assert "100%" in chat.status
            assert bare(thinking) in bare(top)
        for down, up in SCROLLS if size != (200, 50) else ():
            assert "100%" not in chat.status
            chat.type(down)
            chat.wait_for(lambda: "I count" not in chat.visible)
            chat.type(up)
            chat.wait_for(lambda: chat.visible == top)

        n_hits = thinking.count(" - ")
        for keys, said in (("/ - " + ENTER, 1), ("n", 2), ("n", 3), ("N", 2)):
            chat.type(keys)
            chat.reads(f"{said} of {n_hits}")
        chat.type("/zzz" + ENTER)
        chat.reads("not found: zzz")
        for key in (ESCAPE, ctrl("c"), ctrl("g")):
            chat.type("/zz" + BACKSPACE)
            chat.wait_for(lambda: chat.status == "/z")
            chat.type(key)
            chat.reads("line ", "%")
        for key in ("c", "y"):
            chat.type(key)
            chat.reads("copied the page")
            chat.type("g")
            chat.reads("line ", "%")
        for key in ("q", "Q", ESCAPE, ctrl("c"), ctrl("t")):
            chat.type(key)
            chat.is_back()
            assert chat.text == before
            if key != ctrl("t"):
                chat.type(ctrl("t"))
                chat.reads("I count r in strawberry.")
        chat.type(ctrl("d"))
        assert chat.read_to_end() == 0


class NoActions:
    """Stands for hands where nothing is pressed."""

    def __getattr__(self, _name: str) -> object:
        return lambda: None


def test_every_key_is_pressed_at_every_size() -> None:
    """What is bound is in the table, and what is in the table stands in tests that run at every size."""
    bound = {
        tuple(key.value if isinstance(key, Keys) else key for key in binding.keys)
        for binding in bindings(cast(KeyActions, NoActions())).bindings
    }
    assert bound == set(PRESSED) | WITH_A_SHELL
    here = vars(sys.modules[__name__]) | vars(test_real_chat)
    sized = [each for name, each in here.items() if name.startswith("test_") and hasattr(each, "pytestmark")]
    pressed = "".join(
        inspect.getsource(test) for test in sized if "size" in inspect.signature(test).parameters
    )
    assert [written for written in PRESSED.values() if written not in pressed] == []
