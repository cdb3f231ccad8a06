"""What the status line is told: events in; phase, seconds and counts out, of this turn or between turns."""

from __future__ import annotations

from dataclasses import replace

from qwq_local.chat.events import Asking, Changed, ChatEvent
from qwq_local.events import (
    Answer,
    Finished,
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
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.repl.meter import Meter
from qwq_local.terminal.repl.status import Figures, Phase

_SILENT = (Notice, Generated, Planned, Prompted)


class TurnFigures:
    """Follows the turns; `figures` says where things stand."""

    def __init__(self, clock: Clock) -> None:
        self.phase = Phase.IDLE
        self._clock = clock
        self._since = clock()
        self._meter = Meter(clock)
        self.standing: Changed | None = None  # between turns
        self._model = ""
        self._is_turn = False
        self._has_thought = False

    @property
    def elapsed_s(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._since

    def take(self, event: ChatEvent) -> None:
        """Take any event."""
        match event:
            case Thinking():
                self._generate(Phase.THINKING, event.text)
            case Answer():
                self._generate(Phase.ANSWERING, event.text)
            case Steered():
                self._enter(Phase.THINKING)
            case Asking():
                self._meter = Meter(self._clock)
                self._is_turn = True
                self._enter(Phase.STARTING)
            case Loading(_, fraction):
                self._enter(Phase.LOADING if self._is_turn or fraction < 1 else Phase.IDLE)
            case Prefill(_, total, cached):
                if total > cached and self.phase not in (Phase.THINKING, Phase.ANSWERING):
                    self._enter(Phase.READING)
            case ThinkingClosed(_, tokens):
                self._has_thought = self._has_thought or tokens > 0
                self._enter(Phase.ANSWERING)
            case Finished():
                self.end()
            case _:
                self._note(event)

    def end(self) -> None:
        """The turn is over, however it ended."""
        if self.standing and self._meter.n_ctx:
            used, factor = self._meter.used_tokens, self._meter.yarn_factor
            self.standing = replace(
                self.standing, n_ctx=self._meter.n_ctx, used_tokens=used, yarn_factor=factor, attached=0
            )
        self._is_turn = False
        self._enter(Phase.IDLE)

    def figures(self, view: str) -> Figures:
        """Where things stand; `view` says what the key for it does."""
        if self.phase is Phase.IDLE:
            standing = self.standing or Changed("", 0, 0, 1.0)
            return Figures(
                model=standing.model,
                used_tokens=standing.used_tokens,
                n_ctx=standing.n_ctx,
                yarn_factor=standing.yarn_factor,
                conversation=standing.conversation,
                attached=standing.attached,
                has_thought=self._has_thought,
            )
        meter = self._meter
        thinks, answers = self.phase is Phase.THINKING, self.phase is Phase.ANSWERING
        return Figures(
            self.phase,
            self.elapsed_s,
            meter.thinking_tokens if thinks else meter.answer_tokens if answers else 0,
            meter.thinking_budget if thinks else 0,
            meter.rate() if thinks or answers else 0.0,
            meter.used_tokens,
            meter.n_ctx,
            meter.yarn_factor,
            self._model or (self.standing.model if self.standing else ""),
            view=view,
        )

    def _generate(self, phase: Phase, text: str) -> None:
        if text:
            self._meter.piece(phase is Phase.ANSWERING)
        self._enter(phase)

    def _note(self, event: ChatEvent) -> None:
        match event:
            case Generated():
                self._meter.count(event)
            case Planned():
                self._model = event.model
                self._meter.plan(event)
            case Prompted(tokens):
                self._meter.prompt(len(tokens))
            case Changed():
                self.standing, self._model = event, event.model
        if not self._is_turn and not isinstance(event, _SILENT):
            self._enter(Phase.IDLE)

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase, self._since = phase, self._clock()
        if phase in (Phase.READING, Phase.THINKING, Phase.ANSWERING):
            self._is_turn = True
