"""Control sequences of any kind, cut anywhere, never reach a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_local.terminal.sanitizer import STRING_LIMIT, Sanitizer, cell_width, one_line, sanitize

STRIPPED = {
    "colors": ("a\x1b[1;31mb\x1b[0mc", "abc"),
    "cursor movement": ("a\x1b[2J\x1b[10;10Hb", "ab"),
    "window title": ("a\x1b]0;evil\x07b", "ab"),
    "hyperlink": ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    "clipboard": ("a\x1b]52;c;ZXZpbA==\x07b", "ab"),
    "device control string": ("a\x1bPq#0;2;0\x1b\\b", "ab"),
    "application command": ("a\x1b_Gf=100;AAAA\x1b\\b", "ab"),
    "privacy message and start of string": ("a\x1b^x\x1b\\b\x1bXy\x1b\\c", "abc"),
    "tmux passthrough": ("a\x1bPtmux;\x1b\x1b]52;c;eA==\x07\x1b\\b", "ab"),
    "single character": ("a\x1bcb\x1b7c\x1b(Bd", "abcd"),
    "8-bit CSI and OSC": ("a\x9b31mb\x9d0;t\x9cc", "abc"),
    "unfinished sequence": ("a\x1b[31", "a"),
    "control characters": ("a\x00\x07\x08\x0e\x7fb\x84c", "abc"),
    "line ends": ("a\r\nb\rc\u2028d\x85e\x0bf", "a\nb\nc\nd\ne\nf"),
    "tabs stay": ("a\tb\n", "a\tb\n"),
    "bidirectional controls": ("a\u202eb\u2066c\u2069\u200e\u200fd", "abcd"),
    "invisible characters": ("\ufeffa\u200bb\u2060c\U000e0041d\ufff9e", "abcde"),
    "joined emoji and scripts stay": (
        "👩\u200d👩\u200d👧 ❤\ufe0f م\u200cن",
        "👩\u200d👩\u200d👧 ❤\ufe0f م\u200cن",
    ),
    "lone surrogate": ("a\ud800b", "a\ufffdb"),
    "escape before a letter of another script": ("a\x1b中b", "a中b"),
    "escape in a sequence starts another": ("a\x1b[3\x1b[1mb", "ab"),
}


@pytest.mark.parametrize("name", STRIPPED)
def test_sequences_are_removed_completely(name: str) -> None:
    text, shown = STRIPPED[name]
    assert sanitize(text) == shown


@pytest.mark.parametrize("name", STRIPPED)
def test_a_cut_anywhere_changes_nothing(name: str) -> None:
    text, shown = STRIPPED[name]
    for cut in range(len(text) + 1):
        sanitizer = Sanitizer()
        assert sanitizer.feed(text[:cut]) + sanitizer.feed(text[cut:]) == shown


@given(
    st.lists(st.text(alphabet="\x1b\x9b\x9d\x9c\x07[]P\\;0m \r\nab中\u202e\u200d", max_size=8), max_size=12)
)
def test_any_text_in_any_pieces_gives_the_same_harmless_text(parts: list[str]) -> None:
    sanitizer = Sanitizer()
    shown = "".join(map(sanitizer.feed, parts))
    assert shown == sanitize("".join(parts))
    assert not set(shown) & set("\x1b\x9b\x9d\x9c\x07\r\u202e")
    assert sanitize(shown) == shown


def test_an_unfinished_string_swallows_its_line_at_most() -> None:
    assert sanitize("a\x1b]0;title\nthe answer") == "a\nthe answer"


def test_an_unfinished_string_swallows_a_bounded_part_of_a_long_line() -> None:
    assert sanitize("\x1b]0;" + "x" * (2 * STRING_LIMIT)).count("x") >= STRING_LIMIT


@pytest.mark.parametrize(
    ("text", "width", "line"),
    [
        ("a\n b\t\x1b[1mc", 20, "a b c"),
        ("abcdef", 4, "abc…"),
        ("中文字符", 5, "中文…"),
        ("name\u202egnp.exe", 40, "namegnp.exe"),
        ("abc", 0, ""),
    ],
)
def test_one_line_is_one_harmless_line_within_its_width(text: str, width: int, line: str) -> None:
    assert one_line(text, width) == line
    assert cell_width(line) <= width
