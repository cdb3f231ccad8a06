"""Where the events of a reply go, and what is said of its end: the screen, or lines of JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import TextIO

from qwq_local.backend.split import Joining, PartStarted, SplitEvent
from qwq_local.cli.environment import Environment
from qwq_local.errors import ExitStatus
from qwq_local.events import Answer, FinishReason, Planned, Thinking, ThinkingClosed, TurnStats
from qwq_local.planning.summary import ledger_line
from qwq_local.planning.window import Window, larger_factor
from qwq_local.profiles.keys import Profile
from qwq_local.terminal.ask_screen import AskScreen
from qwq_local.terminal.chat_lines import planned_lines
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import one_line
from qwq_local.wire import event_line, write_line

STATUS = {
    FinishReason.STOP: ExitStatus.ANSWERED,
    FinishReason.MAX_TOKENS: ExitStatus.CUT,
    FinishReason.CONTEXT: ExitStatus.CUT,
    FinishReason.LOOP: ExitStatus.CUT,
    FinishReason.NO_ANSWER: ExitStatus.NO_ANSWER,
    FinishReason.INTERRUPTED: ExitStatus.INTERRUPTED,
}

_ENDINGS = {
    FinishReason.MAX_TOKENS: "the answer was cut at max_tokens. Raise it: --set max_tokens=N (0: no limit).",
    FinishReason.LOOP: "the answer was ended: it repeated itself. Another --seed may do better.",
    FinishReason.NO_ANSWER: "no answer came out of the thinking. Another --seed may do better.",
}


class JsonLines:
    """Every event as a line of JSON. The text of a part of `--split` is written once, in its `part_done`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_part = False

    def show(self, event: SplitEvent) -> None:
        """Writes the event."""
        if isinstance(event, PartStarted | Joining):
            self._is_part = isinstance(event, PartStarted)
        if not (self._is_part and isinstance(event, Thinking | ThinkingClosed | Answer)):
            write_line(self._stream, event_line(event))

    def show_hidden(self) -> None:
        """Does nothing: nothing is hidden."""

    def close(self) -> None:
        """Does nothing: no line is left open."""


EventWriter = JsonLines | AskScreen


def write_note(stream: TextIO, text: str) -> None:
    """Writes a note on one line."""
    write_line(stream, f"note: {one_line(text, 500)}\n")


def ending(reason: FinishReason, profile: Profile) -> str:
    """Why the answer is not whole and what would help; empty where nothing is to be said."""
    if reason is not FinishReason.CONTEXT:
        return _ENDINGS.get(reason, "")
    window = Window(profile.native_window, profile.yarn_factors, profile.yarn)
    if profile.n_ctx is not None and profile.n_ctx < window.largest:
        return f"the answer was cut: the context of {profile.n_ctx:,} tokens is full. Leave out n_ctx."
    advice = larger_factor(window.largest + 1, window) or (
        " Raise answer_reserve, or shorten the prompt." if window.yarn is None else " Shorten the prompt."
    )
    return f"the answer was cut: its context is full.{advice}"


def final_ledger(planned: Planned, stats: TurnStats) -> str:
    """How the context was used at the end: thinking and answer are no longer free."""
    used = stats.thinking_tokens + stats.answer_tokens
    ledger = replace(planned.ledger, free=max(0, planned.ledger.free - used))
    return f"{ledger_line(ledger, planned.n_ctx)} · this turn {used:,}"


def write_plan(environment: Environment, planned: Planned, *, jsonl: bool) -> None:
    """Writes a plan to stdout, as text or as its event."""
    if jsonl:
        write_line(environment.stdout, event_line(planned))
    else:
        environment.print(*planned_lines(planned, Output.of(environment.stdout, environment.variables)))
