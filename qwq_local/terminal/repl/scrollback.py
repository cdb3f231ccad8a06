"""Rows that stay in the scrollback besides thoughts and answers. Text from outside is sanitized here."""

from __future__ import annotations

from collections.abc import Iterable

from qwq_local.chat.events import Recalled, Said, Shown, ThinkView
from qwq_local.events import Planned, ThinkingClosed
from qwq_local.terminal.chat_lines import CLOSED_BY, NOTICE_CELLS, lines_of, thought_line
from qwq_local.terminal.layout import BLANK, BOLD, DIM, MIN_WIDTH, PLAIN, RED, Row, RowLayout, RowStyle
from qwq_local.terminal.markdown import markdown_rows
from qwq_local.terminal.repl.thinking_view import STEERED
from qwq_local.terminal.sanitizer import one_line, sanitize

QUESTION_ROWS = 20
"""Rows of a question that are shown; the rest of a long one is counted."""

_QUESTION = RowStyle(BOLD, "❯ ", "  ")
_NOTE = RowStyle("", "note: ", "  ")
_ERROR, _ERROR_WITHOUT_COLOR = RowStyle(RED, "✗ ", "  ", is_for_marks=True), RowStyle("", "error: ", "  ")


def question_rows(question: str, layout: RowLayout) -> list[Row]:
    """The question as it was written; of a long text the beginning and its size."""
    question = question.strip("\n")
    # Only as much is laid out as the rows can hold.
    head = question[: (QUESTION_ROWS + 1) * (layout.columns + 1)]
    rows = layout.rows(sanitize(head), _QUESTION)
    if len(rows) <= QUESTION_ROWS and len(head) == len(question):
        return rows
    n_lines = question.count("\n") + 1
    size = f"{n_lines:,} lines" if n_lines > 1 else f"{len(question):,} characters"
    return rows[:QUESTION_ROWS] + layout.rows(f"… {size}", RowStyle(DIM, "  ", "  "))


def plan_rows(event: Planned, layout: RowLayout) -> list[Row]:
    """The plan in words."""
    return layout.rows(one_line(event.line, NOTICE_CELLS), _mark("·")) if event.line else []


def notice_rows(text: str, layout: RowLayout) -> list[Row]:
    """A notice."""
    return layout.rows(one_line(text, NOTICE_CELLS), _NOTE)


def closed_rows(event: ThinkingClosed, thought: int, before_s: float, layout: RowLayout) -> list[Row]:
    """The line of a folded thought; nothing for a thought without tokens."""
    if not event.tokens:
        return []
    return _thought_rows(thought, before_s + event.elapsed_s, event.tokens, CLOSED_BY[event.reason], layout)


def said_rows(event: Shown, layout: RowLayout) -> list[Row]:
    """Lines of the chat; those of an error are marked."""
    lines = lines_of(event)
    if isinstance(event, Said) and event.is_error:
        style = _ERROR if layout.has_color else _ERROR_WITHOUT_COLOR
        return layout.rows("\n".join(lines), style) if lines else []
    return [row for text in lines for line in text.split("\n") for row in _hanging_rows(line, layout)]


def recalled_rows(event: Recalled, layout: RowLayout) -> list[Row]:
    """An earlier turn, with its thought folded."""
    rows = question_rows(event.question, layout)
    if event.thinking_tokens:
        rows += _thought_rows(event.thought, event.elapsed_s, event.thinking_tokens, "", layout)
    answer = map(layout.plain, markdown_rows(event.answer, layout.columns, layout.has_color))
    return rows + with_gap(answer)


def steered_rows(text: str, layout: RowLayout) -> list[Row]:
    """A sentence that the user put into a thought."""
    return layout.rows(sanitize(text).strip(), STEERED) if text.strip() else []


def stopped_rows(details: Iterable[str], can_continue: bool, layout: RowLayout) -> list[Row]:
    """The mark of a turn that the user stopped."""
    hint = ["/continue goes on"] if can_continue else []
    return layout.rows(" · ".join(["stopped", *details, *hint]), _mark("■"))


def going_on_rows(thought: int, answers: bool, layout: RowLayout) -> list[Row]:
    """The mark of a turn that is continued."""
    what = f"the answer after thought {thought}" if answers else f"thought {thought}"
    return layout.rows(f"going on with {what}", _mark("▸"))


def view_rows(view: ThinkView, layout: RowLayout) -> list[Row]:
    """How thinking is shown from now on."""
    return layout.rows(f"thinking is shown: {view.value}", _mark("·"))


def with_gap(rows: Iterable[Row]) -> list[Row]:
    """The rows below a blank one; none if there are none."""
    below = list(rows)
    return [BLANK, *below] if below else []


def _hanging_rows(line: str, layout: RowLayout) -> list[Row]:
    """A line whose further rows are indented; a single word is only broken."""
    rest = " " * (len(line) - len(line.lstrip(" ")) + 2)
    hangs = len(line.split()) > 1 and len(rest) + MIN_WIDTH <= layout.columns
    return layout.rows(line, RowStyle("", "", rest) if hangs else PLAIN)


def _thought_rows(thought: int, elapsed_s: float, tokens: int, end: str, layout: RowLayout) -> list[Row]:
    return layout.rows(thought_line(f"thought {thought}", elapsed_s, tokens, end), _mark("▸"))


def _mark(mark: str) -> RowStyle:
    return RowStyle(DIM, f"{mark} ", "  ")
