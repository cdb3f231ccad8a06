"""A question on stdout and stderr, asked at once or in parts: thinking, progress, notices and the answer.

The answer goes to stdout: rendered while it streams on a terminal, exactly as generated anywhere else.
Everything else goes to stderr; thinking and progress only where stderr is a terminal. Control sequences
of the model never reach a terminal. rich is imported only when an answer is rendered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qwq_local.backend.split import Joining, PartDone, PartStarted, SplitEvent, SplitPlanned
from qwq_local.events import (
    Answer,
    Event,
    Finished,
    Loading,
    Notice,
    Planned,
    Prefill,
    Steered,
    Thinking,
    ThinkingClosed,
)
from qwq_local.terminal.chat_lines import CLOSED_BY, NOTICE_CELLS, thought_line
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import SHARE, TOKENS, Clock, StatusLine, Unit, WorkLine
from qwq_local.terminal.sanitizer import Sanitizer, one_line
from qwq_local.text import duration, plural, time_left

if TYPE_CHECKING:
    from qwq_local.terminal.markdown import MarkdownWriter

Think = Literal["show", "hide"]


def _dim(text: str, output: Output) -> str:
    return f"\x1b[2m{text}\x1b[0m" if output.is_live else text


class _ExactText:
    """Model text as generated, for pipes and files."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._is_mid_line = False

    def feed(self, text: str) -> None:
        if text:
            self._output.write(text)
            self._is_mid_line = not text.endswith("\n")

    def suspend(self) -> None:
        pass  # stderr does not interrupt this stream

    def close(self) -> None:
        if self._is_mid_line:
            self.feed("\n")


class _PlainText:
    """Model text on a terminal: sanitized, optionally dim, without blank lines at its ends."""

    def __init__(self, output: Output, is_dim: bool = False) -> None:
        self._output = output
        self._is_dim = is_dim
        self._sanitizer = Sanitizer()
        self._held_newlines = ""
        self._has_text = False
        self._is_mid_line = False

    def feed(self, text: str) -> None:
        # The style ends with the piece, so an interruption leaves no style behind.
        text = self._held_newlines + self._sanitizer.feed(text)
        if not self._has_text:
            text = text.lstrip("\n")
        shown = text.rstrip("\n")
        self._held_newlines = text[len(shown) :]
        if shown:
            self._output.write(_dim(shown, self._output) if self._is_dim else shown)
            self._has_text = self._is_mid_line = True

    def suspend(self) -> None:
        """End the open line, even in the middle of a sentence."""
        if self._is_mid_line:
            self._output.write("\n")
            self._is_mid_line = False
            self._held_newlines = self._held_newlines[1:]

    def close(self) -> None:
        self._held_newlines = ""
        self.suspend()


class AskScreen:
    """Shows the events of one turn. `think` None: the thinking is shown where stderr is a terminal."""

    def __init__(self, out: Output, err: Output, clock: Clock, think: Think | None = None) -> None:
        self._thought = "thought"
        self._out = out
        self._err = err
        self._clock = clock
        self._shows_thinking = think == "show" or (think is None and err.is_terminal)
        self._bar: WorkLine | None = None
        self._thinking: _PlainText | _ExactText | None = None
        self._thinking_status: StatusLine | None = None
        self._thinking_since = 0.0
        self._answer: _ExactText | _PlainText | MarkdownWriter | None = None
        self._is_broken = False

    def number(self, thought: int) -> None:
        """Give the thought its number in the conversation."""
        self._thought = f"thought {thought}"

    def show(self, event: Event) -> None:
        """Show one event. Raises BrokenPipeError when the reader has gone."""
        try:
            self._show(event)
        except BrokenPipeError:
            self._is_broken = True
            raise

    def note(self, text: str) -> None:
        """Write one note on stderr, on a line of its own."""
        self._make_room()
        self._err.write(f"note: {one_line(text, NOTICE_CELLS)}\n")

    def close(self) -> None:
        """Write the rest, end open lines, and erase temporary ones. A second call does nothing."""
        if self._is_broken:
            return
        self._erase_bar()
        self._end_thinking()
        answer, self._answer = self._answer, None
        if answer:
            answer.close()

    def _show(self, event: Event) -> None:
        if not isinstance(event, Loading | Prefill | Notice):
            self._erase_bar()
        match event:
            case Loading(model, fraction):
                self._show_work(f"loading {one_line(model, 60)}", SHARE, 1.0, 0.0, fraction)
            case Prefill(done, total, cached):
                if total > cached and not (self._answer or self._thinking):
                    self._show_work("reading", TOKENS, total, cached, done)
            case Thinking(text) | Steered(text):
                self._show_thinking(text)
            case ThinkingClosed():
                self._show_closed(event)
            case Answer(text):
                self._show_answer(text)
            case Notice(text):
                self.note(text)
            case Finished():
                self.close()
            case Planned():
                self._show_plan(event)

    def _show_work(self, label: str, unit: Unit, total: float, start: float, done: float) -> None:
        if self._bar is None or self._bar.unit is not unit:
            self._erase_bar()
            self._bar = WorkLine(self._err, total, self._clock, start, unit, is_logged=False)
        self._bar.update(label, done)

    def _show_plan(self, event: Planned) -> None:
        """Write the plan on one line, on a terminal only."""
        if self._err.is_terminal and event.line:
            line = one_line(f"▸ {event.line}", max(NOTICE_CELLS, self._err.size()[0]))
            self._make_room()
            self._err.write(f"{_dim(line, self._err)}\n")

    def _show_thinking(self, text: str) -> None:
        if self._shows_thinking:
            if self._thinking is None:
                is_terminal = self._err.is_terminal
                self._thinking = _PlainText(self._err, is_dim=True) if is_terminal else _ExactText(self._err)
            self._thinking.feed(text)
        elif self._err.is_terminal:
            if self._thinking_status is None:
                self._thinking_status = StatusLine(self._err, self._clock)
                self._thinking_since = self._clock()
            if self._thinking_status.is_due:
                self._thinking_status.draw(f"thinking · {duration(self._clock() - self._thinking_since)}")

    def _show_closed(self, event: ThinkingClosed) -> None:
        self._end_thinking()
        if not (self._shows_thinking or self._err.is_terminal):
            if reason := CLOSED_BY[event.reason]:
                self.note(f"the thinking of {event.tokens:,} tokens was {reason}.")
            return
        if not event.tokens:
            return
        line = "▸ " + thought_line(self._thought, event.elapsed_s, event.tokens, CLOSED_BY[event.reason])
        # A blank row separates thinking and answer where both are on the screen.
        is_above_answer = self._shows_thinking and self._err.is_terminal and self._out.is_terminal
        self._err.write(_dim(line, self._err) + ("\n\n" if is_above_answer else "\n"))

    def _show_answer(self, text: str) -> None:
        if self._answer is None:
            self._end_thinking()
            if self._out.is_live:
                from qwq_local.terminal.markdown import MarkdownWriter

                self._answer = MarkdownWriter(self._out, self._clock)
            else:
                self._answer = _PlainText(self._out) if self._out.is_terminal else _ExactText(self._out)
        self._answer.feed(text)

    def _make_room(self) -> None:
        """Bring the cursor to the start of an empty line."""
        if self._bar:
            self._bar.erase()
        if self._thinking_status:
            self._thinking_status.erase()
        if self._thinking:
            self._thinking.suspend()
        if self._answer:
            self._answer.suspend()

    def _erase_bar(self) -> None:
        if self._bar:
            self._bar.erase()
            self._bar = None

    def _end_thinking(self) -> None:
        if self._thinking_status:
            self._thinking_status.erase()
        if self._thinking:
            self._thinking.close()
        self._thinking = self._thinking_status = None


