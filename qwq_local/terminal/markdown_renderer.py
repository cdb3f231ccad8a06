"""Blocks of Markdown drawn as rows: text with its emphasis, links and mathematics, and code in color.

Mathematics stays as the model wrote it: `\\boxed{3}`, `$x^2$`, `\\(a_1\\)`, `2*3*4`. Links show their
address, and HTML is shown as text.

The rows of a block depend on the block, the width, and what is kept from earlier blocks: the column
widths of the current table, and the lines above a line of code. The cost of coloring is linear in the
code: the lines above are forgotten from time to time, at a line where a new statement begins. The colors
of a string that spans such a line may be wrong; its text never is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, zip_longest

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich.cells import cell_len
from rich.style import Style
from rich.syntax import ANSI_DARK, ANSISyntaxTheme, Syntax
from rich.text import Text

from qwq_local.terminal.layout import MIN_WIDTH, Row, cut, fold_spans, make_row, row_spans
from qwq_local.terminal.markdown_blocks import BlockKind, MarkdownBlock, MarkdownTable
from qwq_local.terminal.sanitizer import drop_special

CODE_STYLE = Style(color="cyan")
MATH_STYLE = Style(color="magenta")
_DIM = Style(dim=True)
_SPAN_STYLES = {
    "strong_open": Style(bold=True),
    "em_open": Style(italic=True),
    "s_open": Style(strike=True),
    "link_open": Style(underline=True),
}

DOLLAR_LIMIT = 400
"""Characters between two dollar signs that are still read as mathematics."""

_MATH = re.compile(
    r"\\\(.+?\\\)|\\\[.+?\\\]|\$\$.+?\$\$"
    rf"|\$(?=[^\s$])[^$\n]{{0,{DOLLAR_LIMIT}}}(?<![\s\\])\$(?!\d)",
    re.DOTALL,
)
_COMMAND = re.compile(r"\\[A-Za-z]+\*?")
_ESCAPED = frozenset("*_`#$~<>-+.")

# Characters that are text now but may open a span when more text comes.
_MAY_OPEN = re.compile(
    r"\*(?! )|(?<![^\W_])_|`|~~|\$(?=\S|$)|\[(?![^\]]*\][^(])|\\[(\[]|\\[A-Za-z]+\*?\{|\\$|&[#\w]*$"
)


@dataclass(slots=True)
class Inline:
    """Styled text; everything before the offset `settled` stays as it is when more source follows."""

    text: Text
    settled: int


def render_inline(source: str, base: Style | None = None) -> Inline:
    """The styled text of `source`, which may be cut anywhere."""
    walk = _Walk(base)
    for token in _parser().parseInline(source)[0].children or ():
        walk.take(token)
    return Inline(walk.text, min(walk.settled, walk.provisional_from()))


@cache  # made on first use: it takes longer than a short answer
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
    parser.disable(["image", "autolink", "html_inline", "escape"])
    parser.inline.ruler.before("backticks", "math", _math_rule)
    parser.inline.ruler.before("emphasis", "times", _times_rule)
    return parser


def _math_rule(state: StateInline, silent: bool) -> bool:
    """Keep mathematics and LaTeX commands verbatim, and read a backslash before Markdown's own marks."""
    source, start = state.src, state.pos
    if source[start] not in "\\$":
        return False
    span = _MATH.match(source, start, state.posMax)
    end = span.end() if span else _command_end(source, start, state.posMax)
    if end:
        if not silent:
            state.push("math", "", 0).content = source[start:end]
        state.pos = end
        return True
    if source[start] == "$":
        return False
    is_escape = source[start + 1 : start + 2] in _ESCAPED and start + 1 < state.posMax
    if not silent:
        state.append_pending(source[start + 1] if is_escape else "\\")
    state.pos = start + 1 + is_escape
    return True


def _command_end(source: str, start: int, limit: int) -> int:
    """Where a LaTeX command with its arguments in braces ends; 0 when there is none, or none that ends."""
    command = _COMMAND.match(source, start, limit)
    if not command:
        return 0
    end = command.end()
    while source[end : end + 1] == "{" and end < limit:
        depth = 0
        for position in range(end, limit):
            depth += {"{": 1, "}": -1}.get(source[position], 0)
            if depth == 0:
                end = position + 1
                break
        else:
            return 0
    return end if end > command.end() else 0


def _times_rule(state: StateInline, silent: bool) -> bool:
    """Keep a single asterisk between two letters or digits: it is a product, not emphasis."""
    around = state.src[max(0, state.pos - 1) : state.pos + 2]
    if len(around) != 3 or around[1] != "*" or not around.isascii():
        return False
    if not (around[0].isalnum() and around[2].isalnum()):
        return False
    if not silent:
        state.append_pending("*")
    state.pos += 1
    return True


@dataclass(slots=True)
class _Open:
    style: Style
    start: int
    address: str


