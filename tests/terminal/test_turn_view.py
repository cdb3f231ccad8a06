"""The turns of a chat on the screen: questions, thoughts in four views, answers, notices."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from qwq_local.chat.events import (
    Asking,
    ChatEvent,
    ChatStatus,
    Copy,
    Page,
    Recalled,
    Said,
    ThinkView,
    ViewChanged,
)
from qwq_local.events import (
    Answer,
    CloseReason,
    Finished,
    FinishReason,
    Generated,
    Loading,
    Notice,
    Planned,
    Prefill,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from tests.terminal.fake_terminal import screen_of
from tests.terminal.turn_viewer import ASKING, CLOSED, FINISHED, PLANNED, Viewer, text_of

THOUGHT = "Okay, let me count. The word has ten letters.\n\nThere is one r, then two. So"
FOLDED = "▸ thought 3 · 1m12s · 2,431 tok"
INTERRUPTED = Finished(FinishReason.INTERRUPTED, TurnStats(thinking_tokens=12), "", "")


def thinking(view: ThinkView, size: tuple[int, int] = (80, 24), *, has_color: bool = True) -> Viewer:
    """A viewer during a thought, after a frame."""
    viewer = Viewer(view, size, has_color=has_color).show(ASKING, Thinking(THOUGHT))
    viewer.frame()
    return viewer


# Questions.


def test_a_question_is_committed_unchanged() -> None:
    question = "How many r?\n\n  - strawberry\n\t- 草莓 🍓"
    assert Viewer().show(Asking(question, 1)).committed() == [
        "❯ How many r?",
        "  ",
        "    - strawberry",
        "      - 草莓 🍓",
    ]


def test_a_long_line_of_a_question_is_wrapped_below_its_mark() -> None:
    viewer = Viewer(size=(20, 24)).show(Asking("a question that is longer than a row", 1))
    assert viewer.committed() == ["❯ a question that is", "  longer than a row"]


def test_of_a_long_question_twenty_rows_are_committed() -> None:
    question = "\n".join(f"line {i}" for i in range(214))
    shown = Viewer().show(Asking(question, 1)).committed()
    assert shown == ["❯ line 0", *(f"  line {i}" for i in range(1, 20)), "  … 214 lines"]


def test_a_question_of_a_megabyte_on_one_line_is_counted_in_characters() -> None:
    shown = Viewer().show(Asking("word " * 200_000, 1)).committed()
    assert len(shown) == 21
    assert shown[-1] == "  … 1,000,000 characters"


def test_questions_are_apart_from_the_text_before() -> None:
    viewer = Viewer().show(ASKING, CLOSED, Answer("3"), FINISHED, Asking("Sure?", 4))
    assert viewer.committed() == ["❯ How many r?", FOLDED, "", "3", "", "❯ Sure?"]


# Before the thinking.


def test_loading_and_prefill_use_one_row_that_disappears() -> None:
    viewer = Viewer().show(ASKING, Loading("QwQ-32B Q4_K_M", 0.1))
    assert viewer.live() == []
    viewer.clock.now += 1
    assert viewer.show(Loading("QwQ-32B Q4_K_M", 0.5)).live() == [
        f"loading QwQ-32B Q4_K_M {'█' * 12}{'░' * 12} 50%"
    ]
    viewer.show(Prefill(1000, 8000, 1000), Prefill(1000, 8000, 1000))
    viewer.clock.now += 1
    viewer.show(Prefill(4000, 8000, 1000))
    assert viewer.live() == [
        f"reading {'█' * 12}{'░' * 12} 4,000 / 8,000 tokens · 3,000 tok/s · 1 s left",
    ]
    assert viewer.show(Thinking("Okay.")).live()[-1] == "Okay."
    assert viewer.committed() == ["❯ How many r?"]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (60, "reading 4,000 / 8,000 tokens · 3,000 tok/s · 1 s left"),
        (40, "reading 50%"),
        (20, "reading 50%"),
    ],
)
def test_narrow_windows_show_figures_without_a_bar_then_percents(columns: int, row: str) -> None:
    viewer = Viewer(size=(columns, 24)).show(ASKING, Prefill(1000, 8000, 1000))
    viewer.clock.now += 1
    assert viewer.show(Prefill(4000, 8000, 1000)).live() == [row]


def test_a_prompt_that_is_cached_shows_no_bar() -> None:
    viewer = Viewer().show(ASKING, Prefill(0, 100, 100))
    viewer.clock.now += 1
    assert viewer.show(Prefill(100, 100, 100)).live() == []


def test_a_changed_plan_is_committed() -> None:
    other = Planned("m", 65_536, 1, 1, 1, 2.0, "q8_0", 65, 1, line="context 65,536 · YaRN 2")
    longer_prompt = Planned("m", 65_536, 999, 1, 1, 2.0, "q8_0", 65, 2, line="context 65,536 · YaRN 2")
    viewer = Viewer().show(PLANNED, PLANNED, other, longer_prompt)
    assert viewer.committed() == ["· context 32,768 · q8_0 KV", "· context 65,536 · YaRN 2"]
    assert all(row.written.startswith("\x1b[2m") for row in viewer.final)


# Thinking.


def test_a_hidden_thought_shows_nothing() -> None:
    viewer = thinking(ThinkView.OFF)
    assert viewer.live() == []
    assert viewer.view.is_thinking


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "▾ thinking …"),
        ("Okay, let", "▾ Okay, let"),
        ("Okay, let me. The wo", "▾ Okay, let me."),
        ("One. Two! Thr", "▾ Two!"),
        ("It is 3.14", "▾ It is 3.14"),
        ("First line\nsecond", "▾ First line"),
        ("我们先数。然后", "▾ 我们先数。"),
        ('He said "three." And', '▾ He said "three."'),
        ("Is it? \n\n\n", "▾ Is it?"),
    ],
)
def test_the_excerpt_is_the_last_finished_sentence(text: str, shown: str) -> None:
    assert Viewer(ThinkView.EXCERPT).show(ASKING, Thinking(text)).live() == [shown]


def test_a_long_excerpt_is_cut_to_one_row() -> None:
    viewer = Viewer(ThinkView.EXCERPT, (20, 24)).show(ASKING, Thinking("a sentence longer than the row. "))
    assert viewer.live() == ["▾ a sentence longer…"]


@pytest.mark.parametrize(("rows", "n_live"), [(3, 1), (5, 1), (6, 2), (12, 4), (24, 8), (30, 10), (200, 10)])
def test_the_tail_takes_a_third_of_the_window_and_ten_rows_at_most(rows: int, n_live: int) -> None:
    text = "".join(f"line {i}\n" for i in range(50))
    shown = Viewer(ThinkView.TAIL, (80, rows)).show(ASKING, Thinking(text)).live()
    header = ["▾ thought 3 · thinking …"] if n_live > 1 else []
    n_lines = n_live - len(header)
    assert shown == header + [f"line {i}" for i in range(50 - n_lines, 50)]


def test_the_tail_is_laid_out_again_when_the_window_changes() -> None:
    viewer = thinking(ThinkView.TAIL, (80, 24))
    viewer.size = (18, 24)
    assert viewer.live() == [
        "▾ thinking …",
        "Okay, let me",
        "count. The word",
        "has ten letters.",
        "",
        "There is one r,",
        "then two. So",
    ]


def test_full_commits_dim_rows_as_they_come_and_keeps_the_last_alive() -> None:
    viewer = thinking(ThinkView.FULL, (31, 24))
    assert viewer.committed()[1:] == [
        "",
        "Okay, let me count. The word",
        "has ten letters.",
    ]
    assert viewer.live() == ["", "There is one r, then two. So"]
    assert viewer.final[2].written == "\x1b[2mOkay, let me count. The word\x1b[0m"
    viewer.show(Thinking(" three"))
    assert viewer.live() == ["three"]
    assert viewer.show(CLOSED).committed()[4:] == ["", "There is one r, then two. So", "three", FOLDED]


def test_the_key_cycles_the_views_and_full_commits_from_the_beginning() -> None:
    viewer = thinking(ThinkView.OFF, (30, 24))
    shown = []
    for _ in range(3):
        viewer.view.cycle_view()
        shown.append(viewer.live())
    assert shown == [
        ["▾ There is one r, then two."],
        [
            "▾ thought 3 · thinking …",
            "Okay, let me count. The word",
            "has ten letters.",
            "",
            "There is one r, then two. So",
        ],
        ["", "There is one r, then two. So"],
    ]
    assert viewer.committed()[1:] == ["", "Okay, let me count. The word", "has ten letters."]


def test_full_is_final_for_a_thought_and_the_key_is_for_the_next() -> None:
    viewer = thinking(ThinkView.FULL)
    assert viewer.view.cycle_view() is ThinkView.OFF
    viewer.show(Thinking(" more.\nAnd"), CLOSED, Answer("3"), FINISHED)
    assert "There is one r, then two. So more." in viewer.committed()
    assert "And" in viewer.committed()
    assert viewer.show(Asking("Again?", 4), Thinking("Hidden.")).live() == []
    assert "Hidden." not in viewer.show(CLOSED).committed()


@pytest.mark.parametrize("view", list(ThinkView))
@pytest.mark.parametrize(
    ("reason", "end"),
    [
        (CloseReason.MODEL, ""),
        (CloseReason.BUDGET, " · ended at its budget"),
        (CloseReason.CONTEXT, " · ended to leave room for the answer"),
        (CloseReason.LOOP, " · ended in a loop"),
        (CloseReason.ASKED, " · ended on request"),
    ],
)
def test_a_closed_thought_is_one_line_in_every_view(view: ThinkView, reason: CloseReason, end: str) -> None:
    viewer = thinking(view).show(ThinkingClosed(reason, 2431, 72.4))
    assert viewer.committed()[-1] == FOLDED + end
    assert viewer.live() == []
    assert not viewer.view.is_thinking


def test_a_thought_without_a_token_leaves_no_line() -> None:
    viewer = Viewer().show(ASKING, ThinkingClosed(CloseReason.MODEL, 0, 0.0), Answer("3"), FINISHED)
    assert viewer.committed() == ["❯ How many r?", "", "3"]


@pytest.mark.parametrize("has_color", [True, False])
def test_a_steered_sentence_is_marked(has_color: bool) -> None:
    viewer = thinking(ThinkView.FULL, has_color=has_color).show(
        Steered("Count 草莓 too."), Thinking("Right. ")
    )
    mark = "" if has_color else "│ "
    shown = viewer.show(CLOSED).committed()
    assert shown[-6:] == [
        f"{mark}There is one r, then two. So",
        "",
        "▏you: Count 草莓 too.",
        "",
        f"{mark}Right.",
        FOLDED,
    ]
    bold = "\x1b[1m▏you: Count 草莓 too.\x1b[0m"
    assert viewer.final[-4].written == (bold if has_color else shown[-4])


def test_a_steered_sentence_is_committed_where_the_trace_is_not() -> None:
    viewer = thinking(ThinkView.TAIL).show(Steered("Count it twice."), Thinking("Yes."))
    assert viewer.committed() == ["❯ How many r?", "▏you: Count it twice."]
    assert viewer.live()[-3:] == ["▏you: Count it twice.", "", "Yes."]


def test_a_notice_within_a_full_thought_ends_its_row() -> None:
    viewer = thinking(ThinkView.FULL).show(Notice("the loop guard cut it back."), Thinking(" on."), CLOSED)
    assert viewer.committed()[-4:] == [
        "There is one r, then two. So",
        "note: the loop guard cut it back.",
        " on.",
        FOLDED,
    ]


def test_a_second_thought_in_a_turn_follows_the_answer_before_it() -> None:
    viewer = Viewer(ThinkView.FULL).show(ASKING, Thinking("One."), CLOSED, Answer("two"), Thinking("Three."))
    assert viewer.show(CLOSED).committed()[2:] == ["One.", FOLDED, "", "two", "", "Three.", FOLDED]


# The answer.


def test_stable_rows_of_an_answer_are_committed_and_the_tail_lives() -> None:
    viewer = Viewer().show(ASKING, CLOSED, Answer("# Three\n\nThe word has **thr"))
    assert viewer.live() == ["", "The word has **thr"]
    assert viewer.committed()[2:] == ["", "Three"]
    assert viewer.show(Answer("ee** r.\n"), FINISHED).committed()[2:] == [
        "",
        "Three",
        "",
        "The word has three r.",
    ]


@pytest.mark.parametrize(("rows", "n_live"), [(3, 1), (5, 1), (9, 3), (24, 6), (50, 6)])
def test_few_rows_of_an_answer_live(rows: int, n_live: int) -> None:
    viewer = Viewer(size=(40, rows)).show(ASKING, Answer("| a | b |\n|---|---|\n" + "| c | d |\n" * 8))
    assert len(viewer.live()) == n_live


def test_held_notices_take_rows_from_the_answer() -> None:
    viewer = Viewer(size=(40, 24)).show(ASKING, Answer("| a | b |\n|---|---|\n" + "| c | d |\n" * 8))
    shown = viewer.show(*[Notice(f"notice {i}") for i in range(5)]).live()
    assert shown == ["c │ d"] * 4 + ["note: notice 3", "note: notice 4"]


def test_a_notice_amid_an_answer_lives_below_it_and_is_committed_after_it() -> None:
    viewer = Viewer().show(
        ASKING, Answer("One **two"), Notice("the loop guard ended it."), Answer("** three")
    )
    assert viewer.live() == ["One two three", "note: the loop guard ended it."]
    assert viewer.show(FINISHED).committed()[2:] == ["One two three", "", "note: the loop guard ended it."]


def test_held_notices_are_laid_out_for_the_current_window() -> None:
    viewer = Viewer(size=(40, 24)).show(ASKING, Answer("So "), Notice("a line of 24 cells"))
    assert viewer.live() == ["So", "note: a line of 24 cells"]
    viewer.size = (20, 24)
    assert viewer.live() == ["So", "note: a line of 24", "  cells"]
    viewer.size = (40, 24)
    assert viewer.show(FINISHED).committed()[-1] == "note: a line of 24 cells"


def test_notices_below_an_answer_do_not_look_like_its_end() -> None:
    cut = Said(("the answer was cut: /continue goes on.",))
    viewer = Viewer(has_color=False).show(ASKING, Answer("One two"), FINISHED, cut, cut)
    assert viewer.committed()[2:] == ["One two", "", *cut.lines, *cut.lines]
    recalled = Recalled("q", 1, 0, 0.0, "Again")
    viewer.show(recalled, cut)
    assert viewer.committed()[-3:] == ["Again", "", *cut.lines]
    viewer.show(recalled, Said(("", "❯ /next")))
    assert viewer.committed()[-3:] == ["Again", "", "❯ /next"]


def test_a_wide_line_of_code_is_one_row_for_the_terminal_to_wrap() -> None:
    code = f"x = {list(range(50))}"
    viewer = Viewer(size=(20, 24)).show(ASKING, Answer(f"```python\n{code}\n```\n"), FINISHED)
    assert code in viewer.committed()


def test_a_tab_within_mathematics_takes_the_cells_that_the_row_says() -> None:
    viewer = Viewer(size=(20, 24)).show(ASKING, Answer("so \\[\nthirteencells\tso so"))
    assert all(len(screen_of(text_of(row), 20)) == 1 for row in viewer.frame().live)


def test_code_has_only_colors_that_light_and_dark_backgrounds_show() -> None:
    code = "@decorated\nclass A(B):\n    def f(self) -> int:\n        return 'x' + 0x1 + None  # why\n"
    others = "```diff\n- a\n+ b\n```\n```html\n<a href='x'>y</a>\n```\n```sh\necho $X\n```\n"
    viewer = Viewer().show(ASKING, Answer(f"```python\n{code}```\n{others}"), FINISHED)
    viewer.frame()
    colors = {
        color
        for row in viewer.final
        for codes in re.findall(r"\x1b\[([0-9;]*)m", row.written)
        for color in codes.split(";")
        if len(color) > 1
    }
    assert colors
    assert colors <= {"31", "32", "35", "36"}, "no yellow, no blue, nothing bright"


# How turns end.


def test_an_interrupted_thought_says_how_far_it_came() -> None:
    viewer = thinking(ThinkView.TAIL)
    viewer.clock.now += 12
    assert viewer.show(INTERRUPTED).committed()[1:] == [
        "■ stopped · thought 3 · 12s · 12 tok · /continue goes on"
    ]
    assert viewer.live() == []
    assert not viewer.view.is_busy


def test_an_interrupted_answer_keeps_its_text() -> None:
    viewer = Viewer().show(ASKING, CLOSED, Answer("half an ans"), INTERRUPTED)
    assert viewer.committed()[2:] == ["", "half an ans", "■ stopped · /continue goes on"]


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if reason != FinishReason.INTERRUPTED])
def test_other_ends_add_no_line(reason: FinishReason) -> None:
    viewer = thinking(ThinkView.OFF).show(CLOSED, Finished(reason, TurnStats(), "", ""))
    assert viewer.committed() == ["❯ How many r?", FOLDED]


@pytest.mark.parametrize("event", [Thinking("Okay"), Answer("three"), Prefill(0, 100, 0), Loading("m", 0.1)])
def test_an_abandoned_turn_leaves_a_view_ready_for_the_next(event: ChatEvent) -> None:
    viewer = Viewer(ThinkView.FULL).show(ASKING, event)
    viewer.frame()
    viewer.clock.now += 1
    viewer.view.end_line()
    assert viewer.live() == []
    assert not viewer.view.is_busy
    assert not viewer.view.is_thinking
    before = len(viewer.committed())
    assert viewer.show(Asking("Again?", 4), Answer("yes"), FINISHED).committed()[before:] == [
        "",
        "❯ Again?",
        "",
        "yes",
    ]


def test_the_text_of_an_abandoned_turn_is_committed() -> None:
    viewer = Viewer(ThinkView.FULL).show(ASKING, Thinking("Okay"), CLOSED, Answer("thr"))
    viewer.view.end_line()
    assert viewer.committed() == ["❯ How many r?", "", "Okay", FOLDED, "", "thr"]


# Continued turns, recalled turns, and said lines.


def test_a_continued_thought_keeps_its_time_and_steered_sentences() -> None:
    asking = Asking("q", 3, True, "One.\n\nCount it twice.\n\nTwo", "", ("Count it twice.",), 70.0)
    viewer = Viewer(ThinkView.FULL).show(
        asking, Thinking(" three."), ThinkingClosed(CloseReason.MODEL, 9, 2.4)
    )
    assert viewer.committed()[-6:] == [
        "One.",
        "",
        "▏you: Count it twice.",
        "",
        "Two three.",
        "▸ thought 3 · 1m12s · 9 tok",
    ]


def test_a_continued_turn_shows_its_answer_from_the_beginning() -> None:
    viewer = Viewer().show(Asking("q", 3, True, "thought", "```\ncode"), Answer(" more\n```\nend"), FINISHED)
    assert viewer.committed() == [
        "▸ going on with the answer after thought 3",
        "",
        "```",
        "code more",
        "```",
        "end",
    ]


def test_a_continued_thought_is_shown_with_its_beginning() -> None:
    viewer = Viewer(ThinkView.TAIL).show(Asking("q", 3, True, "One. Tw"), Thinking("o."))
    assert viewer.live() == ["▾ thought 3 · thinking …", "One. Two."]
    viewer.view.cycle_view()
    assert viewer.show(CLOSED).committed() == ["▸ going on with thought 3", "", "One. Two.", FOLDED]


def test_a_recalled_turn_is_committed_with_its_thought_folded() -> None:
    viewer = Viewer().show(Recalled("How many r?", 3, 2431, 72.4, "**3**\n"), Recalled("Hi", 4, 0, 0.0, ""))
    assert viewer.committed() == ["❯ How many r?", FOLDED, "", "3", "", "❯ Hi"]


def test_said_lines_are_committed_unchanged() -> None:
    said = Said(("context 32,768 tok", "  system     120", "", "file\tx"))
    assert Viewer().show(said).committed() == ["context 32,768 tok", "  system     120", "", "file    x"]


def test_a_wrapped_line_continues_with_an_indent() -> None:
    said = Said(("/name [NAME]     call it by a name", "  open a thought, or search", "z" * 25))
    assert Viewer(size=(20, 24)).show(said).committed() == [
        "/name [NAME]",
        "  call it by a name",
        "  open a thought, or",
        "    search",
        "z" * 20,
        "z" * 5,
    ]
    assert Viewer(size=(11, 24)).show(Said(("  open a thought",))).committed() == ["  open a", "thought"]
    assert Viewer(size=(12, 24)).show(Said(("  open a thought",))).committed() == ["  open a", "    thought"]


def test_an_error_is_marked_by_color_or_a_word() -> None:
    error = Said(("no such command: /thnk.", "Did you mean /think?"), is_error=True)
    colored = Viewer().show(error)
    assert colored.committed() == ["✗ no such command: /thnk.", "  Did you mean /think?"]
    assert colored.final[0].written == "\x1b[31m✗ \x1b[0mno such command: /thnk."
    assert Viewer(has_color=False).show(error).committed() == [
        "error: no such command: /thnk.",
        "  Did you mean /think?",
    ]


def test_a_changed_view_is_one_line_and_stays() -> None:
    viewer = Viewer(ThinkView.TAIL).show(ViewChanged(ThinkView.OFF))
    assert viewer.committed() == ["· thinking is shown: off"]
    assert viewer.show(ASKING, Thinking("x")).live() == []


def test_events_that_are_not_drawn_inline_change_nothing() -> None:
    viewer = thinking(ThinkView.TAIL)
    before = viewer.frame()
    viewer.show(Page("t", "x"), Copy("x", "answer"), Generated(0, (1,) * 3, 3))
    assert viewer.frame() == before


# Frames.


def test_without_news_frames_are_equal_and_empty_above() -> None:
    viewer = thinking(ThinkView.TAIL)
    first, second = viewer.frame(), viewer.frame()
    assert first == second
    assert first.final == ()
    assert first.live


def test_seconds_and_bars_change_four_times_a_second_at_most() -> None:
    viewer = Viewer(ThinkView.OFF).show(ASKING, Prefill(0, 10**6, 0))
    viewer.clock.now += 1
    bars, lines = set(), set()
    for step in range(200):
        viewer.clock.now += 0.005
        frame = viewer.show(Prefill(step * 1000, 10**6, 0)).frame()
        bars.add(frame.live)
    for _ in range(200):
        viewer.clock.now += 0.005
        lines.add(viewer.show(Thinking("x ")).frame().status)
    assert len(bars) <= 6
    assert len(lines) <= 6


def test_a_resize_lays_out_live_rows_again_and_leaves_committed_ones() -> None:
    viewer = thinking(ThinkView.FULL, (30, 24))
    before = viewer.committed()
    viewer.size = (14, 24)
    assert viewer.live() == ["So"]
    after = viewer.committed()
    assert after[: len(before)] == before
    assert after[len(before) :] == ["", "There is one", "r, then two."]


def test_dim_text_ends_with_its_row_and_no_color_means_no_sequence() -> None:
    events: list[ChatEvent] = [
        ASKING,
        PLANNED,
        Notice("n"),
        Thinking(THOUGHT),
        Steered("x"),
        CLOSED,
        Answer("# a\n**b** `c`\n```py\nx = 'd'\n```\n"),
        Said(("e",), is_error=True),
        INTERRUPTED,
        ViewChanged(ThinkView.OFF),
        Recalled("q", 1, 5, 1.0, "*x*"),
    ]
    for has_color in (True, False):
        viewer = Viewer(ThinkView.FULL, has_color=has_color)
        for event in events:
            viewer.show(event).frame()
        written = [row.written for frame in viewer.frames for row in (*frame.final, *frame.live)]
        assert any("\x1b" in row for row in written) == has_color
        assert all(row.rfind("\x1b[") == row.rfind("\x1b[0m") for row in written)


HOSTILE = "a\x1b[2J\x1b]0;title\x07b\x9b31m\u202ec\x00\x08d"


@pytest.mark.parametrize(
    "event",
    [
        Asking(HOSTILE, 3),
        replace(PLANNED, model=HOSTILE, line=HOSTILE),
        Loading(HOSTILE, 0.5),
        Notice(HOSTILE),
        Thinking(HOSTILE),
        Steered(HOSTILE),
        Answer(f"{HOSTILE}\n```{HOSTILE}\n{HOSTILE}"),
        Said((HOSTILE,)),
        Said((HOSTILE,), is_error=True),
        Recalled(HOSTILE, 3, 5, 1.0, HOSTILE),
        ChatStatus(HOSTILE, 10, 5, 1.0, HOSTILE),
    ],
)
@pytest.mark.parametrize("view", list(ThinkView))
def test_no_control_sequence_of_any_text_is_written(event: ChatEvent, view: ThinkView) -> None:
    viewer = Viewer(view, has_color=False).show(event)
    viewer.clock.now += 1
    frame = viewer.frame()
    shown = "".join(text_of(row) for row in (*frame.final, *frame.live)) + "".join(frame.status)
    viewer.show(CLOSED)
    shown += "".join(viewer.committed())
    assert not set(shown) & set("\x1b\x07\x9b\u202e\x00\x08")
    assert "abcd" in shown or (isinstance(event, Thinking) and view is ThinkView.OFF)


def test_the_status_of_a_changed_conversation_is_shown_between_turns() -> None:
    viewer = Viewer().show(ChatStatus("QwQ-32B Q4_K_M", 32_768, 4_120, 1.0, "berries", 2))
    assert viewer.status() == ("QwQ-32B Q4_K_M · ctx 4,120/32,768 · 2 files attached · berries · /help")
