"""For any events, cuts and times: the same rows are committed, live rows fit, the work is linear."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from qwq_local.chat.events import Asking, ChatEvent, Page, Recalled, Said, ThinkView
from qwq_local.events import Answer, Generated, Loading, Notice, Prefill, Steered, Thinking
from qwq_local.terminal.repl.pager import PagerText
from qwq_local.terminal.sanitizer import sanitize
from tests.terminal.fake_terminal import screen_of
from tests.terminal.turn_viewer import ASKING, CLOSED, FINISHED, PLANNED, SGR, Viewer, text_of

FRAGMENTS = [
    "so ",
    "wait, ",
    "a run of words that fills more than one row of a narrow window ",
    "\n",
    "\n\n",
    " ",
    "superlongwordwithoutanyspaceatall",
    "中文，很长的段落。",
    "「",
    "🎉",
    "👩‍💻",
    "🇩🇪",
    "e\u0301",
    "ﷺ",
    "\t",
    "\r",
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202e",
    "\x00",
    "\ud800",
    "**bold** ",
    "`code` ",
    "- ",
    "> ",
    "# ",
    "```\n",
    "```python\n",
    "x = '''\n",
    "$x_1$ ",
    "\\[",
    "| a | b |\n|---|---|\n",
    "| c | d |\n",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=6),
    st.lists(st.sampled_from(FRAGMENTS), min_size=15, max_size=50),
).map("".join)
JOINED = re.compile("[\u200d\U0001f1e6-\U0001f1ff]")
SIZES = [(20, 24), (33, 4), (80, 24), (200, 50)]
VIEWS = list(ThinkView)
Part = tuple[Callable[[str], ChatEvent] | None, str]
THOUGHT_PART = st.tuples(st.sampled_from([Thinking, Thinking, Steered, Notice]), TEXT)
ANSWER_PART = st.tuples(st.sampled_from([Answer, Answer, Notice]), TEXT)
TURN = st.tuples(st.lists(THOUGHT_PART, max_size=4), st.lists(ANSWER_PART, max_size=3)).map(
    lambda parts: [*parts[0], (None, ""), *parts[1]]
)


def events_of(parts: Sequence[Part], n_characters: int) -> list[ChatEvent]:
    """A turn, its thinking and answer in pieces of `n_characters`."""
    events: list[ChatEvent] = [ASKING, PLANNED]
    for kind, text in parts:
        if kind is None:
            events.append(CLOSED)
        elif kind in (Thinking, Answer):
            starts = range(0, len(text), n_characters)
            events += [kind(text[start : start + n_characters]) for start in starts]
        else:
            events.append(kind(text))
    return [*events, FINISHED]


def run(viewer: Viewer, events: Sequence[ChatEvent], every: int, full_after: int = -1) -> Viewer:
    """Show events with a frame after every few; change to the full view after `full_after` events."""
    for index, event in enumerate(events):
        if index == full_after:
            while viewer.view.cycle_view() is not ThinkView.FULL:
                pass
        viewer.show(event, each_s=0.01)
        if index % every == 0:
            viewer.frame()
    viewer.frame()
    return viewer


def without_spaces(text: str) -> str:
    return re.sub(r"\s", "", text)


def texts(viewer: Viewer) -> list[str]:
    """Committed rows without styles: the colors of code may depend on the lines that were there."""
    return [text_of(row) for row in viewer.final]


@settings(max_examples=150)
@given(TURN, st.sampled_from(VIEWS), st.sampled_from(SIZES), st.integers(1, 9), st.integers(1, 40))
def test_committed_rows_depend_neither_on_pieces_nor_on_frames(
    turn: list[Part], view: ThinkView, size: tuple[int, int], short: int, every: int
) -> None:
    has_code = any("`" in text for _, text in turn)
    all_at_once = run(Viewer(view, size), events_of(turn, 1000), 1000)
    for events, frames in ((events_of(turn, short), every), (events_of(turn, 7 * short), 1)):
        viewer = run(Viewer(view, size), events, frames)
        if has_code:
            assert texts(viewer) == texts(all_at_once)
        else:
            assert viewer.final == all_at_once.final


@pytest.mark.parametrize("text", ["word " * 500 + "中" * 2000, "x" * 4500])
@pytest.mark.parametrize("size", SIZES[1:3])
def test_endless_lines_are_broken_at_the_same_places(text: str, size: tuple[int, int]) -> None:
    for view, kind in ((ThinkView.FULL, Thinking), (ThinkView.OFF, Answer)):
        often, once = (
            run(Viewer(view, size), [ASKING, *events_of([(kind, text)], n_characters)[2:]], 1)
            for n_characters in (100, 10**6)
        )
        assert often.final == once.final
        assert without_spaces("".join(often.committed()[2:])) == without_spaces(text)


@settings(max_examples=60)
@given(TURN, st.sampled_from(VIEWS), st.integers(0, 60), st.integers(1, 9), st.integers(1, 40))
def test_a_thought_unfolded_midway_is_committed_whole(
    turn: list[Part], view: ThinkView, full_after: int, every: int, other: int
) -> None:
    events = events_of(turn, 11)
    first = run(Viewer(view, (40, 24)), events, every, full_after)
    second = run(Viewer(view, (40, 24)), events, other, full_after)
    assert texts(first) == texts(second)


@settings(max_examples=60)
@given(TURN, st.sampled_from(VIEWS), st.lists(st.sampled_from(SIZES), min_size=1, max_size=4), st.booleans())
def test_live_rows_fit_the_window_and_only_styles_are_written(
    turn: list[Part], view: ThinkView, sizes: list[tuple[int, int]], has_color: bool
) -> None:
    """Also while the window changes."""
    viewer = Viewer(view, sizes[0], has_color=has_color)
    for index, event in enumerate(events_of(turn, 13)):
        viewer.size = columns, rows = sizes[index // 3 % len(sizes)]
        frame = viewer.show(event, each_s=0.1).frame()
        assert len(frame.live) <= max(1, min(10, rows // 3))
        for row in frame.live:
            assert row.cells <= columns, row
            # Terminals disagree about the width of joined emoji, and live rows are drawn without wrapping.
            if not JOINED.search(row.written):
                assert len(screen_of(text_of(row), columns)) <= 1, row
        written = "".join(row.written for row in (*frame.final, *frame.live)) + "".join(frame.status)
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u202e\ud800]", SGR.sub("", written))
        assert has_color or "\x1b" not in written


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([Thinking, Steered]), TEXT), max_size=5))
def test_every_word_of_a_thought_shown_in_full_is_committed_once_and_in_order(parts: list[Part]) -> None:
    viewer = run(Viewer(ThinkView.FULL, (33, 24)), events_of(parts, 7), 3)
    shown = without_spaces("".join(viewer.committed()[2:])).replace("▏you:", "").replace("▏", "")
    assert shown == without_spaces(sanitize("".join(text for _, text in parts)))


@settings(max_examples=60)
@given(TEXT, st.sampled_from(SIZES))
def test_the_tail_is_the_end_of_the_full_view(text: str, size: tuple[int, int]) -> None:
    tail = Viewer(ThinkView.TAIL, size).show(ASKING, Thinking(text)).live()
    full = Viewer(ThinkView.FULL, size).show(ASKING, Thinking(text))
    whole = full.committed() + full.live()
    rows = tail[1:] if len(tail) > 1 else [row for row in tail if not row.startswith("▾")]
    assert not rows or whole[-len(rows) :] == rows


@settings(max_examples=40)
@given(TEXT, TEXT)
def test_a_recalled_turn_looks_like_the_streamed_one(question: str, answer: str) -> None:
    recalled = Viewer().show(Recalled("How many r?", 3, 2431, 72.4, answer))
    streamed = run(Viewer(), events_of([(None, ""), (Answer, answer)], 10**6), 10**6)
    assert [row for row in streamed.committed() if "q8_0" not in row] == recalled.committed()


@settings(max_examples=40)
@given(TEXT, st.lists(TEXT, max_size=2), st.sampled_from([20, 80, 200]))
def test_a_page_has_every_word_and_fits(text: str, steered: list[str], columns: int) -> None:
    whole = "\n\n".join([text, *steered])
    page = PagerText(Page("thought 3", whole, tuple(steered)))
    page.wrap(columns)
    rows = ["".join(part[1] for part in page.fragments(row, None)) for row in range(len(page.rows))]
    assert all(cell_len(row) <= columns for row in rows)
    shown = without_spaces("".join(rows)).replace("▏you:", "")
    assert shown == without_spaces(sanitize(whole))


class Work:
    """Counts the characters passed to the terminal's functions, and the calls."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/terminal/" in frame.f_code.co_filename:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            texts = [value for name in names if isinstance(value := frame.f_locals.get(name), str)]
            self.done += 1 + sum(map(len, texts))


