"""What a person reads besides thoughts and answers, as lines of text: tables, the context, plans.

Plans are colored where the output has color. Color never carries meaning by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwq_local.chat.events import CommandHelp, ContextUse, KeyHelp, NextPlan, Said, Shown, TextTable
from qwq_local.events import CloseReason, DeviceBytes, Planned
from qwq_local.planning.alternatives import FitLevel, TableCell, TableRow
from qwq_local.planning.summary import choice_rows, ledger_line
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import aligned_lines, cell_width, one_line, sanitize
from qwq_local.text import binary_size, duration

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


_PLAIN = "\x1b[0m"
_COLORS = {FitLevel.FITS: "\x1b[32m", FitLevel.PARTLY: "\x1b[33m", FitLevel.NOT: "\x1b[31m"}
# What fills a device: name, glyph, color. The glyph is enough where there is no color.
_PARTS = (("weights", "█", "\x1b[34m"), ("KV", "▓", "\x1b[36m"), ("compute", "▒", "\x1b[35m"))


def table_lines(rows: Sequence[TableRow], n_offloadable: int, *, has_color: bool) -> Iterator[str]:
    """The table: a row for each context, a column for each KV type."""
    if not rows:
        return
    texts = [[_cell_text(cell, n_offloadable) for cell in row.cells] for row in rows]
    heads = [f"{cell.kv_type} KV" for cell in rows[0].cells]
    widths = [max(map(len, column)) for column in zip(heads, *texts, strict=True)]
    first = max(len("context"), *(len(f"{row.n_ctx:,}") for row in rows))
    header = [
        f"{'context':>{first}}",
        *(f"{head:<{width}}" for head, width in zip(heads, widths, strict=True)),
    ]
    yield "  ".join(header).rstrip()
    for row, cells in zip(rows, texts, strict=True):
        shown = [f"{row.n_ctx:>{first},}"]
        for cell, text, width in zip(row.cells, cells, widths, strict=True):
            shown.append(_colored(f"{text:<{width}}", _COLORS[cell.fit], has_color))
        yarn = f"YaRN {row.yarn_factor:g}" if row.yarn_factor > 1 else ""
        yield "  ".join([*shown, yarn]).rstrip()
    if any(cell.fit is FitLevel.PARTLY for row in rows for cell in row.cells):
        yield f"{' ' * first}  N/{n_offloadable}: so many layers on the GPU, the rest on the CPU"


def _cell_text(cell: TableCell, n_offloadable: int) -> str:
    size = f"{binary_size(cell.total_bytes):>9}"
    match cell.fit:
        case FitLevel.FITS:
            return f"{size} fits"
        case FitLevel.PARTLY:
            return f"{size} {cell.n_gpu_layers}/{n_offloadable}"
        case FitLevel.NOT:
            return f"{size} no"


def device_lines(devices: Sequence[DeviceBytes], columns: int, *, has_color: bool) -> Iterator[str]:
    """A bar for each device of what fills its memory, and what the glyphs stand for."""
    shown = [device for device in devices if device.weights + device.kv_cache + device.compute]
    name_width = max((cell_width(one_line(device.name, 20)) for device in shown), default=0)
    for device in shown:
        used = device.weights + device.kv_cache + device.compute
        figures = f"{binary_size(used)} of {binary_size(device.usable)}"
        cells = min(_BAR_CELLS, columns - name_width - len(figures) - 5)
        name = f"{one_line(device.name, 20):<{name_width}}"
        bar = f"[{_bar(device, cells, has_color=has_color)}] " if cells >= 10 else ""
        yield f"{name} {bar}{figures}"
    if shown:
        legend = [f"{_colored(glyph, color, has_color)} {name}" for name, glyph, color in _PARTS]
        totals = [
            sum(getattr(device, part) for device in shown) for part in ("weights", "kv_cache", "compute")
        ]
        parts = [f"{what} {binary_size(total)}" for what, total in zip(legend, totals, strict=True)]
        yield f"{' ' * name_width} {'  '.join(parts)}  {_FREE} free"


def _bar(device: DeviceBytes, cells: int, *, has_color: bool) -> str:
    whole = max(device.usable, device.weights + device.kv_cache + device.compute, 1)
    counts = bar_cells((device.weights, device.kv_cache, device.compute), whole, cells)
    bar = "".join(
        _colored(glyph * n, color, has_color and n > 0)
        for (_, glyph, color), n in zip(_PARTS, counts, strict=True)
    )
    return bar + _FREE * (cells - sum(counts))


def planned_lines(planned: Planned, output: Output) -> Iterator[str]:
    """A plan without its table: bars, choice, who has the context."""
    has_color = output.is_live and output.has_color
    yield from device_lines(planned.devices, output.size()[0], has_color=has_color)
    yield ""
    yield from choice_lines(planned)
    yield ledger_line(planned.ledger, planned.n_ctx)


def _colored(text: str, color: str, wanted: bool) -> str:
    return f"{color}{text}{_PLAIN}" if wanted else text
