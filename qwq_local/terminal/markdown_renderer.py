"""Blocks of Markdown drawn as rows, with code in color.

The rows of a block depend on the block, the width, and what is kept from earlier blocks: the column
widths of the current table, and the lines above a line of code. The cost of coloring is linear in the
code: the lines above are forgotten from time to time, at a line where a new statement begins. The colors
of a string that spans such a line may be wrong; its text never is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from rich.cells import cell_len
from rich.style import Style
from rich.syntax import ANSI_DARK, ANSISyntaxTheme, Syntax
from rich.text import Text

from qwq_local.terminal.layout import MIN_WIDTH, Row, cut, fold_spans, make_row, pad, row_spans
from qwq_local.terminal.markdown_blocks import BlockKind, MarkdownBlock, MarkdownTable
from qwq_local.terminal.markdown_inline import MATH_STYLE, Inline, render_inline
from qwq_local.terminal.sanitizer import drop_special

CONTEXT_LINES = 10
"""Lines after which the context ends before the next unindented line that follows a blank one."""

CONTEXT_LIMIT = 60
"""Lines after which it ends anywhere."""


# Yellow and the bright colors are invisible on white, blue on black: they become colors that both can show.
_LEGIBLE = {
    "yellow": Style(color="green"),
    "bright_blue": Style(bold=True),
    "bright_black": Style(),
    "bright_cyan": Style(color="cyan"),
    "bright_green": Style(color="cyan"),
    "bright_magenta": Style(color="magenta"),
    "bright_red": Style(color="red"),
}
THEME = ANSISyntaxTheme(
    {
        token: _LEGIBLE.get(style.color.name, style) if style.color else style
        for token, style in ANSI_DARK.items()
    }
)
"""The colors of code, for light and dark backgrounds."""


class CodeHighlighter:
    """Colors the lines of one code block; an unknown language or none leaves them plain."""

    def __init__(self, language: str = "") -> None:
        self._syntax = Syntax("", language, theme=THEME) if language else None
        if self._syntax and self._syntax.lexer is None:
            self._syntax = None
        self._context: list[str] = []

    def fork(self) -> CodeHighlighter:
        """A highlighter that goes on from here without changing this one."""
        fork = CodeHighlighter()
        fork._syntax, fork._context = self._syntax, list(self._context)
        return fork

    def highlight(self, lines: list[str]) -> list[Text]:
        """The next lines of the block, with exactly their characters."""
        if self._syntax is None:
            return [Text(line) for line in lines]
        code = [_without_tabs(line) for line in self._context + lines]
        colored = self._syntax.highlight("\n".join(code)).split("\n", allow_blank=True)
        start = len(self._context)
        self._remember(lines)
        return [
            _with_tabs(line, colored[start + index] if start + index < len(colored) else None)
            for index, line in enumerate(lines)
        ]

    def _remember(self, lines: list[str]) -> None:
        for line in lines:
            is_start = bool(line) and not line[0].isspace() and self._context[-1:] == [""]
            if len(self._context) >= (CONTEXT_LINES if is_start else CONTEXT_LIMIT):
                self._context = []
            self._context.append(line)


def _tabs(line: str) -> int:
    return len(line) - len(line.lstrip("\t"))


def _without_tabs(line: str) -> str:
    tabs = _tabs(line)
    return " " * tabs + line[tabs:]


def _with_tabs(line: str, colored: Text | None) -> Text:
    """The colored line with the tabs of the source; plain if the lexer changed anything else."""
    tabs = _tabs(line)
    if colored is None or colored.plain != _without_tabs(line):
        return Text(line)
    restored = Text("\t" * tabs)
    return restored.append_text(colored[tabs:])


BORDER = " │ "
MIN_COLUMN = 4
RULE_CELLS = 40
_DIM = Style(dim=True)
_HEADINGS = {"1": Style(bold=True, underline=True), "2": Style(bold=True)}
_LOWER_HEADING = Style(bold=True, italic=True)


@dataclass(frozen=True, slots=True)
class ParagraphRows:
    """The rows of a paragraph from some offset on, where each starts and ends, and how far it is settled."""

    rows: list[Row]
    spans: list[tuple[int, int]]
    settled: int


@dataclass(slots=True)
class BlockRenderer:
    """Draws blocks in their order; `preview` draws the unfinished end and remembers nothing."""

    has_color: bool = True
    _highlighter: CodeHighlighter = field(default_factory=CodeHighlighter)
    _table: MarkdownTable | None = None

    def render(self, blocks: Iterable[MarkdownBlock], columns: int, offset: int = 0) -> list[Row]:
        """The rows of finished blocks; `offset` characters of a first paragraph were drawn before."""
        rows: list[Row] = []
        for kind, group in groupby(blocks, key=lambda block: block.kind):
            if kind is BlockKind.CODE:
                rows += self._code(list(group))
                continue
            for block in group:
                rows += self._gap(block, offset) + self._rows(block, columns, offset)
                offset = 0
        return rows

    def preview(self, blocks: Iterable[MarkdownBlock], columns: int, offset: int = 0) -> list[Row]:
        """The rows of blocks that may still change, none wider than the window."""
        shadow = copy.copy(self)
        shadow._highlighter = self._highlighter.fork()
        rows: list[Row] = []
        for block in blocks:
            rows += shadow._gap(block, offset)
            if block.kind is BlockKind.CODE:
                rows += shadow._code_preview(block, columns)
            else:
                rows += shadow._rows(block, columns, offset)
            offset = 0
        return rows

    def paragraph(self, block: MarkdownBlock, columns: int, offset: int) -> ParagraphRows:
        """A paragraph's rows from a character on; that character starts a row."""
        inline = render_inline(block.text)
        return self._wrap(inline, block, columns, offset)

    @staticmethod
    def _gap(block: MarkdownBlock, offset: int) -> list[Row]:
        return [Row("", 0)] if block.gap and not offset else []

    def _rows(self, block: MarkdownBlock, columns: int, offset: int) -> list[Row]:
        match block.kind:
            case BlockKind.PARAGRAPH:
                return self.paragraph(block, columns, offset).rows
            case BlockKind.HEADING:
                inline = render_inline(block.text, _HEADINGS.get(block.info, _LOWER_HEADING))
                return self._wrap(inline, block, columns, 0).rows
            case BlockKind.MATH:
                return self._wrap(_verbatim(block.text, MATH_STYLE), block, columns, 0).rows
            case BlockKind.RULE:
                cells = max(1, min(RULE_CELLS, columns - cell_len(block.first)))
                return [self._row(block.first, Text("─" * cells))]
            case BlockKind.TABLE | BlockKind.ROW:
                return self._table_rows(block, columns)
            case _:
                if block.kind is BlockKind.FENCE_OPEN:
                    self._highlighter = CodeHighlighter(block.info)
                return self._wrap(_verbatim(block.text, _DIM), block, columns, 0).rows

    def _row(self, prefix: str, text: Text) -> Row:
        return make_row(prefix, text, self.has_color)

    def _wrap(self, inline: Inline, block: MarkdownBlock, columns: int, offset: int) -> ParagraphRows:
        width = max(MIN_WIDTH, columns - cell_len(block.rest))
        plain = inline.text.plain
        if offset and offset >= len(plain):
            return ParagraphRows([], [], inline.settled)
        spans = [(offset + start, offset + end) for start, end in row_spans(plain[offset:], width)]
        rows = [
            self._row(block.rest if offset or index else block.first, part)
            for index, part in enumerate(cut(inline.text, spans))
        ]
        return ParagraphRows(rows, spans, inline.settled)

    # Code: one row a line, however long, so that a selection in the terminal copies it unchanged.

    def _code(self, blocks: list[MarkdownBlock]) -> list[Row]:
        lines = self._highlighter.highlight([drop_special(block.text) for block in blocks])
        rows: list[Row] = []
        for block, line in zip(blocks, lines, strict=True):
            rows += [*self._gap(block, 0), self._row(block.first, line)]
        return rows

    def _code_preview(self, block: MarkdownBlock, columns: int) -> list[Row]:
        [line] = self._highlighter.highlight([drop_special(block.text)])
        line.expand_tabs(8)
        width = max(MIN_WIDTH, columns - cell_len(block.first))
        return [
            self._row("" if index else block.first, part)
            for index, part in enumerate(cut(line, fold_spans(line.plain, width)))
        ]

    # Tables: widths come from the head and the first rows, and hold for all later ones.

    def _table_rows(self, block: MarkdownBlock, columns: int) -> list[Row]:
        table = block.table
        assert table is not None
        if block.kind is BlockKind.TABLE:
            self._table = table
        widths = _column_widths(self._table or table, columns - cell_len(block.rest))
        if widths is None:
            return self._table_as_text(block, table, columns)
        rows: list[Row] = []
        if block.kind is BlockKind.TABLE:
            rows += self._table_row(block.first, table.header, table, widths, Style(bold=True))
            rows.append(self._row(block.rest, Text("─┼─".join("─" * width for width in widths))))
        for cells in table.rows:
            rows += self._table_row(block.rest, cells, table, widths, None)
        return rows

    def _table_row(
        self,
        prefix: str,
        cells: tuple[str, ...],
        table: MarkdownTable,
        widths: list[int],
        style: Style | None,
    ) -> list[Row]:
        columns = []
        for source, width in zip(cells, widths, strict=True):
            text = render_inline(source, style).text
            columns.append(cut(text, row_spans(text.plain, width)))
        rows = []
        for index in range(max(map(len, columns))):
            line = Text()
            for column, width, align in zip(columns, widths, table.aligns, strict=True):
                line.append(BORDER if line.plain else "")
                line.append_text(pad(column[index] if index < len(column) else Text(), width, align))
            line.rstrip()
            rows.append(self._row(prefix, line))
        return rows

    def _table_as_text(self, block: MarkdownBlock, table: MarkdownTable, columns: int) -> list[Row]:
        """A table that is too wide for the window: each row as a line, its cells between bars."""
        rows: list[Row] = []
        for cells in ([table.header] if block.kind is BlockKind.TABLE else []) + list(table.rows):
            rows += self._wrap(render_inline(" | ".join(cells)), block, columns, 0).rows
        return rows


def _verbatim(source: str, style: Style) -> Inline:
    text = Text()
    text.append(drop_special(source), style)
    return Inline(text, 0)


def _column_widths(table: MarkdownTable, available: int) -> list[int] | None:
    """Cells of each column: as wide as its text, the widest made narrower until all fit; None if none can."""
    widths = [
        max(1, *(cell_len(render_inline(cell).text.plain) for cell in column))
        for column in zip(table.header, *table.rows, strict=True)
    ]
    available -= len(BORDER) * (len(widths) - 1)
    if sum(min(width, MIN_COLUMN) for width in widths) > available:
        return None
    low, high = MIN_COLUMN, max(widths)
    while low < high:
        limit = (low + high + 1) // 2
        if sum(min(width, limit) for width in widths) <= available:
            low = limit
        else:
            high = limit - 1
    return [min(width, low) for width in widths]
