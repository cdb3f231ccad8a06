"""`qwq ask --split` when the text does not fit: a plan in, all passes shown, the last answer on stdout.

What parts answered is kept whatever happens: as lines of JSON, on the terminal, or written on stderr when the
run ends without a last answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from qwq_local.cli.endings import STATUS, ending, final_ledger
from qwq_local.cli.environment import Environment
from qwq_local.engine.api import Aborted
from qwq_local.engine.schema import schema_to_gbnf
from qwq_local.errors import ExitStatus, QwqError, SchemaError
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
from qwq_local.planning.words import stats_line
from qwq_local.profiles.layers import Profile
from qwq_local.splitting.passes import Joining, PartDone, PartStarted, SplitEvent, answer_split, summed
from qwq_local.splitting.plan import SplitBackend, SplitPlan, SplitRequest, split_planned
from qwq_local.terminal.ask_screen import Think
from qwq_local.terminal.output import Output
from qwq_local.terminal.plan_view import planned_lines
from qwq_local.terminal.split_screen import SplitScreen, place_of, plan_line
from qwq_local.wire import event_line, write_line


@dataclass(frozen=True, slots=True)
class Showing:
    """Where everything goes: streams, the form, the file of the thinking, whether figures are wanted."""

    environment: Environment
    profile: Profile
    jsonl: bool = False
    think: Think | None = None
    trace: TextIO | None = None
    stats: bool = False


class _Sink(Protocol):
    def show(self, event: SplitEvent) -> None: ...

    def show_hidden(self) -> None: ...

    def close(self) -> None: ...


def check_schema(schema: Mapping[str, object] | None, path: Path | None) -> None:
    """Raises SchemaError for a schema that no grammar expresses; the last pass may be hours away."""
    if schema is not None:
        try:
            schema_to_gbnf(schema)
        except SchemaError as error:
            raise SchemaError(f"{path}{error}") from None


def show_split_plan(plan: SplitPlan, showing: Showing) -> int:
    """Print the passes and the plan for the largest part, on stdout: it is what was asked for."""
    stdout, event = showing.environment.stdout, split_planned(plan)
    if showing.jsonl:
        write_line(stdout, event_line(event))
        write_line(stdout, event_line(plan.planned))
        return ExitStatus.ANSWERED
    write_line(stdout, f"{plan_line(event)}\nThe largest part:\n")
    for line in planned_lines(plan.planned, Output.of(stdout, showing.environment.variables)):
        write_line(stdout, f"{line}\n")
    return ExitStatus.ANSWERED


def answer_in_parts(backend: SplitBackend, request: SplitRequest, plan: SplitPlan, showing: Showing) -> int:
    """Ask every part and put the answers together; the exit status of the last pass. Raises QwqError."""
    environment, run = showing.environment, _Run()
    sink = _sink(showing)
    try:
        for event in answer_split(backend, request, plan):
            run.take(event)
            sink.show(event)
            if showing.trace is not None:
                _write_trace(showing.trace, event)
        if not showing.jsonl and (line := ending(run.reason, showing.profile)):
            sink.show(Notice(line))
    except Aborted:
        run.reason = FinishReason.INTERRUPTED
    except (QwqError, KeyboardInterrupt):
        sink.close()
        sink.show_hidden()
        raise
    sink.close()
    if run.reason in (FinishReason.INTERRUPTED, FinishReason.NO_ANSWER):
        sink.show_hidden()
    if showing.stats:
        write_line(environment.stderr, f"{run.passes:,} passes: {stats_line(run.spent)}\n")
        if run.planned is not None:
            write_line(environment.stderr, f"last pass: {final_ledger(run.planned, run.last)}\n")
    return STATUS[run.reason]


class _Run:
    """What all passes came to so far."""

    def __init__(self) -> None:
        self.reason = FinishReason.INTERRUPTED
        self.passes = 0
        self.spent = self.last = TurnStats()
        self.planned: Planned | None = None
        self._is_last = False

    def take(self, event: SplitEvent) -> None:
        """Count a pass that ended."""
        match event:
            case Planned():
                self.planned = event
            case PartDone():
                self._count(event.stats)
            case Joining():
                self._is_last = True
            case Finished():
                self.reason = event.reason
                if self._is_last:
                    self._count(event.stats)

    def _count(self, stats: TurnStats) -> None:
        self.passes += 1
        self.last, self.spent = stats, summed(self.spent, stats)


class _Lines:
    """Every event as a line of JSON; of a part's text only what `part_done` holds in the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_part = False

    def show(self, event: SplitEvent) -> None:
        if isinstance(event, PartStarted | Joining):
            self._is_part = isinstance(event, PartStarted)
        if not (self._is_part and isinstance(event, Thinking | ThinkingClosed | Answer)):
            write_line(self._stream, event_line(event))

    def show_hidden(self) -> None:
        """Nothing is hidden."""

    def close(self) -> None:
        """Nothing is left open."""


def _sink(showing: Showing) -> _Sink:
    environment = showing.environment
    if showing.jsonl:
        return _Lines(environment.stdout)
    out = Output.of(environment.stdout, environment.variables)
    err = Output.of(environment.stderr, environment.variables)
    return SplitScreen(out, err, time.monotonic, showing.think)


def _write_trace(trace: TextIO, event: SplitEvent) -> None:
    """The thinking of each pass under a line that says which."""
    match event:
        case PartStarted():
            write_line(trace, f"--- {place_of(event)} ---\n")
        case Joining():
            write_line(trace, "--- the last pass ---\n")
        case PartDone():
            write_line(trace, "\n\n")
        case Thinking(text):
            write_line(trace, text)
