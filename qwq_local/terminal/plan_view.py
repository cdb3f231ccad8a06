"""A plan as lines of text: the table of context against KV type, a bar for each device, and the choice.

Lines are colored where the output has color. Color never carries meaning by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwq_local.events import DeviceBytes, Planned
from qwq_local.planning.alternatives import FitLevel, TableCell, TableRow
from qwq_local.planning.summary import ledger_line
from qwq_local.terminal.chat_lines import bar_cells, choice_lines
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import cell_width, one_line
from qwq_local.text import binary_size

_PLAIN = "\x1b[0m"
_COLORS = {FitLevel.FITS: "\x1b[32m", FitLevel.PARTLY: "\x1b[33m", FitLevel.NOT: "\x1b[31m"}
# What fills a device: name, glyph, color. The glyph is enough where there is no color.
_PARTS = (("weights", "█", "\x1b[34m"), ("KV", "▓", "\x1b[36m"), ("compute", "▒", "\x1b[35m"))
_FREE = "·"
_MAX_BAR_CELLS = 60
_CELL_GAP = "  "


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
    yield _CELL_GAP.join(header).rstrip()
    for row, cells in zip(rows, texts, strict=True):
        shown = [f"{row.n_ctx:>{first},}"]
        for cell, text, width in zip(row.cells, cells, widths, strict=True):
            shown.append(_colored(f"{text:<{width}}", _COLORS[cell.fit], has_color))
        yarn = f"YaRN {row.yarn_factor:g}" if row.yarn_factor > 1 else ""
        yield _CELL_GAP.join([*shown, yarn]).rstrip()
    if any(cell.fit is FitLevel.PARTLY for row in rows for cell in row.cells):
        yield f"{' ' * first}{_CELL_GAP}N/{n_offloadable}: so many layers on the GPU, the rest on the CPU"


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
        cells = min(_MAX_BAR_CELLS, columns - name_width - len(figures) - 5)
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
