"""The status line: what is known of the turn in, a row or two that fit the window out.

While it thinks there is most to tell: where one row cannot hold it, the keys have a row of their own. Parts
give way in a fixed order, each first to its shorter form and then altogether. Knows no clock and no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from qwq_local.planning.words import duration
from qwq_local.terminal.sanitize import cell_width, one_line

MODEL_CELLS = 40
NAME_CELLS = 30

WIDE_COLUMNS = 150
"""From here on one row holds figures and keys together."""

HIGH_ROWS = 12
"""A lower window has no row to spare for the keys."""

# What gives way first; a part that is named again is shortened again, in the end it is left out.
GIVES_WAY = (
    *("name", "name", "thought", "context", "tokens", "rate", "model", "view", "steer", "stop", "answer"),
    *("tokens", "help", "yarn", "steer", "context", "view", "files", "model", "rate", "answer"),
    *("files", "tokens", "stop"),
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


@dataclass(frozen=True, slots=True)
class Figures:
    """What the status line tells; zero and empty: unknown, or nothing to tell.

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


def status_rows(figures: Figures, columns: int, window_rows: int) -> tuple[str, ...]:
    """The row, or the figures' and the keys', each at most `columns` - 1 cells."""
    parts = _parts(figures)
    if figures.phase is not Phase.THINKING or columns >= WIDE_COLUMNS or window_rows < HIGH_ROWS:
        return (_fitting(parts, columns),)
    told = {name: forms for name, forms in parts.items() if name not in _KEYS}
    keys = {name: forms for name, forms in parts.items() if name in _KEYS}
    return _fitting(told, columns), _fitting(keys, columns)


def _fitting(parts: Mapping[str, tuple[str, ...]], columns: int) -> str:
    shown = {name: forms[0] for name, forms in parts.items()}
    left = {name: list(forms[1:]) for name, forms in parts.items()}
    for name in GIVES_WAY:
        if cell_width(_joined(shown)) < columns:
            break
        if name in shown:
            shown[name] = left[name].pop(0) if left[name] else ""
    return one_line(_joined(shown), max(columns - 1, 0))


def _joined(shown: Mapping[str, str]) -> str:
    keys = " ".join(text for name, text in shown.items() if text and name in _KEYS)
    return " · ".join(filter(None, [*(text for name, text in shown.items() if name not in _KEYS), keys]))


def _parts(figures: Figures) -> dict[str, tuple[str, ...]]:
    """Each part in the order of the line: its forms, the longest first."""
    name = one_line(figures.model, MODEL_CELLS)
    model = (name, name.partition(" ")[0])
    context = {
        "context": _context(figures),
        "yarn": (f"YaRN {figures.yarn_factor:g}",) if figures.yarn_factor > 1 else (),
    }
    if figures.phase is Phase.IDLE:
        parts = {
            "model": model,
            **context,
            "files": _files(figures.attached),
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


def _keys(figures: Figures) -> dict[str, tuple[str, ...]]:
    stop: dict[str, tuple[str, ...]] = {"stop": ("^C stop", "^C")}
    if figures.phase is not Phase.THINKING:
        return stop
    return {
        "view": (f"^T {figures.view}", "^T"),
        "answer": ("^G answer", "^G"),
        "steer": ("^S steer", "^S"),
        **stop,
    }


def _tokens(figures: Figures) -> tuple[str, ...]:
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


def _context(figures: Figures) -> tuple[str, ...]:
    if not figures.n_ctx:
        return ()
    share = int(100 * figures.used_tokens / figures.n_ctx)
    return f"ctx {figures.used_tokens:,}/{figures.n_ctx:,}", f"ctx {share}%"


def _files(attached: int) -> tuple[str, ...]:
    return (f"{attached} file{'s' if attached != 1 else ''} attached", f"+{attached}") if attached else ()
