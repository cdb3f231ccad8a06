"""A streamed answer looks like one rendered at once; committed rows never change."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_local.terminal.markdown import FRAME_S, MarkdownWriter, markdown_rows
from tests.terminal.fake_terminal import Clock, Terminal, pieces, screen_of

SAMPLE = """# Counting

The word **strawberry** has *three* letters `r`; see [the proof](https://example.org/p).
Cost $5 and $10, $x_1^2 + y_1^2$, \\(a_1 \\cdot b_2\\), 2*3*4, snake_case_name, vector<int>.

1. First we write the word out, letter by letter, and count those that are equal to the letter r.
   - nested **bold**
   - another
2. Second:
   ```python
   def count(word: str) -> int:
       return sum(1 for c in word if c == "r")
   ```

| letter | count |
|:-------|------:|
| r | 3 |
| 一个 | **1** |

> A quotation,
> and `code`.

很长的中文段落，用来测试没有空格的文本如何换行。QwQ 会先思考，然后回答（例如数字母）。 🎉 done.

\\[
\\int_0^1 x_1 * x_2 \\, dx
\\]
---
The answer is \\boxed{\\{3\\}}.
"""
FRAGMENTS = [
    "word ",
    "**bold** ",
    "*em* ",
    "`code` ",
    "**",
    "*",
    "`",
    "_",
    "[a](http://x.y) ",
    "[1] ",
    "$x_1$ ",
    "$5 ",
    *(
        "\\(a\\) ",
        "\\boxed{3} ",
        "\\[",
        "\\]",
        "\n",
        "\n\n",
        "- ",
        "  - ",
        "1. ",
        "# ",
        "> ",
        "```py\n",
        "---\n",
    ),
    "| a | b |\n|---|---|\n",
    "| c | d |\n",
    "中文，很长的段落。",
    "🎉",
    "~~x~~",
    "&amp;",
    "\\",
    "    ",
    "\t",
    "superlongwordwithoutanyspace",
    "a run of words that fills more than one row of the window ",
]


def render_markdown(text: str, columns: int, has_color: bool = True) -> str:
    """A whole text as it is written to a terminal at once."""
    return "".join(f"{row.written}\n" for row in markdown_rows(text, columns, has_color))


def stream(parts: list[str], terminal: Terminal, has_color: bool = True) -> None:
    clock = Clock()
    writer = MarkdownWriter(terminal.output(has_color=has_color), clock)
    for part in parts:
        writer.feed(part)
        clock.now += 1
    writer.close()


@pytest.mark.parametrize(("columns", "rows"), [(20, 10), (80, 24), (200, 50)])
@pytest.mark.parametrize("cuts", [[1], [3, 1, 7], [1000]])
def test_a_streamed_answer_looks_like_one_rendered_at_once(columns: int, rows: int, cuts: list[int]) -> None:
    terminal = Terminal(columns, rows)
    stream(pieces(SAMPLE, cuts), terminal)
    assert terminal.lines() == screen_of(render_markdown(SAMPLE, columns), columns, rows)


@pytest.mark.parametrize(
    ("opener", "closer"),
    [
        ("**", "**"),
        ("*", "*"),
        ("`", "`"),
        ("~~", "~~"),
        ("[", "](http://x.y)"),
        ("\\(", "\\)"),
        ("\\text{", "}"),
    ],
)
def test_a_span_that_closes_many_rows_later_is_still_right(opener: str, closer: str) -> None:
    text = f"before {opener}{'a_1 word ' * 20}end{closer} after " + "more " * 20
    terminal = Terminal(20, 6)
    stream(pieces(text, [1]), terminal)
    assert terminal.lines() == screen_of(render_markdown(text, 20), 20, 6)


def test_a_table_head_below_a_paragraph_is_not_committed_as_text() -> None:
    text = "Here it is:\n| a long first head | a long second head |\n|---|---|\n| 1 | 2 |\n"
    terminal = Terminal(20, 3)
    stream(pieces(text, [1]), terminal)
    assert terminal.lines() == screen_of(render_markdown(text, 20), 20, 3)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join),
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.sampled_from([(20, 3), (40, 12), (80, 24)]),
)
def test_any_markdown_in_any_pieces_looks_like_one_rendered_at_once(
    text: str, cuts: list[int], size: tuple[int, int]
) -> None:
    terminal = Terminal(*size)
    stream(pieces(text, cuts), terminal)
    assert terminal.lines() == screen_of(render_markdown(text, size[0]), *size)


def test_every_line_of_a_long_answer_appears_once_and_in_order() -> None:
    terminal = Terminal()
    stream(pieces("".join(f"line {i} with **bold** text\n" for i in range(1000)), [2500]), terminal)
    assert terminal.lines() == [f"line {i} with bold text" for i in range(1000)]


def test_a_long_paragraph_scrolls_away_while_it_is_open() -> None:
    terminal, clock = Terminal(40, 12), Clock()
    writer = MarkdownWriter(terminal.output(), clock)
    words = [f"word{i}" for i in range(300)]
    for word in words:
        writer.feed(f"{word} ")
        clock.now += 1
    assert " ".join(terminal.lines()).split() == words


@pytest.mark.parametrize(
    ("line", "n_least"),
    [
        ("    x{} = call('text', {})\n", 100),
        ("- item {} of **{}**\n", 100),
        ("| {} | {} |\n", 200),
        ("word **{}** and {} more\n\n", 100),
    ],
)
def test_twice_the_text_costs_twice_the_output(line: str, n_least: int) -> None:
    written = []
    for n_lines in (n_least, 2 * n_least):
        head = (
            "```python\n" if line.startswith(" ") else "| a | b |\n|--|--|\n" if line.startswith("|") else ""
        )
        terminal = Terminal()
        stream(pieces(head + "".join(line.format(i, i) for i in range(n_lines)), [61]), terminal)
        written.append(len(terminal.written))
    assert written[1] <= 2.3 * written[0]


def test_a_code_block_of_600_lines_is_kept_to_the_character() -> None:
    code = [f"\tif x{i} < {i}:  # {'long ' * (i % 30)}".rstrip() for i in range(600)]
    terminal = Terminal(240, 24)
    stream(pieces("```go\n" + "\n".join(code) + "\n```\n", [9970]), terminal)
    assert terminal.lines() == ["```go", *(line.expandtabs(8) for line in code), "```"]


def test_mathematics_and_code_like_text_stay_as_written() -> None:
    shown = " ".join(screen_of(render_markdown(SAMPLE, 200), 200))
    for verbatim in (
        "$5 and $10, $x_1^2 + y_1^2$, \\(a_1 \\cdot b_2\\), 2*3*4, snake_case_name, vector<int>.",
        "\\int_0^1 x_1 * x_2 \\, dx",
        "\\boxed{\\{3\\}}",
        "the proof (https://example.org/p)",
    ):
        assert verbatim in shown


def test_a_table_keeps_the_columns_of_its_first_rows() -> None:
    rows = "".join(f"| {i} | cell {i} |\n" for i in range(40))
    lines = screen_of(render_markdown(f"| n | text |\n|--:|---|\n{rows}", 80))
    assert lines[:3] == ["n │ text", "──┼───────", "0 │ cell 0"]
    assert {line.index("│") for line in lines[2:12]} == {2}


def test_a_table_too_wide_for_the_window_becomes_lines() -> None:
    text = "|a|b|c|d|e|\n|-|-|-|-|-|\n" + "|" + "wide cell|" * 5
    assert screen_of(render_markdown(text, 20), 20)[0] == "a | b | c | d | e"


def test_chinese_breaks_between_characters_and_not_before_punctuation() -> None:
    assert screen_of(render_markdown("我们先思考然后回答，这样。", 18), 18) == [
        "我们先思考然后回",
        "答，这样。",
    ]


def test_at_most_twenty_frames_a_second_are_drawn() -> None:
    terminal, clock = Terminal(), Clock()
    writer = MarkdownWriter(terminal.output(), clock)
    for _ in range(1000):
        writer.feed("word ")
        clock.now += 0.001
    assert terminal.writes <= 1 / FRAME_S + 1


def test_only_harmless_sequences_are_written() -> None:
    terminal = Terminal()
    stream(pieces(SAMPLE, [5]), terminal)
    allowed = re.compile(r"\x1b(?:\[(?:[\d;]*m|\d*[ABC]|[JK]|\?(?:7|25)[lh])|[78])")
    assert "\x1b" not in allowed.sub("", terminal.written)
    for mode in ("7", "25"):
        assert terminal.written.count(f"\x1b[?{mode}l") == terminal.written.count(f"\x1b[?{mode}h")


def test_control_sequences_of_the_model_are_removed() -> None:
    evil = "a\x1b[2J\x1b]52;c;eA==\x07b `c\x9b31md` &#27;[31m &#x202e;\n\n```\n\x1b[1mx\n```\n"
    terminal = Terminal()
    stream(pieces(evil, [2]), terminal)
    assert "\x1b[2J" not in terminal.written
    assert not set(terminal.written) & set("\x9b\x07\u202e")
    assert terminal.lines()[0].startswith("ab cd")


def test_no_color_leaves_bold_but_no_color() -> None:
    terminal = Terminal()
    stream([SAMPLE], terminal, has_color=False)
    assert not re.search(r"\x1b\[[\d;]*\b(?:3[0-8]|9[0-7])\b[\d;]*m", terminal.written)
    assert "\x1b[1m" in terminal.written


@pytest.mark.parametrize(("columns", "rows"), [(30, 24), (120, 40), (60, 40)])
def test_a_resize_touches_no_committed_line(columns: int, rows: int) -> None:
    terminal, clock = Terminal(60, 24), Clock()
    writer = MarkdownWriter(terminal.output(), clock)
    paragraphs = [" ".join(f"p{i}w{j}" for j in range(60)) for i in range(6)]
    for index, part in enumerate(pieces("\n\n".join(paragraphs), [9])):
        writer.feed(part)
        clock.now += 1
        if index == 90:
            committed = [line for line in terminal.lines() if line][:-6]
            terminal.resize(columns, rows)
    writer.close()
    shown = [line for line in terminal.lines() if line]
    if columns >= 60:  # The emulator crops the lines of a narrower window.
        assert shown[: len(committed)] == committed
        assert " ".join(shown).split() == " ".join(paragraphs).split()
    else:
        assert [line[:30].rstrip() for line in committed] == shown[: len(committed)]


def test_an_empty_answer_writes_nothing() -> None:
    terminal = Terminal()
    stream([], terminal)
    assert terminal.written == ""
