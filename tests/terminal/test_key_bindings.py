"""Every key of the chat, pressed on a real terminal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

from qwq_local.terminal.repl.key_bindings import KeyActions, bindings, waits_s
from tests.terminal.repl_terminal import (
    ALT_ENTER,
    ALT_F,
    BACKSPACE,
    CTRL_UNDERSCORE,
    DOWN,
    ENTER,
    ESCAPE,
    RIGHT,
    TAB,
    UP,
    Chat,
    Shared,
    chatting,
    ctrl,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    chats = Shared(tmp_path_factory.mktemp("chats"))
    yield chats
    chats.end()


@pytest.fixture
def chat(shared: Shared) -> Chat:
    return shared.chat()


def test_enter_sends_and_the_answer_is_above_an_empty_line(chat: Chat) -> None:
    chat.type("hello" + ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["hello"]
    assert [row for row in chat.visible.split("\n") if row] == [
        "❯ hello",
        "got 5 characters",
        "❯",
        chat.status,
    ]


def test_alt_enter_and_ctrl_j_begin_a_new_line(chat: Chat) -> None:
    chat.type("one" + ALT_ENTER + "two" + ctrl("j") + "three")
    chat.has_input("❯ one", "  two", "  three")
    chat.type(ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["one\ntwo\nthree"]


def test_a_block_between_quotes_is_sent_without_them(chat: Chat) -> None:
    chat.type('"""' + ENTER + "first" + ENTER + "second" + ENTER)
    chat.has_input('❯ """', "  first", "  second", "")
    chat.type('"""' + ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["first\nsecond"]


def test_nothing_is_sent_for_an_empty_line(chat: Chat) -> None:
    chat.type(ENTER + "  " + ENTER + ctrl("c") + "x" + ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["x"]


def test_a_prompt_typed_ahead_is_queued_and_can_be_edited(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type("second" + ENTER + "third" + ENTER)
    chat.sees("⋯ waiting: third")
    assert "⋯ waiting: second" in chat.visible
    assert chat.submitted == ["hold"]
    chat.type(UP)
    chat.has_input("❯ third")
    assert "⋯ waiting: third" not in chat.visible
    chat.type(ctrl("c"))  # stops the turn: the queued prompt comes back
    chat.has_input("❯ second", "", "  third")
    chat.type(ENTER)
    chat.is_idle(2)
    assert chat.submitted == ["hold", "second\n\nthird"]


def test_queued_prompts_run_in_order(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    for number in range(1, 6):
        chat.type(f"number {number}" + ENTER)
    chat.sees("⋯ 3 more waiting")
    chat.type(ctrl("g"))
    chat.is_idle(6)
    assert chat.submitted == ["hold", *(f"number {number}" for number in range(1, 6))]
    assert "waiting" not in chat.visible


def test_escape_returns_the_queued_prompt(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type("second" + ENTER)
    chat.sees("⋯ waiting: second")
    chat.type(ESCAPE)
    chat.has_input("❯ second")


def test_ctrl_c_stops_the_turn_and_keeps_its_text(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type("typed meanwhile")
    chat.interrupt()
    chat.wait_for(lambda: "^C" not in chat.status and chat.status.startswith("QwQ"))
    chat.has_input("❯ typed meanwhile")
    assert ["stop"] in chat.calls
    chat.type(ENTER)
    chat.is_idle(2)


def test_ctrl_c_right_after_enter_stops_the_turn(chat: Chat) -> None:
    chat.type("hold" + ENTER + ctrl("c"))
    chat.is_idle(1)
    assert ["stop"] in chat.calls
    assert "■ stopped" in chat.visible


def test_ctrl_c_clears_the_line_and_undo_brings_it_back(chat: Chat) -> None:
    chat.type("some words")
    chat.has_input("❯ some words")
    chat.type(ctrl("c"))
    chat.has_input("❯")
    chat.type(CTRL_UNDERSCORE)
    chat.has_input("❯ some words")


def test_ctrl_c_twice_on_an_empty_line_leaves(chat: Chat) -> None:
    chat.type(ctrl("c") + ctrl("c"))
    assert chat.read_to_end() == 0
    assert chat.visible == "left with 0"
    assert chat.calls[-1] == ["close"]


def test_a_hint_is_replaced_by_the_status_line(chat: Chat) -> None:
    chat.type(ctrl("c"))
    chat.hinted("Ctrl-C again leaves")
    chat.wait_for(lambda: chat.status.startswith("QwQ"))


def test_ctrl_d_leaves_on_an_empty_line_and_deletes_in_another(chat: Chat) -> None:
    chat.type("ab\x1b[D" + ctrl("d"))
    chat.has_input("❯ a")
    chat.type(BACKSPACE)
    chat.has_input("❯")
    assert chat.leave() == 0
    assert chat.visible == "left with 0"


def test_ctrl_d_stops_a_turn_before_it_leaves(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    assert chat.leave() == 0
    assert chat.calls[-2:] == [["stop"], ["close"]] or chat.calls[-1] == ["close"]
    assert chat.visible.endswith("left with 0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_leaves_in_order(chat: Chat, number: signal.Signals) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.signal(number)
    assert chat.read_to_end() == 128 + number
    assert chat.calls[-1] == ["close"]
    assert chat.visible.endswith(f"left with {128 + number}")


def test_an_interrupt_from_elsewhere_is_a_ctrl_c(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.signal(signal.SIGINT)
    chat.wait_for(lambda: chat.status.startswith("QwQ"))
    chat.signal(signal.SIGINT)
    chat.hinted("Ctrl-C again leaves")


def test_a_terminal_that_is_gone_ends_the_chat(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("hold" + ENTER)
        chat.sees("step 0.")
        chat.hang_up()
        assert chat.process.wait(timeout=60) in (0, 128 + signal.SIGHUP)
        assert chat.calls[-1] == ["close"]


def test_any_number_of_signals_of_a_closing_window_ends_a_turn_in_order(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("hold" + ENTER)
        chat.sees("step 0.")
        chat.hang_up()
        while chat.process.poll() is None:
            chat.process.send_signal(signal.SIGHUP)
        assert chat.process.returncode in (0, 128 + signal.SIGHUP)
        assert chat.calls[-1] == ["close"]


def test_ctrl_g_answers_now(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type(ctrl("g"))
    chat.is_idle(1)
    assert ["answer_now"] in chat.calls
    assert "held" in chat.visible


def test_ctrl_s_steers_and_the_typed_text_stays(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type("kept")
    chat.has_input("❯ kept")
    chat.type(ctrl("s"))
    chat.has_input("steer ❯")
    assert chat.calls[-1] == ["pause"]
    chat.type("look again" + ENTER)
    chat.sees("▏you: look again")
    chat.has_input("❯ kept")
    assert chat.calls[-2:] == [["steer", "look again"], ["go_on"]]


@pytest.mark.parametrize("key", [ESCAPE, ctrl("c")])
def test_steering_can_be_cancelled(chat: Chat, key: str) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type(ctrl("s") + "no")
    chat.has_input("steer ❯ no")
    chat.type(key)
    chat.has_input("❯")
    assert chat.calls[-1] == ["go_on"]
    assert ["stop"] not in chat.calls


@pytest.mark.parametrize("key", [ctrl("s"), ctrl("g")])
def test_keys_of_the_thinking_say_when_there_is_none(chat: Chat, key: str) -> None:
    chat.type(key)
    chat.hinted("no thought runs")
    assert not {"pause", "answer_now"} & {call[0] for call in chat.calls}


def test_ctrl_t_cycles_the_view_and_later_opens_the_thought(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type(ctrl("t"))
    chat.hinted("thinking: full")
    chat.type(ctrl("t"))
    chat.hinted("thinking: off from the next thought on")
    chat.type(ctrl("g"))
    chat.is_idle(1)
    chat.type(ctrl("t"))
    chat.sees("page row 1 of the thought")
    assert chat.submitted == ["hold", "/think last"]


def test_up_and_down_walk_lines_and_then_the_history(chat: Chat) -> None:
    chat.type("first" + ENTER)
    chat.is_idle(1)
    chat.type("second" + ENTER)
    chat.is_idle(2)
    chat.type("a" + ALT_ENTER + "b" + UP)
    chat.has_input("❯ a", "  b")
    chat.type(UP)
    chat.has_input("❯ second")
    chat.type(UP)
    chat.has_input("❯ first")
    chat.type(DOWN + DOWN)
    chat.has_input("❯ a", "  b")


def test_ctrl_r_searches_the_history(chat: Chat) -> None:
    for n_turns, text in enumerate(("an apple", "a pear"), 1):
        chat.type(text + ENTER)
        chat.is_idle(n_turns)
    chat.type(ctrl("r") + "appl")
    chat.sees("search: appl")
    chat.type(ENTER)
    chat.has_input("❯ an apple")
    chat.type(ENTER)
    chat.is_idle(3)
    assert chat.submitted == ["an apple", "a pear", "an apple"]


@pytest.mark.parametrize("key", [RIGHT, ctrl("e"), ctrl("f")])
def test_a_key_accepts_the_suggestion_of_the_history(chat: Chat, key: str) -> None:
    chat.type("a long question" + ENTER)
    chat.is_idle(1)
    chat.type("a lo")
    chat.has_input("❯ a long question")
    chat.type(key + ENTER)
    chat.is_idle(2)
    assert chat.submitted == ["a long question", "a long question"]


def test_a_key_accepts_a_word_of_the_suggestion(chat: Chat) -> None:
    chat.type("a long question" + ENTER)
    chat.is_idle(1)
    chat.type("a ")
    chat.has_input("❯ a long question")
    chat.type(ALT_F + "shot" + ENTER)
    chat.is_idle(2)
    assert chat.submitted == ["a long question", "a long shot"]


def test_commands_complete_while_they_are_typed(chat: Chat) -> None:
    chat.type("/th")
    chat.sees("/thank  a word")
    assert "/think" in chat.visible
    assert "a word" in chat.visible
    chat.type(TAB)
    chat.has_input("❯ /think", *chat.input_rows[1:])
    chat.type(ENTER)  # takes it
    chat.has_input("❯ /think")
    assert chat.submitted == []


def test_the_only_completion_is_inserted_at_once_and_sent_with_the_next_key(chat: Chat) -> None:
    chat.type("/tha")
    chat.sees("a word")
    chat.type(TAB)
    chat.has_input("❯ /thank")
    chat.type(TAB)
    chat.has_input("❯ /thank")
    chat.type(ENTER)
    chat.sees("no such command: /thank")


def test_an_escape_waits_only_briefly_for_the_rest_of_a_key() -> None:
    assert waits_s([KeyPress(Keys.Escape)]) <= 0.1
    assert waits_s([KeyPress(Keys.ControlX)]) >= 0.3


def test_escape_closes_the_completions(chat: Chat) -> None:
    chat.type("/th")
    chat.sees("/thank  a word")  # the completion, not the suggestion of the history
    chat.type(TAB)
    chat.wait_for(lambda: chat.input_rows[:1] == ["❯ /think"])
    chat.type(ESCAPE)
    chat.has_input("❯ /th")


def test_tab_completes_a_file_in_a_question(chat: Chat) -> None:
    chat.type("see @o" + TAB)
    chat.has_input("❯ see @one.txt")


def test_a_command_is_echoed_above_its_output(chat: Chat) -> None:
    chat.type("/nothing" + ENTER)
    chat.sees("no such command: /nothing")
    assert "❯ /nothing\n" in chat.visible


def test_a_command_can_leave(chat: Chat) -> None:
    chat.type("/exit" + ENTER)
    assert chat.read_to_end() == 0


def test_ctrl_l_redraws_and_keeps_the_text(chat: Chat) -> None:
    chat.type("hello" + ENTER)
    chat.is_idle(1)
    before = chat.text
    chat.type("x" + ctrl("l"))
    chat.has_input("❯ x")
    chat.type(BACKSPACE)
    chat.has_input("❯")
    assert chat.text == before


def test_an_error_restores_the_terminal_and_shows_its_traceback(chat: Chat) -> None:
    chat.type("boom" + ENTER)
    assert chat.read_to_end() == 1
    assert "about to break" in chat.visible
    assert "ZeroDivisionError: this is the bug" in chat.visible
    assert chat.calls[-1] == ["close"]
    assert not chat.screen.cursor.hidden


def test_the_terminal_is_not_queried_and_not_cleared(chat: Chat) -> None:
    chat.type("lines 50" + ENTER)
    chat.is_idle(1)
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.leave()
    for sequence in (b"\x1b[6n", b"\x1b[2J", b"\x1b[3J", b"\x1b[?1049h", b"\x1b[?1000h", b"\x1b[?2026h"):
        assert sequence not in chat.raw
    assert b"\x1b[?2004h" in chat.raw
    assert chat.raw.rindex(b"\x1b[?2004l") > chat.raw.rindex(b"\x1b[?2004h")


class NoActions:
    """Actions for bindings of which no key is pressed."""

    def __getattr__(self, _name: str) -> NoActions:
        return self

    def __call__(self) -> None: ...


PRESSED = {
    ("c-c",): 'ctrl("c")',
    ("c-d",): 'ctrl("d")',
    ("c-e",): 'ctrl("e")',
    ("c-f",): 'ctrl("f")',
    ("c-g",): 'ctrl("g")',
    ("c-j",): 'ctrl("j")',
    ("c-l",): 'ctrl("l")',
    ("c-s",): 'ctrl("s")',
    ("c-t",): 'ctrl("t")',
    ("c-x", "c-e"): 'ctrl("x") + ctrl("e")',
    ("c-z",): '"C-z"',
    ("c-m",): "ENTER",
    ("c-i",): "TAB",
    ("escape", "c-m"): "ALT_ENTER",
    ("escape", "f"): "ALT_F",
    ("escape",): "ESCAPE",
    ("up",): "UP",
    ("right",): "RIGHT",
    ("<any>",): "type(",
    ("<bracketed-paste>",): "pasted(",
}
"""The bound keys, and the text in a test that presses them."""


def test_every_key_is_pressed() -> None:
    bound = {
        tuple(key.value if isinstance(key, Keys) else key for key in binding.keys)
        for binding in bindings(cast(KeyActions, NoActions())).bindings
    }
    assert bound == set(PRESSED)
    tests = ("test_key_bindings.py", "test_input_line.py", "test_fullscreen.py", "test_tmux.py")
    source = "".join(Path(__file__).with_name(name).read_text() for name in tests)
    pressed = (
        source[: source.index("\nPRESSED = {")] + source[source.index("\ndef test_every_key_is_pressed") :]
    )
    assert [written for written in PRESSED.values() if written not in pressed] == []
