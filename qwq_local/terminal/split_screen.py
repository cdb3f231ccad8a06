"""A question that is asked in parts, on stdout and stderr: progress, parts, and the last answer.

The last answer goes to stdout. Everything else goes to stderr: the plan and a line for each part always;
thinking and answers of the parts only on a terminal, or when thinking is shown. If no last answer comes,
answers that were not shown are written at the end.
"""

from __future__ import annotations

from qwq_local.backend.split import Joining, PartDone, PartStarted, SplitEvent, SplitPlanned
from qwq_local.events import Answer, Finished, Planned
from qwq_local.terminal.ask_screen import AskScreen, Think
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock, rough_duration
from qwq_local.text import plural


class SplitScreen:
    """Shows the events of all passes. `think` as for one turn."""

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
        before, after = ("\x1b[2m", "\x1b[0m") if self._err.is_live else ("", "")
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
    return f" · about {rough_duration(event.seconds_left)} left" if event.seconds_left is not None else ""
