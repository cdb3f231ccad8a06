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
from qwq_local.terminal.progress import TOKENS, Clock, ProgressBar, StatusLine
from qwq_local.terminal.sanitizer import Sanitizer, one_line
from qwq_local.text import duration, plural, time_left

if TYPE_CHECKING:
    from qwq_local.terminal.markdown import MarkdownWriter

Think = Literal["show", "hide"]

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class ExactText:
    """Model text as generated, for pipes and files."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._is_mid_line = False

    def feed(self, text: str) -> None:
        """Write the piece unchanged."""
        if text:
            self._output.write(text)
            self._is_mid_line = not text.endswith("\n")

    def suspend(self) -> None:
        """Nothing to do: stderr does not interrupt this stream."""

    def close(self) -> None:
        """End the last line if the model did not."""
        if self._is_mid_line:
            self.feed("\n")


class PlainText:
    """Model text on a terminal: sanitized, optionally dim, without blank lines at its ends."""

    def __init__(self, output: Output, is_dim: bool = False) -> None:
        self._output = output
        self._before, self._after = (_DIM, _PLAIN) if is_dim and output.is_live else ("", "")
        self._sanitizer = Sanitizer()
        self._held_newlines = ""
        self._has_text = False
        self._is_mid_line = False

    def feed(self, text: str) -> None:
        """Write the piece. Its style ends with it, so an interruption leaves no style behind."""
        text = self._held_newlines + self._sanitizer.feed(text)
        if not self._has_text:
            text = text.lstrip("\n")
        shown = text.rstrip("\n")
        self._held_newlines = text[len(shown) :]
        if shown:
            self._output.write(f"{self._before}{shown}{self._after}")
            self._has_text = self._is_mid_line = True

    def suspend(self) -> None:
        """End the open line, even in the middle of a sentence."""
        if self._is_mid_line:
            self._output.write("\n")
            self._is_mid_line = False
            self._held_newlines = self._held_newlines[1:]

    def close(self) -> None:
        """End the last line."""
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
        self._bar: ProgressBar | None = None
        self._thinking: PlainText | ExactText | None = None
        self._thinking_status: StatusLine | None = None
        self._thinking_since = 0.0
        self._answer: ExactText | PlainText | MarkdownWriter | None = None
        self._is_broken = False

    def __enter__(self) -> AskScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
            case Loading():
                self._show_loading(event)
            case Prefill():
                self._show_prefill(event)
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

    def _show_loading(self, event: Loading) -> None:
        if self._bar is None:
            self._bar = ProgressBar(self._err, f"loading {one_line(event.model, 60)}", 1.0, self._clock)
        self._bar.update(event.fraction)

    def _show_plan(self, event: Planned) -> None:
        """Write the plan on one line, on a terminal only."""
        if self._err.is_terminal and event.line:
            line = one_line(f"▸ {event.line}", max(NOTICE_CELLS, self._err.size()[0]))
            self._make_room()
            self._err.write(f"{_DIM}{line}{_PLAIN}\n" if self._err.is_live else f"{line}\n")

    def _show_prefill(self, event: Prefill) -> None:
        if self._answer or self._thinking or event.total <= event.cached:
            return
        if self._bar is None or not self._bar.counts(TOKENS):
            self._erase_bar()
            self._bar = ProgressBar(self._err, "reading", event.total, self._clock, TOKENS)
            self._bar.update(event.cached)
        self._bar.update(event.done)

    def _show_thinking(self, text: str) -> None:
        if self._shows_thinking:
            if self._thinking is None:
                is_terminal = self._err.is_terminal
                self._thinking = PlainText(self._err, is_dim=True) if is_terminal else ExactText(self._err)
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
        styled = f"{_DIM}{line}{_PLAIN}" if self._err.is_live else line
        # A blank row separates thinking and answer where both are on the screen.
        is_above_answer = self._shows_thinking and self._err.is_terminal and self._out.is_terminal
        self._err.write(styled + ("\n\n" if is_above_answer else "\n"))

    def _show_answer(self, text: str) -> None:
        if self._answer is None:
            self._end_thinking()
            self._answer = self._open_answer()
        self._answer.feed(text)

    def _open_answer(self) -> ExactText | PlainText | MarkdownWriter:
        if not self._out.is_terminal:
            return ExactText(self._out)
        if self._out.is_dumb:
            return PlainText(self._out)
        from qwq_local.terminal.markdown import MarkdownWriter

        return MarkdownWriter(self._out, self._clock)

    def _make_room(self) -> None:
        """Bring the cursor to the start of an empty line."""
        if self._bar:
            self._bar.finish()
        if self._thinking_status:
            self._thinking_status.erase()
        if self._thinking:
            self._thinking.suspend()
        if self._answer:
            self._answer.suspend()

    def _erase_bar(self) -> None:
        if self._bar:
            self._bar.finish()
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
                self._begin(AskScreen(self._err, self._err, self._clock, self._think), is_part=True)
                self._line(f"{place_of(event)}{_left(event)}")
            case PartDone():
                self._screen.close()
                if not self._shows_answers and event.answer.strip():
                    self._hidden.append(event)
            case Joining(answers):
                self._begin(AskScreen(self._out, self._err, self._clock, self._think), is_part=False)
                self._line(f"the last pass: over {plural(answers, 'answer')}")
            case Planned() if event.line == self._plan_line:
                pass
            case Answer() if self._is_part and not self._shows_answers:
                pass
            case Finished() if self._is_part:
                pass
            case _:
                if isinstance(event, Planned):
                    self._plan_line = event.line
                self._screen.show(event)

    def show_hidden(self) -> None:
        """Write the answers of the parts that were not shown, when no last answer will come."""
        for done in self._hidden:
            self._err.write(f"\nanswer from {place_of(done)} ({done.reason}):\n{done.answer.rstrip()}\n")
        self._hidden.clear()

    def close(self) -> None:
        """Write the rest. A second call does nothing."""
        self._screen.close()

    def _begin(self, screen: AskScreen, *, is_part: bool) -> None:
        self._screen.close()
        self._screen, self._is_part = screen, is_part

    def _line(self, text: str) -> None:
        """Write a line about a pass, after a blank row if text was shown."""
        before, after = (_DIM, _PLAIN) if self._err.is_live else ("", "")
        self._err.write(f"{self._between}{before}▸ {text}{after}\n")
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


def _left(event: PartStarted) -> str:
    return f" · about {time_left(event.seconds_left)} left" if event.seconds_left is not None else ""