def work_of(view: ThinkView, events: Sequence[ChatEvent]) -> int:
    work, viewer = Work(), Viewer(view)
    sys.setprofile(work)
    try:
        run(viewer, events, 30)
    finally:
        sys.setprofile(None)
    return work.done


def long_thought(n_tokens: int) -> list[ChatEvent]:
    ends = {0: ". ", 89: ".\n\n"}
    events: list[ChatEvent] = [ASKING]
    for index in range(n_tokens):
        events.append(Thinking(f"word{index % 1000}{ends.get(index % 90, ' ')}"))
        if index % 8 == 0:
            events.append(Generated(index, (1,), index + 1))
    return [*events, CLOSED, FINISHED]


@pytest.mark.parametrize("view", VIEWS)
def test_twice_the_thought_is_twice_the_work(view: ThinkView) -> None:
    assert work_of(view, long_thought(4_000)) <= 2.2 * work_of(view, long_thought(2_000))


@pytest.mark.parametrize(("end", "n_lines"), [("\n\n", 800), ("\n", 240), (" ", 360)])
def test_twice_the_answer_is_twice_the_work(end: str, n_lines: int) -> None:
    answers: list[list[ChatEvent]] = [
        [ASKING, *(Answer(f"line {index} with **bold** text{end}") for index in range(n)), FINISHED]
        for n in (n_lines // 2, n_lines)
    ]
    once, twice = (work_of(ThinkView.OFF, events) for events in answers)
    assert twice <= 2.2 * once


def test_work_for_a_text_without_line_breaks_is_linear() -> None:
    def events(n_pieces: int) -> list[ChatEvent]:
        return [ASKING, *(Thinking("x" * 1000) for _ in range(n_pieces)), CLOSED, FINISHED]

    for view in VIEWS:
        assert work_of(view, events(240)) <= 2.2 * work_of(view, events(120))


def test_of_huge_texts_only_the_shown_part_is_processed() -> None:
    work, viewer = Work(), Viewer()
    events: list[ChatEvent] = [
        Asking("q " * 500_000, 1),
        Said(("s" * 10**6,), is_error=True),
        Loading("m" * 10**6, 0.5),
        Notice("n " * 500_000),
        Prefill(0, 10, 0),
    ]
    sys.setprofile(work)
    try:
        run(viewer, events, 1)
    finally:
        sys.setprofile(None)
    assert len(viewer.final) < 300
    assert work.done < 20_000_000
