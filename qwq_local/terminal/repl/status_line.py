"""The status line: phase, seconds, tokens, rate, context and keys, in one or two rows that fit the window.

Token counts are exact where the turn reports them; between reports each piece counts as one token. Where the
window is narrow, parts get shorter and then disappear, in a fixed order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from qwq_local.chat.events import Asking, ChatEvent, ChatStatus
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
from qwq_local.terminal.sanitizer import cell_width, one_line
from qwq_local.text import duration

RATE_OVER_S = 5.0
"""The rate of the last seconds: steady enough to read, and it follows a long context."""

RATE_AFTER_S = 0.5
MARK_EVERY_S = 0.25


class TokenCounter:
    """Counts the tokens of one turn."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._thinking = self._answer = 0
        self._pieces = 0  # of the thinking or the answer, since the last exact count
        self._is_answering = False
        self._marks: deque[tuple[float, int]] = deque()

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the thinking, at least."""
        return self._thinking + (0 if self._is_answering else self._pieces)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer, at least."""
        return self._answer + (self._pieces if self._is_answering else 0)

    @property
    def generated(self) -> int:
        """Tokens of both."""
        return self._thinking + self._answer + self._pieces

    def count(self, event: Generated) -> None:
        """Take an exact count."""
        before = self.generated
        self._thinking = event.thinking
        self._answer = max(0, event.start + len(event.tokens) - event.thinking)
        self._pieces = 0
        if self.generated < before:
            self._marks.clear()  # Tokens were removed: a rate across that is meaningless.

    def piece(self, is_answer: bool) -> None:
        """Take a piece of thinking or answer: at least one token."""
        if is_answer != self._is_answering:
            self._thinking, self._answer = self.thinking_tokens, self.answer_tokens
            self._pieces, self._is_answering = 0, is_answer
        self._pieces += 1
        if not self._marks:
            self._marks.append((self._clock(), self.generated))

    def rate(self) -> float:
        """Tokens per second over the last seconds; 0 while it is unknown."""
        now, generated = self._clock(), self.generated
        if not self._marks:
            return 0.0
        if now - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now, generated))
            while len(self._marks) > 2 and now - self._marks[1][0] >= RATE_OVER_S:
                self._marks.popleft()
        then, before = self._marks[0]
        return max(0, generated - before) / (now - then) if now - then >= RATE_AFTER_S else 0.0


MODEL_CELLS = 40
NAME_CELLS = 30

WIDE_COLUMNS = 150
"""In a window this wide, one row holds figures and keys."""

HIGH_ROWS = 12
"""A lower window has one row only."""

# The order in which parts get shorter. Each mention shortens a part once more; the last one removes it.
SHORTENED = (
    "name name thought context tokens rate model view steer stop answer "
    "tokens help yarn steer context view files model rate answer files tokens stop"
)
_KEYS = ("view", "answer", "steer", "thought", "stop", "help")


class Phase(Enum):
    """What a turn is doing."""

    IDLE = "idle"
    STARTING = "starting"
    LOADING = "loading"
    READING = "reading"
    THINKING = "thinking"
    ANSWERING = "answering"
    SAVING = "saving"


@dataclass(frozen=True, slots=True)
class StatusFigures:
    """The figures of the status line; zero and empty mean unknown or nothing to show.

    `tokens` of the thinking or the answer, `budget` of the thinking; `view` says what Ctrl-T does.
    """

    phase: Phase = Phase.IDLE
    elapsed_s: float = 0.0
    tokens: int = 0
    budget: int = 0
    rate: float = 0.0
    used_tokens: int = 0
    n_ctx: int = 0
    yarn_factor: float = 1.0
    model: str = ""
    conversation: str = ""
    attached: int = 0
    has_thought: bool = False
    view: str = "view"


def status_rows(figures: StatusFigures, columns: int, window_rows: int) -> tuple[str, ...]:
    """The row, or the figures' and the keys', each at most `columns` - 1 cells."""
    parts = _parts(figures)
    if figures.phase is not Phase.THINKING or columns >= WIDE_COLUMNS or window_rows < HIGH_ROWS:
        return (_fitting(parts, columns),)
    figures_parts = {name: forms for name, forms in parts.items() if name not in _KEYS}
    keys = {name: forms for name, forms in parts.items() if name in _KEYS}
    return _fitting(figures_parts, columns), _fitting(keys, columns)


def _fitting(parts: Mapping[str, tuple[str, ...]], columns: int) -> str:
    shown = {name: forms[0] for name, forms in parts.items()}
    left = {name: list(forms[1:]) for name, forms in parts.items()}
    for name in SHORTENED.split():
        if cell_width(_joined(shown)) < columns:
            break
        if name in shown:
            shown[name] = left[name].pop(0) if left[name] else ""
    return one_line(_joined(shown), max(columns - 1, 0))


def _joined(shown: Mapping[str, str]) -> str:
    keys = " ".join(text for name, text in shown.items() if text and name in _KEYS)
    return " · ".join(filter(None, [*(text for name, text in shown.items() if name not in _KEYS), keys]))