class SplitScreen:
    """Shows a question that is asked in parts. `think` as for one turn.

    The last answer goes to stdout. Everything else goes to stderr: the plan and a line for each part always;
    thinking and answers of the parts only on a terminal, or when thinking is shown.
    """

    def __init__(self, out: Output, err: Output, clock: Clock, think: Think | None = None) -> None:
        self._out = out
        self._err = err
        self._clock = clock
        self._think = think
        self._shows_answers = err.is_terminal or think == "show"
        self._screen = AskScreen(out, err, clock, think)
        self._is_part = False
        self._plan_line = ""
        self._between = ""
        self._hidden: list[PartDone] = []

    def show(self, event: SplitEvent) -> None:
        """Show one event. Raises BrokenPipeError when the reader has gone."""
        match event:
            case SplitPlanned():
                self._screen.note(plan_line(event))
            case PartStarted():
                self._begin(self._err, is_part=True)
                left = event.seconds_left
                self._line(place_of(event) + ("" if left is None else f" · about {time_left(left)} left"))
            case PartDone():
                self._screen.close()
                if not self._shows_answers and event.answer.strip():
                    self._hidden.append(event)
            case Joining(answers):
                self._begin(self._out, is_part=False)
                self._line(f"the last pass: over {plural(answers, 'answer')}")
            case Planned():
                if event.line != self._plan_line:
                    self._screen.show(event)
                self._plan_line = event.line
            case Answer() | Finished() if self._is_part:
                if isinstance(event, Answer) and self._shows_answers:
                    self._screen.show(event)
            case _:
                self._screen.show(event)

    def show_hidden(self) -> None:
        """Write the answers of the parts that were not shown, when no last answer will come."""
        for done in self._hidden:
            self._err.write(f"\nanswer from {place_of(done)} ({done.reason}):\n{done.answer.rstrip()}\n")
        self._hidden.clear()

    def close(self) -> None:
        """Write the rest. A second call does nothing."""
        self._screen.close()

    def _begin(self, answers: Output, *, is_part: bool) -> None:
        self._screen.close()
        self._screen = AskScreen(answers, self._err, self._clock, self._think)
        self._is_part = is_part

    def _line(self, text: str) -> None:
        """Write a line about a pass, after a blank row if text was shown."""
        self._err.write(f"{self._between}{_dim(f'▸ {text}', self._err)}\n")
        self._between = "\n" if self._shows_answers else ""


def plan_line(event: SplitPlanned) -> str:
    """How many passes there will be, on one line."""
    joins = event.passes - event.parts
    return (
        f"asked in {plural(event.passes, 'pass')}: {plural(event.parts, 'part')} of up to "
        f"{event.part_tokens:,} tokens that share up to {event.overlap_tokens:,}, then their answers "
        f"together{f' in some {joins:,} more' if joins > 1 else ''}."
    )


def place_of(event: PartStarted | PartDone) -> str:
    """The name of a pass."""
    if event.round == 1:
        return f"part {event.part:,} of {event.parts:,}"
    return f"round {event.round}, group {event.part:,} of {event.parts:,}"
