"""`qwq ask --split` for a text that does not fit: shows all passes and writes the last answer to stdout.

The answers of the parts are never lost: they are lines of JSON, stand on the terminal, or go to stderr when
the run ends without a last answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, TextIO

from qwq_local.backend.split import (
    Joining,
    PartDone,
    PartStarted,
    SplitBackend,
    SplitEvent,
    SplitPlan,
    SplitRequest,
    answer_split,
    summed,
)
from qwq_local.cli.environment import Environment, ReplyInterrupt
from qwq_local.cli.output import STATUS, ending, final_ledger, write_plan
from qwq_local.errors import Aborted, ExitStatus, QwqError
from qwq_local.events import (
    Answer,
    Finished,
    FinishReason,
    Notice,
    Planned,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.background import BackgroundRecorder
from qwq_local.planning.summary import stats_line
from qwq_local.profiles.keys import Profile
from qwq_local.terminal.ask_screen import SplitScreen, Think, place_of, plan_line
from qwq_local.terminal.output import Output
from qwq_local.wire import event_line, write_line


@dataclass(frozen=True, slots=True)
class SplitOutput:
    """Where and how the passes are shown. `trace` is the open file of `--think-to`.

    `recorder` keeps the last pass in the history.
    """

    environment: Environment
    profile: Profile
    jsonl: bool = False
    think: Think | None = None
    trace: TextIO | None = None
    stats: bool = False
    recorder: BackgroundRecorder | None = None


class _SplitWriter(Protocol):
    def show(self, event: SplitEvent) -> None: ...

    def show_hidden(self) -> None: ...

    def close(self) -> None: ...


def show_split_plan(plan: SplitPlan, output: SplitOutput) -> int:
    """Writes the passes and the plan for the largest part to stdout."""
    event = plan.event
    text = event_line(event) if output.jsonl else f"{plan_line(event)}\nThe largest part:\n"
    write_line(output.environment.stdout, text)
    write_plan(output.environment, plan.planned, jsonl=output.jsonl)
    return ExitStatus.ANSWERED


def answer_in_parts(
    backend: SplitBackend,
    request: SplitRequest,
    plan: SplitPlan,
    output: SplitOutput,
    interrupt: ReplyInterrupt,
) -> int:
    """Asks every part, then for one answer from theirs. Returns the last pass's exit status."""
    environment, run = output.environment, _PassTotals()
    writer = _writer(output)
    try:
        for event in interrupt.watch(answer_split(backend, request, plan)):
            run.take(event)
            if run.is_last and output.recorder is not None:
                output.recorder.feed(event)
            writer.show(event)
            if output.trace is not None:
                _write_trace(output.trace, event)
        if not output.jsonl and (line := ending(run.reason, output.profile)):
            writer.show(Notice(line))
    except Aborted:
        run.reason = FinishReason.INTERRUPTED
    except (QwqError, KeyboardInterrupt):
        writer.close()
        writer.show_hidden()
        raise
    writer.close()
    if run.reason in (FinishReason.INTERRUPTED, FinishReason.NO_ANSWER):
        writer.show_hidden()
    if output.stats:
        write_line(environment.stderr, f"{run.passes:,} passes: {stats_line(run.spent)}\n")
        if run.planned is not None:
            write_line(environment.stderr, f"last pass: {final_ledger(run.planned, run.last)}\n")
    return STATUS[run.reason]


class _PassTotals:
    """The passes so far: how many, their tokens and seconds, how the last one ended."""

    def __init__(self) -> None:
        self.reason = FinishReason.INTERRUPTED
        self.passes = 0
        self.spent = self.last = TurnStats()
        self.planned: Planned | None = None
        self.is_last = False

    def take(self, event: SplitEvent) -> None:
        """Counts the pass that the event ends."""
        match event:
            case Planned():
                self.planned = event
            case PartDone():
                self._count(event.stats)
            case Joining():
                self.is_last = True
            case Finished():
                self.reason = event.reason
                if self.is_last:
                    self._count(event.stats)

    def _count(self, stats: TurnStats) -> None:
        self.passes += 1
        self.last, self.spent = stats, summed(self.spent, stats)


class _SplitLines:
    """Every event as a line of JSON. The text of a part is written once, in its `part_done`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_part = False

    def show(self, event: SplitEvent) -> None:
        if isinstance(event, PartStarted | Joining):
            self._is_part = isinstance(event, PartStarted)
        if not (self._is_part and isinstance(event, Thinking | ThinkingClosed | Answer)):
            write_line(self._stream, event_line(event))

    def show_hidden(self) -> None:
        """Does nothing: nothing is hidden."""

    def close(self) -> None:
        """Does nothing: no line is left open."""


def _writer(output: SplitOutput) -> _SplitWriter:
    environment = output.environment
    if output.jsonl:
        return _SplitLines(environment.stdout)
    out = Output.of(environment.stdout, environment.variables)
    err = Output.of(environment.stderr, environment.variables)
    return SplitScreen(out, err, time.monotonic, output.think)


def _write_trace(trace: TextIO, event: SplitEvent) -> None:
    """Writes the thinking of each pass under a line that names the pass."""
    match event:
        case PartStarted():
            write_line(trace, f"--- {place_of(event)} ---\n")
        case Joining():
            write_line(trace, "--- the last pass ---\n")
        case PartDone():
            write_line(trace, "\n\n")
        case Thinking(text):
            write_line(trace, text)