def _parts(figures: StatusFigures) -> dict[str, tuple[str, ...]]:
    """Each part in the order of the line, with its forms, longest first."""
    name = one_line(figures.model, MODEL_CELLS)
    model = (name, name.partition(" ")[0])
    context = {
        "context": _context(figures),
        "yarn": (f"YaRN {figures.yarn_factor:g}",) if figures.yarn_factor > 1 else (),
    }
    n = figures.attached
    if figures.phase is Phase.IDLE:
        parts = {
            "model": model,
            **context,
            "files": (f"{n} file{'s' if n != 1 else ''} attached", f"+{n}") if n else (),
            "name": (one_line(figures.conversation, NAME_CELLS), one_line(figures.conversation, 12)),
            "thought": ("^T thought",) if figures.has_thought else (),
            "help": ("/help",),
        }
    else:
        parts = {
            "phase": (f"{figures.phase.value} {duration(figures.elapsed_s)}",),
            "tokens": _tokens(figures),
            "rate": _rate(figures.rate),
            **context,
            "model": model,
            **_keys(figures),
        }
    return {name: forms for name, forms in parts.items() if forms}


def _keys(figures: StatusFigures) -> dict[str, tuple[str, ...]]:
    if figures.phase is Phase.SAVING:
        return {}
    stop: dict[str, tuple[str, ...]] = {"stop": ("^C stop", "^C")}
    if figures.phase is not Phase.THINKING:
        return stop
    return {
        "view": (f"^T {figures.view}", "^T"),
        "answer": ("^G answer", "^G"),
        "steer": ("^S steer", "^S"),
        **stop,
    }


def _tokens(figures: StatusFigures) -> tuple[str, ...]:
    if not figures.tokens:
        return ()
    count = f"{figures.tokens:,}"
    if not figures.budget:
        return f"{count} tok", count
    return f"{count}/{figures.budget:,} tok", f"{count}/{figures.budget:,}", f"{count} tok"


def _rate(rate: float) -> tuple[str, ...]:
    if rate <= 0:
        return ()
    whole = f"{rate:,.0f} tok/s" if rate >= 1 else f"{rate:.1f} tok/s"
    return (f"{rate:.1f} tok/s", whole) if rate < 100 else (whole,)


def _context(figures: StatusFigures) -> tuple[str, ...]:
    if not figures.n_ctx:
        return ()
    share = int(100 * figures.used_tokens / figures.n_ctx)
    return f"ctx {figures.used_tokens:,}/{figures.n_ctx:,}", f"ctx {share}%"


_SILENT = (Notice, Generated, Planned, Prompted)


class TurnStatus:
    """Follows the events of turns; `figures` has the current state."""

    def __init__(self, clock: Clock) -> None:
        self.phase = Phase.IDLE
        self._clock = clock
        self._since = clock()
        self._counter = TokenCounter(clock)
        self._planned: Planned | None = None
        self._prompt_tokens = 0
        self.standing: ChatStatus | None = None  # between turns
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
                self._counter = TokenCounter(self._clock)
                self._planned, self._prompt_tokens = None, 0
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
                self._finish()
            case _:
                self._note(event)

    def end_line(self) -> None:
        """Show that nothing runs."""
        if self._is_turn:
            self._finish()
        self._enter(Phase.IDLE)

    def _finish(self) -> None:
        """The turn is over. Writing it to the history may still take time."""
        if self.standing and self._planned:
            used, n_ctx, factor = self._used_tokens, self._planned.n_ctx, self._planned.yarn_factor
            self.standing = replace(
                self.standing, n_ctx=n_ctx, used_tokens=used, yarn_factor=factor, attached=0
            )
        self._is_turn = False
        self._enter(Phase.SAVING)

    def figures(self, view: str) -> StatusFigures:
        """The current figures; `view` is the text for Ctrl-T."""
        standing = self.standing or ChatStatus("", 0, 0, 1.0)
        if self.phase is Phase.IDLE:
            return StatusFigures(
                model=standing.model,
                used_tokens=standing.used_tokens,
                n_ctx=standing.n_ctx,
                yarn_factor=standing.yarn_factor,
                conversation=standing.conversation,
                attached=standing.attached,
                has_thought=self._has_thought,
            )
        planned, counter = self._planned, self._counter
        thinks, answers = self.phase is Phase.THINKING, self.phase is Phase.ANSWERING
        return StatusFigures(
            self.phase,
            self.elapsed_s,
            counter.thinking_tokens if thinks else counter.answer_tokens if answers else 0,
            planned.thinking_budget if planned and thinks else 0,
            counter.rate() if thinks or answers else 0.0,
            self._used_tokens,
            planned.n_ctx if planned else 0,
            planned.yarn_factor if planned else 1.0,
            (planned or standing).model,
            view=view,
        )

    @property
    def _used_tokens(self) -> int:
        return self._prompt_tokens + self._counter.generated

    def _generate(self, phase: Phase, text: str) -> None:
        if text:
            self._counter.piece(phase is Phase.ANSWERING)
        self._enter(phase)

    def _note(self, event: ChatEvent) -> None:
        match event:
            case Generated():
                self._counter.count(event)
            case Planned():
                self._planned, self._prompt_tokens = event, event.prompt_tokens
            case Prompted(tokens):
                self._prompt_tokens = len(tokens)
            case ChatStatus():
                self.standing = event
        if not self._is_turn and self.phase is not Phase.SAVING and not isinstance(event, _SILENT):
            self._enter(Phase.IDLE)

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase, self._since = phase, self._clock()
        if phase in (Phase.READING, Phase.THINKING, Phase.ANSWERING):
            self._is_turn = True
