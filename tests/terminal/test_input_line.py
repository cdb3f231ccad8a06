"""The input line on a real terminal: typing, large pastes, blocks, history across runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress

from qwq_local.terminal.repl.input_line import block_content, is_block_open
from qwq_local.terminal.repl.paste import MAX_CHARACTERS, MAX_INPUT, MAX_LINES, RUN, PasteParser, Pastes
from tests.terminal.repl_terminal import (
    ALT_ENTER,
    BACKSPACE,
    CTRL_UNDERSCORE,
    ENTER,
    UP,
    Chat,
    Shared,
    chatting,
    ctrl,
    pasted,
)

LEFT = "\x1b[D"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    chats = Shared(tmp_path_factory.mktemp("chats"))
    yield chats
    chats.end()


@pytest.fixture
def chat(shared: Shared) -> Chat:
    return shared.chat()


def text_of(lines: int) -> str:
    return "".join(f"pasted line {n}\n" for n in range(1, lines + 1)).rstrip("\n")


def test_a_small_paste_is_in_the_line_unchanged(chat: Chat) -> None:
    chat.type(pasted("one\r\ntwo\rthree"))
    chat.has_input("❯ one", "  two", "  three")
    chat.type(ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["one\ntwo\nthree"]


def test_a_large_paste_is_a_marker_and_is_sent_in_full(chat: Chat) -> None:
    text = text_of(214)
    chat.type("explain " + pasted(text) + " please")
    chat.has_input("❯ explain [pasted 214 lines] please")
    chat.type(ENTER)
    chat.is_idle(1)
    assert chat.submitted == [f"explain {text} please"]


def test_a_marker_is_deleted_and_restored_as_one(chat: Chat) -> None:
    chat.type("a" + pasted(text_of(30)) + pasted(text_of(40)))
    chat.has_input("❯ a[pasted 30 lines][pasted 40 lines]")
    chat.type(BACKSPACE)
    chat.has_input("❯ a[pasted 30 lines]")
    chat.type(CTRL_UNDERSCORE)
    chat.has_input("❯ a[pasted 30 lines][pasted 40 lines]")
    chat.type(LEFT + LEFT + BACKSPACE + "b")
    chat.has_input("❯ b[pasted 30 lines][pasted 40 lines]")
    chat.type(ENTER)
    chat.is_idle(1)
    assert chat.submitted == [f"b{text_of(30)}{text_of(40)}"]


def test_a_typed_marker_is_plain_text(chat: Chat) -> None:
    chat.type("[pasted 30 lines]" + BACKSPACE + ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["[pasted 30 lines"]


def test_a_megabyte_is_pasted_at_once_and_sent_in_full(chat: Chat) -> None:
    text = "\n".join(f"{n:>9} " + "x" * 89 for n in range(10_000))
    assert len(text) > 990_000
    chat.type(pasted(text) + ENTER)
    chat.is_idle(1)
    assert chat.submitted == [text]


def test_a_line_of_five_megabytes_does_not_hang(chat: Chat) -> None:
    text = "y" * 5_000_000
    chat.type(pasted(text))
    chat.has_input("❯ [pasted 5,000,000 characters]")
    chat.type(ENTER)
    chat.is_idle(1)
    assert chat.submitted == [text]


def test_a_terminal_that_marks_no_paste_is_no_slower(chat: Chat) -> None:
    text = "z" * 300_000
    chat.type(text + ENTER)
    chat.is_idle(1)
    assert chat.submitted == [text]


def test_queued_pastes_come_back_as_markers(chat: Chat) -> None:
    chat.type("hold" + ENTER)
    chat.sees("step 0.")
    chat.type("read " + pasted(text_of(25)) + ENTER)
    chat.sees("⋯ waiting: read [pasted 25 lines]")
    chat.type(UP)
    chat.has_input("❯ read [pasted 25 lines]")


def test_bytes_that_are_not_text_do_not_break_the_line(chat: Chat) -> None:
    chat.type(pasted("bell\x07 escape\x1b[31m \U000f0000 end"))
    chat.wait_for(lambda: "end" in chat.visible)
    chat.type(ENTER)
    chat.is_idle(1)
    assert chat.submitted == ["bell\x07 escape\x1b[31m \ufffd end"]


def test_the_next_run_has_the_entries_with_pastes_as_markers(tmp_path: Path) -> None:
    file = tmp_path / "private" / "history"
    with chatting(tmp_path, "--history", str(file)) as chat:
        chat.type("first" + ALT_ENTER + "of two" + ENTER)
        chat.is_idle(1)
        chat.type("read " + pasted(text_of(25)) + ENTER)
        chat.is_idle(2)
        chat.leave()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    with chatting(tmp_path, "--history", str(file)) as chat:
        chat.type(UP)
        chat.has_input("❯ read [pasted 25 lines]")
        chat.type(UP + UP)
        chat.has_input("❯ first", "  of two")
        chat.type(ctrl("c") + ctrl("r") + "read")
        chat.sees("search: read")
        chat.type(ENTER + ENTER)
        chat.is_idle(1)
        assert chat.submitted[-1] == f"read {text_of(25)}"


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.type("secret" + ENTER)
        chat.is_idle(1)
        chat.type(UP)
        chat.has_input("❯ secret")
        chat.type(ctrl("c"))
        chat.leave()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "log"] == []


@pytest.mark.parametrize(
    ("text", "is_open", "content"),
    [
        ("plain", False, "plain"),
        ('"""', True, '"""'),
        ('"""one', True, '"""one'),
        ('"""one"""', False, "one"),
        ('"""\none\n"""', False, "one"),
        ('"""one\ntwo"""  ', False, "one\ntwo"),
        ('"""a "quoted" one\n"""', False, 'a "quoted" one'),
        ('"""doc"""\nimport os', False, '"""doc"""\nimport os'),
        ('say """hi"""', False, 'say """hi"""'),
        ('"""""" ', False, ""),
        ('"""a""" b\nc"""', False, 'a""" b\nc'),
    ],
)
def test_a_block_ends_where_a_line_ends_with_its_quotes(text: str, is_open: bool, content: str) -> None:
    assert is_block_open(text) is is_open
    assert block_content(text) == content


def test_a_paste_becomes_a_marker_by_its_lines_its_length_or_the_input() -> None:
    pastes = Pastes()
    assert pastes.take_in("x\n" * MAX_LINES, 0) != "x\n" * MAX_LINES
    assert pastes.take_in("x\n" * (MAX_LINES - 1), 0) == "x\n" * (MAX_LINES - 1)
    assert pastes.take_in("x" * MAX_CHARACTERS, 0) == "x" * MAX_CHARACTERS
    assert len(pastes.take_in("x" * (MAX_CHARACTERS + 1), 0)) == 1
    assert len(pastes.take_in("x" * 100, MAX_INPUT)) == 1
    assert pastes.take_in("x", MAX_INPUT) == "x"


def test_an_entry_in_parts_equals_the_joined_one() -> None:
    pastes = Pastes()
    entry = f"a {pastes.marker('one')} b {pastes.marker('two')}"
    parts = pastes.parts(entry)
    assert parts == ["a ", "one", " b ", "two", ""]
    joined = pastes.joined(parts)
    assert pastes.expand(joined) == pastes.expand(entry) == "a one b two"
    assert pastes.shown(joined) == "a [pasted 3 characters] b [pasted 3 characters]"


def keys_of(parser_type: type[Vt100Parser], data: str, cuts: list[int]) -> list[tuple[str, str]]:
    """The key presses for data that arrives in pieces, those of a run of text joined."""
    keys: list[KeyPress] = []
    parser = parser_type(keys.append)
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        parser.feed(data[start:end])
    parser.flush()
    joined: list[tuple[str, str]] = []
    for key in keys:
        is_text = len(key.key) == 1
        if is_text and joined and joined[-1][0] == "text":
            joined[-1] = ("text", joined[-1][1] + key.data)
        else:
            joined.append(("text" if is_text else key.key, key.data))
    return joined


def test_keys_and_pastes_equal_those_of_prompt_toolkits_own_parser() -> None:
    """Its parser is the oracle, for every cut of the input."""
    long_run = "w" * (3 * RUN)
    data = (
        f"ab\x1b[A{long_run}\x1b[200~paste \x1b[31m {long_run}\x1b[20\x1b[201~{long_run}\r\x1bOA\x1b[1;5C"
        f"{long_run}\x1bf中文{'字' * 2 * RUN}\x1b[200~\x1b[201~\x1b[200~two\x1b[201~\x03\x1b[3~9"
    )
    random_cuts = random.Random(7)
    expected = keys_of(Vt100Parser, data, [])
    assert any(key == "<bracketed-paste>" and text == "two" for key, text in expected)
    for cut in range(1, len(data)):
        assert keys_of(PasteParser, data, [cut]) == expected
    for _ in range(100):
        cuts = sorted(random_cuts.sample(range(1, len(data)), 12))
        assert keys_of(PasteParser, data, cuts) == expected