@dataclass(slots=True)
class _Walk:
    """Appends the parser's tokens to one text."""

    base: Style | None
    text: Text = field(default_factory=Text)
    settled: int = 1 << 60
    opened: list[_Open] = field(default_factory=list)
    last_span: tuple[int, int] = (0, 0)

    def take(self, token: Token) -> None:
        """Append one token."""
        if token.type == "text":
            self._note_openers(token.content)
            self._append(token.content)
        elif token.type in ("softbreak", "hardbreak"):
            self._append("\n")
        elif token.type in ("code_inline", "math"):
            start = len(self.text)
            self._append(token.content, CODE_STYLE if token.type == "code_inline" else MATH_STYLE)
            self.last_span = (start, len(self.text))
        elif token.nesting == 1:
            style = _SPAN_STYLES.get(token.type, Style())
            self.opened.append(_Open(style, len(self.text), str(token.attrs.get("href", ""))))
        elif token.nesting == -1 and self.opened:
            self._close_span(self.opened.pop())

    def provisional_from(self) -> int:
        """Where a span starts that closes at the very end: the next character may still undo it."""
        start, end = self.last_span
        return start if end == len(self.text) else 1 << 60

    def _append(self, content: str, style: Style | None = None) -> None:
        combined = self.base or Style()
        for span in self.opened:
            combined += span.style
        combined += style or Style()
        # Without an empty style there are fewer spans to draw.
        self.text.append(drop_special(content), combined if combined else None)

    def _close_span(self, span: _Open) -> None:
        if span.address and self.text.plain[span.start :] != span.address:
            self._append(f" ({span.address})", _DIM)
        self.last_span = (span.start, len(self.text))

    def _note_openers(self, content: str) -> None:
        if self.settled < 1 << 60:
            return
        for opener in _MAY_OPEN.finditer(content):
            if opener.group() == "$" and len(content) - opener.start() > DOLLAR_LIMIT + 2:
                continue
            self.settled = len(self.text) + opener.start()
            return


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


class _CodeHighlighter:
    """Colors the lines of one code block; an unknown language or none leaves them plain."""

    def __init__(self, language: str = "") -> None:
        self._syntax = Syntax("", language, theme=THEME, tab_size=0) if language else None
        if self._syntax and self._syntax.lexer is None:
            self._syntax = None
        self._context: list[str] = []

    def highlight(self, lines: list[str]) -> list[Text]:
        """The next lines of the block, with exactly their characters."""
        if self._syntax is None:
            return [Text(line) for line in lines]
        code = self._syntax.highlight("\n".join(self._context + lines))
        colored = code.split("\n", allow_blank=True)[len(self._context) :]
        self._remember(lines)
        # A lexer may change the text: such a line stays plain.
        return [
            shown if shown and shown.plain == line else Text(line)
            for line, shown in zip_longest(lines, colored[: len(lines)])
        ]

    def _remember(self, lines: list[str]) -> None:
        context = list(self._context)  # a copy of this highlighter may hold the old one
        for line in lines:
            is_start = bool(line) and not line[0].isspace() and context[-1:] == [""]
            if len(context) >= (CONTEXT_LINES if is_start else CONTEXT_LIMIT):
                context = []
            context.append(line)
        self._context = context


BORDER = " │ "
MIN_COLUMN = 4
RULE_CELLS = 40
_HEADINGS = {"1": Style(bold=True, underline=True), "2": Style(bold=True)}
_LOWER_HEADING = Style(bold=True, italic=True)


@dataclass(frozen=True, slots=True)
class _ParagraphRows:
    """The rows of a paragraph from some offset on, where each starts and ends, and how far it is settled."""

    rows: list[Row]
    spans: list[tuple[int, int]]
    settled: int


@dataclass(slots=True)
class BlockRenderer:
    """Draws blocks in their order; `preview` draws the unfinished end and remembers nothing."""

    has_color: bool = True
    _highlighter: _CodeHighlighter = field(default_factory=_CodeHighlighter)
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
        shadow._highlighter = copy.copy(self._highlighter)
        rows: list[Row] = []
        for block in blocks:
            rows += shadow._gap(block, offset)
            if block.kind is BlockKind.CODE:
                rows += shadow._code_preview(block, columns)
            else:
                rows += shadow._rows(block, columns, offset)
            offset = 0
        return rows

    def paragraph(self, block: MarkdownBlock, columns: int, offset: int) -> _ParagraphRows:
        """A paragraph's rows from a character on; that character starts a row."""
        return self._wrap(render_inline(block.text), block, columns, offset)

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
                    self._highlighter = _CodeHighlighter(block.info)
                return self._wrap(_verbatim(block.text, _DIM), block, columns, 0).rows

    def _row(self, prefix: str, text: Text) -> Row:
        return make_row(prefix, text, self.has_color)

    def _wrap(self, inline: Inline, block: MarkdownBlock, columns: int, offset: int) -> _ParagraphRows:
        width = max(MIN_WIDTH, columns - cell_len(block.rest))
        plain = inline.text.plain
        if offset and offset >= len(plain):
            return _ParagraphRows([], [], inline.settled)
        spans = [(offset + start, offset + end) for start, end in row_spans(plain[offset:], width)]
        rows = [
            self._row(block.rest if offset or index else block.first, part)
            for index, part in enumerate(cut(inline.text, spans))
        ]
        return _ParagraphRows(rows, spans, inline.settled)

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
        rows: list[Row] = []
        if widths is None:
            # Too wide for the window: each row is a line, its cells between bars.
            for cells in ([table.header] if block.kind is BlockKind.TABLE else []) + list(table.rows):
                rows += self._wrap(render_inline(" | ".join(cells)), block, columns, 0).rows
            return rows
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
                cell = column[index] if index < len(column) else Text()
                cell.align(align, width)
                line.append_text(cell)
            line.rstrip()
            rows.append(self._row(prefix, line))
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
