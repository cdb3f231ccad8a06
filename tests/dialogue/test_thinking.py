"""The thinking parser: step tables, every cut, a reference, and its cost."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_local.dialogue.thinking import (
    Closed,
    CodeTracker,
    Part,
    ThinkingParser,
)
from qwq_local.events import Answer, Thinking

Merged = list[tuple[str, str]]

FENCED = "Write:\n```html\n<think>x</think>\n```\nDone."
WHOLE_TEXTS: list[tuple[str, str, Merged]] = [
    ("plain", "I think.\n</think>\n\nYes.", [("T", "I think.\n"), ("C", ""), ("A", "Yes.")]),
    ("leading newline", "\nI think.</think>Yes.", [("T", "I think."), ("C", ""), ("A", "Yes.")]),
    ("leading tag", "<think>\nI think.</think>Yes.", [("T", "I think."), ("C", ""), ("A", "Yes.")]),
    ("tag twice", "<think>\n<think>\nHm <think>so</think>Y", [("T", "Hm so"), ("C", ""), ("A", "Y")]),
    ("empty thinking", "<think>\n\n</think>\n\nYes.", [("C", ""), ("A", "Yes.")]),
    ("never closed", "I think < 3 and </thin", [("T", "I think < 3 and </thin")]),
    ("closed twice", "a</think>\n\n</think>\nYes.", [("T", "a"), ("C", ""), ("A", "Yes.")]),
    ("nothing after", "a</think>\n\n", [("T", "a"), ("C", "")]),
    (
        "reopened",
        "a</think>\n<think>\nb</think>\n\nYes.",
        [("T", "a"), ("C", ""), ("T", "b"), ("C", ""), ("A", "Yes.")],
    ),
    ("stray close", "a</think>Yes.\n</think>\n\nNo.", [("T", "a"), ("C", ""), ("A", "Yes.\n\n\nNo.")]),
    (
        "explained pair",
        "a</think>It is <think>x</think>, ok</think>.",
        [("T", "a"), ("C", ""), ("A", "It is <think>x</think>, ok.")],
    ),
    ("inline code", "a</think>Use `</think>` here.", [("T", "a"), ("C", ""), ("A", "Use `</think>` here.")]),
    (
        "double backticks",
        "a</think>``x`</think>`` and</think>.",
        [("T", "a"), ("C", ""), ("A", "``x`</think>`` and.")],
    ),
    ("fenced", f"a</think>{FENCED}", [("T", "a"), ("C", ""), ("A", FENCED)]),
    (
        "after the fence",
        "a</think>~~~\n`\n</think>\n~~~\nb</think>",
        [("T", "a"), ("C", ""), ("A", "~~~\n`\n</think>\n~~~\nb")],
    ),
    (
        "glued to the closing fence",
        "a</think>```\nx\n```</think>\ny</think>",
        [("T", "a"), ("C", ""), ("A", "```\nx\n```\ny")],
    ),
    (
        "a lone backtick ends with its paragraph",
        "a</think>It`s\n\nso</think>.",
        [("T", "a"), ("C", ""), ("A", "It`s\n\nso.")],
    ),
]


def merge(parts: Iterable[Part]) -> Merged:
    merged: Merged = []
    for part in parts:
        kind, text = ("C", "") if isinstance(part, Closed) else (type(part).__name__[0], part.text)
        if kind != "C" and merged and merged[-1][0] == kind:
            merged[-1] = (kind, merged[-1][1] + text)
        else:
            merged.append((kind, text))
    return merged


def parse(pieces: Iterable[str], *, is_thinking: bool = True) -> Merged:
    parser = ThinkingParser(is_thinking=is_thinking)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return merge(parts + parser.flush())


@pytest.mark.parametrize(
    ("text", "expected"), [row[1:] for row in WHOLE_TEXTS], ids=[r[0] for r in WHOLE_TEXTS]
)
def test_a_text_parses_the_same_at_every_cut(text: str, expected: Merged) -> None:
    assert parse([text]) == expected
    assert parse(text) == expected
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            assert parse([text[:first], text[first:second], text[second:]]) == expected


Step = tuple[str, list[Part], bool]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [
                ("\n", [], True),
                ("So </", [Thinking("So ")], True),
                ("think", [], True),
                (">", [Closed()], False),
                ("\n\n", [], False),
                ("Yes", [Answer("Yes")], False),
            ],
            id="a close in three pieces",
        ),
        pytest.param(
            [
                ("a <", [Thinking("a ")], True),
                (" b", [Thinking("< b")], True),
                ("<thin", [], True),
                ("g>", [Thinking("<thing>")], True),
            ],
            id="what only looked like a tag is given back",
        ),
        pytest.param(
            [
                ("a</think>", [Thinking("a"), Closed()], False),
                (" <thi", [], False),
                ("nk>\n", [], True),
                ("b", [Thinking("b")], True),
            ],
            id="reopened at the start of the answer",
        ),
        pytest.param(
            [
                (
                    "a</think>b</think>c",
                    [Thinking("a"), Closed(), Answer("b"), Answer("c")],
                    False,
                )
            ],
            id="all in one piece",
        ),
    ],
)
def test_each_piece_yields_only_certain_parts(steps: list[Step]) -> None:
    parser = ThinkingParser()
    for text, parts, is_thinking in steps:
        assert parser.feed(text) == parts
        assert parser.is_thinking is is_thinking


def test_flush_yields_held_text_and_the_thinking_stays_open() -> None:
    parser = ThinkingParser()
    assert parser.feed("so</thi") == [Thinking("so")]
    assert parser.flush() == [Thinking("</thi")]
    assert parser.flush() == []
    assert parser.is_thinking


def test_a_parser_started_in_the_answer_closes_nothing() -> None:
    assert parse(["\nYes", ".</think>"], is_thinking=False) == [("A", "Yes.")]
    assert parse(["<think>a</think>b"], is_thinking=False) == [("T", "a"), ("C", ""), ("A", "b")]


# The reference: the same rules over the whole text at once, quadratic and by regular expressions.
# A removed tag leaves \x1f, whitespace that is not a newline, to keep its neighbours apart.


def in_code(text: str) -> bool:
    fence, ticks = "", 0
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.strip() and number < len(lines) - 1:
            ticks = 0
        lead = re.match(r"\s*(`{3,}|~{3,})", line)
        rest = line[lead.end() :] if lead else ""
        if fence:
            if lead and lead[1].startswith(fence) and not rest.strip():
                fence = ""
            continue
        if lead:
            ticks = 0
            if lead[1][0] == "~" or "`" not in rest:
                fence = lead[1]
                continue
        for run in re.findall("`+", line):
            ticks = len(run) if not ticks else 0 if len(run) == ticks else ticks
    return bool(fence or ticks)


def reference_answer(text: str) -> str:
    kept, opened = "", 0
    for part in re.split("(</?think>)", text):
        if part in ("<think>", "</think>") and not in_code(kept):
            opened += 1 if part == "<think>" else -1
            if opened < 0:
                opened, part = 0, "\x1f"
        kept += part
    return kept.replace("\x1f", "")


def reference(text: str) -> Merged:
    thinking, closed, rest = text.partition("</think>")
    body = re.sub("<think>", "", re.sub(r"\A(?:\s|<think>)+", "", thinking))
    merged = [("T", body)] if body else []
    if not closed:
        return merged
    merged.append(("C", ""))
    rest = re.sub(r"\A(?:\s|</think>)+", "", rest)
    if rest.startswith("<think>"):
        return merged + reference(rest.removeprefix("<think>"))
    answer = reference_answer(rest)
    return merged + ([("A", answer)] if answer else [])


SOUP = ["<think>", "</think>", "<", "</", "thi", "nk>", "`", "``", "```", "~~~", "\n", "\n\n", " ", "a", "b."]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(SOUP), max_size=40), st.integers(1, 9))
def test_tag_soup_parses_like_the_reference_at_any_cut(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    expected = reference(text)
    assert parse([text]) == expected
    assert parse(pieces) == expected
    assert parse(text[i : i + width] for i in range(0, len(text), width)) == expected


@settings(max_examples=200)
@given(st.lists(st.sampled_from(SOUP), max_size=30))
def test_soup_in_the_answer_parses_like_the_reference(pieces: list[str]) -> None:
    text = "x</think>y" + "".join(pieces)
    assert parse(text) == parse([text]) == reference(text)


@given(st.lists(st.sampled_from(SOUP), max_size=30))
def test_the_code_tracker_agrees_with_the_reference(pieces: list[str]) -> None:
    tracker = CodeTracker()
    tracker.feed("".join(pieces))
    assert tracker.inside() == in_code("".join(pieces))


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of Python the action executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("unit", ["a", "<", "</think", "`", "``` ", " \n", "<think>"])
def test_work_is_linear_and_memory_does_not_grow(unit: str) -> None:
    """Counted lines miss copies made in C, so the parser's state must stay small as well."""

    def run(length: int) -> ThinkingParser:
        parser = ThinkingParser()
        for char in "x</think>y" + unit * (length // len(unit)):
            parser.feed(char)
        return parser

    short, long = lines_run(lambda: run(2_000)), lines_run(lambda: run(8_000))
    assert long < 4.2 * short
    assert len(pickle.dumps(run(8_000))) < len(pickle.dumps(run(2_000))) + 20


def test_no_part_is_empty() -> None:
    parser = ThinkingParser()
    for char in "<think></think></think> <think>a</think>\n``</think>``</think>":
        assert all(isinstance(part, Closed) or part.text for part in parser.feed(char))
