"""What a chat shows between turns, as lines of text: tables, the context as a bar, the next plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwq_local.chat.events import CommandHelp, ContextUse, KeyHelp, NextPlan, Said, Shown, TextTable
from qwq_local.events import CloseReason, Planned
from qwq_local.planning.summary import choice_rows, ledger_line
from qwq_local.terminal.sanitizer import aligned_lines, sanitize
from qwq_local.text import duration

_LINE_LIMIT = 20_000
"""Characters of one line; what is said is short but for a name or a path in it."""

NOTICE_CELLS = 600
"""Cells of the longest notice: it may wrap, but must not fill a screen."""

CLOSED_BY = {
    CloseReason.MODEL: "",
    CloseReason.BUDGET: "ended at its budget",
    CloseReason.CONTEXT: "ended to leave room for the answer",
    CloseReason.LOOP: "ended in a loop",
    CloseReason.ASKED: "ended on request",
}
"""How a thought ended; nothing where the model ended it."""

_BAR_CELLS = 60
# Who has the context, and the block that stands for it.
_CONTEXT_PARTS = (("system", "█"), ("files", "▓"), ("history", "▒"), ("prompt", "░"))
_FREE = "·"

# What the keys of terminal/repl do; docs/chat.md says more.
KEYS = (
    ("Ctrl-T", "while it thinks: fold, unfold; else open the last thought"),
    ("Ctrl-G", "answer now: end the thinking"),
    ("Ctrl-S", "steer: put a sentence of yours into the thinking"),
    ("Ctrl-C", "stop, or clear the line; on an empty one twice: leave"),
    ("Ctrl-D", "leave, on an empty line"),
    ("Enter", "send; while it works your line waits its turn"),
    ("Alt-Enter, Ctrl-J", "a new line"),
    ('"""', "begin and end a text of many lines"),
    ("Up", "take back the line that waits; else earlier lines"),
    ("Ctrl-R", "search earlier lines"),
    ("Ctrl-X Ctrl-E", "write the line in your editor"),
    ("Tab", "complete a command, file, key or name"),
    ("Right, Ctrl-E", "take what is suggested behind the cursor"),
    ("Ctrl-L, Ctrl-Z", "draw anew; to the shell, fg comes back"),
)


def lines_of(event: Shown) -> list[str]:
    """The lines of an event, sanitized."""
    match event:
        case Said(lines):
            return [sanitize(line[:_LINE_LIMIT]) for line in lines]
        case TextTable():
            return list(aligned_lines(event.rows, event.right))
        case KeyHelp():
            return list(aligned_lines(KEYS))
        case CommandHelp(usage, lines):
            return [usage, *(f"  {line}" for line in lines)]
        case ContextUse():
            return list(_context_lines(event))
        case NextPlan(planned):
            lines = (planned.line, *choice_lines(planned), ledger_line(planned.ledger, planned.n_ctx))
            return list(map(sanitize, lines))


def thought_line(name: str, elapsed_s: float, tokens: int, end: str = "") -> str:
    """A folded thought on one line: `thought 3 · 1m12s · 2,431 tok · ended in a loop`."""
    return " · ".join(filter(None, (name, duration(elapsed_s), f"{tokens:,} tok", end)))


def bar_cells(sizes: Sequence[int], whole: int, cells: int) -> list[int]:
    """The cells of each part in a bar of `cells` for the whole."""
    counts: list[int] = []
    for index in range(len(sizes)):
        # Each part ends where the sum so far ends, so that rounding never makes the bar too long.
        counts.append(round(cells * sum(sizes[: index + 1]) / max(whole, 1)) - sum(counts))
    return counts


def choice_lines(planned: Planned) -> Iterator[str]:
    """The plan, a line for each choice."""
    yield from aligned_lines(list(choice_rows(planned)))


def _context_lines(use: ContextUse) -> Iterator[str]:
    counts = {part: getattr(use.ledger, part) for part, _ in _CONTEXT_PARTS}
    cells = bar_cells(list(counts.values()), use.n_ctx, _BAR_CELLS)
    bar = "".join(glyph * n for (_, glyph), n in zip(_CONTEXT_PARTS, cells, strict=True))
    yield f"{bar:{_FREE}<{_BAR_CELLS}}"[:_BAR_CELLS]
    free = max(0, use.n_ctx - use.prompt_tokens)
    rows = [(f"{glyph} {part}", f"{counts[part]:,}") for part, glyph in _CONTEXT_PARTS]
    *parts, last = aligned_lines([*rows, (f"{_FREE} free", f"{free:,}")], right=(1,))
    yield from parts
    yield f"{last} of {use.n_ctx:,} tokens"
    if dropped := use.ledger.thinking_dropped:
        yield f"{dropped:,} tokens of earlier thinking are spared: they are not sent again."
