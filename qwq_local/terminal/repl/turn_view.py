"""A turn on the screen: chat events in; final rows, live rows and the status line out.

Final rows are append-only and, for a constant width, do not depend on when frames are drawn. Live rows
are few: min(10, rows/3) for a thought, min(6, rows/3) for an answer. The cost is linear in the turn:
pieces are read when a frame is due, and final text is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from qwq_local.chat.events import (
    Asking,
    ChatEvent,
    Recalled,
    Said,
    Shown,
    ThinkView,
    ViewChanged,
)
from qwq_local.events import (
    Answer,
    Finished,
    FinishReason,
    Generated,
    Loading,
    Notice,
    Planned,
    Prefill,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
)
from qwq_local.terminal.chat_lines import CLOSED_BY, NOTICE_CELLS, lines_of, thought_line
from qwq_local.terminal.layout import BLANK, BOLD, DIM, MIN_WIDTH, PLAIN, RED, Row, RowLayout, RowStyle
from qwq_local.terminal.markdown import MarkdownRows, live_limit, markdown_rows
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import APPEARS_AFTER_S, TOKENS, Clock, Progress
from qwq_local.terminal.repl.status_line import Phase, TurnStatus, status_rows
from qwq_local.terminal.repl.thinking_view import STEERED, ThoughtView
from qwq_local.terminal.sanitizer import one_line, sanitize
from qwq_local.text import duration


@dataclass(frozen=True, slots=True)
class TurnRows:
    """Final rows, the live rows and the status line until the next frame.

    Live rows fit the window; a final row of code may be wider and is left to the terminal to wrap.
    """

    final: tuple[Row, ...] = ()
    live: tuple[Row, ...] = ()
    status: tuple[str, ...] = ()


HELD_ROWS = 2

_LaidOut = Callable[[RowLayout], list[Row]]
"""Lays out an event for the width that the window has at that time."""


class _AnswerRows:
    """One answer, below a blank row. What is `held` comes below it: it must not break a block."""

    def __init__(self, has_color: bool) -> None:
        self.text = MarkdownRows(has_color)
        self.held: list[_LaidOut] = []
        self._is_begun = False

    def take(self, layout: RowLayout, limit: int) -> tuple[list[Row], list[Row]]:
        """The final rows, and at most `limit` live rows of the answer and of held events."""
        held = _laid_out(self.held[-HELD_ROWS:], layout)[-HELD_ROWS:][: limit // 3]
        final, live = self.text.take(layout.columns, limit - len(held))
        return self._apart(final, live, layout), [*map(layout.plain, live), *held]

    def close(self, layout: RowLayout) -> list[Row]:
        left = self._apart(self.text.close(layout.columns), [], layout)
        return left + _with_gap(_laid_out(self.held, layout))

    def _apart(self, final: list[Row], live: list[Row], layout: RowLayout) -> list[Row]:
        rows = [layout.plain(row) for row in final]
        if self._is_begun or not (rows or live):
            return rows
        self._is_begun = True
        return [BLANK, *rows]


def _laid_out_as(text: str, style: RowStyle) -> _LaidOut:
    return lambda layout: layout.rows(text, style)


def _laid_out(held: list[_LaidOut], layout: RowLayout) -> list[Row]:
    return [row for rows in held for row in rows(layout)]


THOUGHT_ROWS = 10
MODEL_CELLS = 60
TICKS_PER_S = 4
"""How many times a second seconds, rates and bars change."""

_ORDER = tuple(ThinkView)
_PLAN_KEY = attrgetter(
    "model", "n_ctx", "yarn_factor", "yarn_origin", "kv_type", "n_gpu_layers", "reductions"
)
"""What makes a plan new; only a new one is shown."""


class TurnView:
    """Shows turns one after the other; `view` is the first view of the thinking."""

    def __init__(self, output: Output, clock: Clock, view: ThinkView) -> None:
        self._output = output
        self._clock = clock
        self._view = view
        self._figures = TurnStatus(clock)
        self._plan: object = None
        self._number = 0
        self._can_continue = True
        self._before_s = 0.0  # of a continued thought: the time before
        self._thought: ThoughtView | None = None
        self._answer: _AnswerRows | None = None
        self._progress: Progress | None = None
        self._progress_label = ""
        self._final: list[Row] = []
        self._is_blank = True  # there are no final rows yet
        self._is_below_answer = False
        self._shown = TurnRows()
        self._seen: tuple[object, ...] = ()
        self._figures_seen: tuple[object, ...] = ()
        self._has_news = True

    @property
    def is_thinking(self) -> bool:
        """Whether a thought streams, which can be steered or ended."""
        return self._figures.phase is Phase.THINKING

    @property
    def is_busy(self) -> bool:
        """Whether a turn runs, or a model is loaded."""
        return self._figures.phase not in (Phase.IDLE, Phase.SAVING)

    @property
    def is_full(self) -> bool:
        """Whether the thought that streams is shown in full."""
        return self._thought is not None and self._thought.is_full

    def cycle_view(self) -> ThinkView:
        """Change to the next view and return it. A thought that is shown in full stays so."""
        self._choose(_ORDER[(_ORDER.index(self._view) + 1) % len(_ORDER)])
        self._has_news = True
        return self._view

    def show(self, event: ChatEvent) -> None:
        """Take one event. Events that are not drawn inline change nothing."""
        match event:
            case Thinking(text):
                self._think().feed(text)
            case Answer(text):
                self._give(text)
            case Loading() | Prefill():
                self._make_progress(event)
            case Asking():
                self._begin(event)
            case Steered(text):
                self._steer(text)
            case ThinkingClosed():
                self._commit_thought()
                if event.tokens:
                    elapsed, end = self._before_s + event.elapsed_s, CLOSED_BY[event.reason]
                    self._commit(_thought_rows(self._number, elapsed, event.tokens, end, self._layout))
            case Finished():
                self._finish(event)
            case _:
                self._say(event)
        self._figures.take(event)
        self._has_news = True

    def end_line(self) -> None:
        """The line is done: finish the rows of a turn that broke off, and show that nothing runs."""
        self._end_texts()
        self._figures.end_line()
        self._has_news = True

    def frame(self) -> TurnRows:
        """The rows of the next frame. Cheap if nothing has changed."""
        columns, window_rows = self._output.size()
        seen = (columns, window_rows, int(self._clock() * TICKS_PER_S))
        if seen == self._seen and not self._has_news:
            return self._shown
        live = self._live(window_rows)
        status = self._shown.status
        # Figures change a few times a second, and with the phase.
        is_folded = self._thought is None
        figures = (*seen, self._progress, self._figures.phase, self._figures.standing, self._view, is_folded)
        if figures != self._figures_seen:
            self._figures_seen, status = figures, self._status()
            live = self._progress_rows(columns) or live
        elif self._progress:
            live = self._shown.live
        final, self._final = tuple(self._final), []
        self._shown = TurnRows((), tuple(live), status)
        self._seen, self._has_news = seen, False
        return TurnRows(final, self._shown.live, status)

    # Live rows and the status line.

    @property
    def _layout(self) -> RowLayout:
        return RowLayout(self._output.size()[0], self._output.has_color)

    def _live(self, window_rows: int) -> Sequence[Row]:
        """The live rows of a thought or an answer; adds to the final rows."""
        layout = self._layout
        live: list[Row] = []
        if self._thought:
            final, live = self._thought.take(layout, max(1, min(THOUGHT_ROWS, window_rows // 3)))
            self._commit(final)
        elif self._answer:
            final, live = self._answer.take(layout, live_limit(window_rows))
            self._commit(final)
        return live

    def _progress_rows(self, columns: int) -> Sequence[Row]:
        """The row of a load or a prefill."""
        progress = self._progress
        if progress is None or self._clock() < progress.started_at + APPEARS_AFTER_S:
            return []
        return [self._layout.row(one_line(progress.text(self._progress_label, columns), columns))]

    def _status(self) -> tuple[str, ...]:
        label = f"next {self._view}" if self.is_full and self._view is not ThinkView.FULL else "view"
        return status_rows(self._figures.figures(label), *self._output.size())

    # What the events do.

    def _begin(self, event: Asking) -> None:
        self._end_texts()
        self._number, self._before_s = event.thought, event.thinking_s
        self._can_continue = event.can_continue
        rows = _question_rows(event.question, self._layout)
        if event.continued:
            what = f"{'the answer after ' if event.answer else ''}thought {event.thought}"
            rows = self._layout.rows(f"going on with {what}", _mark("▸"))
        self._commit_apart(rows)
        if event.continued and event.answer:
            self._give(event.answer)
        elif event.continued and event.thinking:
            self._think().recall(event.thinking, event.steered)

    def _make_progress(self, event: Loading | Prefill) -> None:
        generates = self._figures.phase in (Phase.THINKING, Phase.ANSWERING)
        if generates or (isinstance(event, Prefill) and event.total <= event.cached):
            return
        if isinstance(event, Loading):
            if self._progress is None or self._progress.unit is TOKENS:
                self._progress = Progress(1.0, self._clock)
            self._progress.update(event.fraction)
            self._progress_label = f"loading {one_line(event.model, MODEL_CELLS)}"
            return
        if self._progress is None or self._progress.unit is not TOKENS:
            self._progress = Progress(event.total, self._clock, TOKENS, event.cached)
        self._progress.update(event.done)
        self._progress_label = "reading"

    def _think(self) -> ThoughtView:
        """The open thought; begins one if there is none."""
        self._progress = None
        self._commit_answer()
        if self._thought is None:
            self._thought = ThoughtView(self._number, self._view)
        return self._thought

    def _give(self, text: str) -> None:
        self._progress = None
        if self._thought:
            self._commit_thought()
        if self._answer is None:
            self._answer = _AnswerRows(self._output.has_color)
        self._answer.text.feed(text)

    def _steer(self, text: str) -> None:
        """Put the sentence into the thought; if that is folded, show the sentence by itself."""
        self._think().steer(text)
        if self._thought and not self._thought.is_full:
            self._commit(self._layout.rows(sanitize(text).strip(), STEERED) if text.strip() else [])

    def _choose(self, view: ThinkView) -> None:
        self._view = view
        if self._thought:
            self._thought.choose(view)

    def _say(self, event: ChatEvent) -> None:
        """Show what is said: below the open answer, or inside a thought that is shown in full."""
        said: _LaidOut | None = None
        match event:
            case Notice(text):
                said = _laid_out_as(one_line(text, NOTICE_CELLS), _NOTE)
            case _ if isinstance(event, Shown):
                said = partial(_said_rows, event)
            case Planned():
                is_new, self._plan = _PLAN_KEY(event) != self._plan, _PLAN_KEY(event)
                if is_new and event.line:
                    said = _laid_out_as(one_line(event.line, NOTICE_CELLS), _mark("·"))
            case Recalled():
                self._commit_apart(_recalled_rows(event, self._layout))
                self._is_below_answer = bool(event.answer)
            case ViewChanged(view):
                self._choose(view)
                said = _laid_out_as(f"thinking is shown: {view.value}", _mark("·"))
        if not isinstance(event, Notice | Planned | Prompted | Generated):
            self._progress = None
        rows = said(self._layout) if said else []
        if said and rows and self._answer:
            self._answer.held.append(said)
        elif rows:
            if self._thought:
                self._commit(self._thought.interrupt(self._layout))
            # Without a gap it would look like the end of the answer.
            needs_gap = self._is_below_answer and rows[0] != BLANK
            self._commit(_with_gap(rows) if needs_gap else rows)

    def _finish(self, event: Finished) -> None:
        details = []
        if self._thought:
            tokens = f"{event.stats.thinking_tokens:,} tok"
            details = [f"thought {self._number}", duration(self._before_s + self._figures.elapsed_s), tokens]
        self._end_texts()
        if event.reason is FinishReason.INTERRUPTED:
            hint = ["/continue goes on"] if self._can_continue else []
            self._commit(self._layout.rows(" · ".join(["stopped", *details, *hint]), _mark("■")))

    # Final rows.

    def _end_texts(self) -> None:
        self._progress = None
        self._commit_thought()
        self._commit_answer()

    def _commit_thought(self) -> None:
        thought, self._thought = self._thought, None
        self._progress = None
        if thought:
            self._commit(thought.interrupt(self._layout))

    def _commit_answer(self) -> None:
        answer, self._answer = self._answer, None
        if answer:
            self._commit(answer.close(self._layout))
            self._is_below_answer = not answer.held

    def _commit_apart(self, rows: list[Row]) -> None:
        """Add final rows below a blank one."""
        self._commit(rows if self._is_blank else _with_gap(rows))

    def _commit(self, rows: Sequence[Row]) -> None:
        self._final += rows
        self._is_blank = self._is_blank and not rows
        self._is_below_answer = self._is_below_answer and not rows


# Rows that stay in the scrollback besides thoughts and answers. Text from outside is sanitized here.

QUESTION_ROWS = 20
"""Rows of a question that are shown; the rest of a long one is counted."""

_QUESTION = RowStyle(BOLD, "❯ ", "  ")
_NOTE = RowStyle("", "note: ", "  ")
_ERROR, _ERROR_WITHOUT_COLOR = RowStyle(RED, "✗ ", "  ", is_for_marks=True), RowStyle("", "error: ", "  ")


def _question_rows(question: str, layout: RowLayout) -> list[Row]:
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


def _said_rows(event: Shown, layout: RowLayout) -> list[Row]:
    """Lines of the chat; those of an error are marked."""
    lines = lines_of(event)
    if isinstance(event, Said) and event.is_error:
        style = _ERROR if layout.has_color else _ERROR_WITHOUT_COLOR
        return layout.rows("\n".join(lines), style) if lines else []
    return [row for text in lines for line in text.split("\n") for row in _hanging_rows(line, layout)]


def _recalled_rows(event: Recalled, layout: RowLayout) -> list[Row]:
    """An earlier turn, with its thought folded."""
    rows = _question_rows(event.question, layout)
    if event.thinking_tokens:
        rows += _thought_rows(event.thought, event.elapsed_s, event.thinking_tokens, "", layout)
    answer = map(layout.plain, markdown_rows(event.answer, layout.columns, layout.has_color))
    return rows + _with_gap(answer)


def _with_gap(rows: Iterable[Row]) -> list[Row]:
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
