"""Lines of Markdown split into blocks. Each block is complete as soon as no later line can change it.

A block is the smallest part that is drawn by itself: a paragraph, a heading, a line of code or of display
mathematics, the head of a table with its first rows, or one further row. List items and quotations become
prefixes of the blocks inside them. Blank lines of the source are kept, so a block never depends on the
next one.

This reader differs from CommonMark where CommonMark looks ahead or hides text: a line below a paragraph
never turns it into a heading, list numbers stay as written, and line breaks stay line breaks.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Literal

PARAGRAPH_LIMIT = 4000
"""A paragraph or line ends after this many characters: the open part is redrawn in every frame."""

TABLE_SAMPLE = 10
"""Rows that decide the column widths of a table; later rows are drawn one by one."""

PREFIX_LIMIT = 24
"""Cells that nested lists and quotations may take from the width."""

_FENCE = re.compile(r"(`{3,})([^`]*)$|(~{3,})(.*)$")
_HEADING = re.compile(r"(#{1,6})(?: +(.*))?$")
_CLOSING_HASHES = re.compile(r"(?:^| )#+$")
_RULE = re.compile(r"([-*_])(?: *\1){2,}\s*$")
_MARKER = re.compile(r"([-*+]|\d{1,9}[.)])(?: +(.*))?$")
_QUOTE = re.compile(r"(?: {0,3}> ?)+")
_ONE_QUOTE = re.compile(r" {0,3}> ?")
_DELIMITER_ROW = re.compile(r"\|?(?:\s*:?-+:?\s*\|)+(?:\s*:?-+:?\s*)?$|\|\s*:?-+:?\s*$")
_MATH_OPENER = re.compile(r"\\\[|\$\$|\\begin\{([^}]*)\}")
_CELL_BORDER = re.compile(r"(?<!\\)\|")


class BlockKind(Enum):
    """What a block is."""

    PARAGRAPH = auto()
    HEADING = auto()
    RULE = auto()
    FENCE_OPEN = auto()
    CODE = auto()
    FENCE_CLOSE = auto()
    MATH = auto()
    TABLE = auto()
    ROW = auto()


Align = Literal["left", "center", "right"]


@dataclass(frozen=True, slots=True)
class MarkdownTable:
    """A table's head: cells, alignments, and the rows that set its widths."""

    header: tuple[str, ...]
    aligns: tuple[Align, ...]
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class MarkdownBlock:
    """One block: its Markdown, the prefixes of its first and its other rows, whether a blank row precedes it.

    `info` is the language of a fence or the level of a heading.
    """

    kind: BlockKind
    text: str = ""
    first: str = ""
    rest: str = ""
    gap: bool = False
    info: str = ""
    table: MarkdownTable | None = None


@dataclass(frozen=True, slots=True)
class _Item:
    marker_indent: int
    content_indent: int
    cells: int


@dataclass(frozen=True, slots=True)
class _Fence:
    mark: str
    indent: int


class BlockReader:
    """Reads lines one after the other; what is still open can be looked at without closing it."""

    def __init__(self) -> None:
        self._blocks: list[MarkdownBlock] = []
        self._paragraph: list[str] = []
        self._paragraph_start = MarkdownBlock(BlockKind.PARAGRAPH)
        self._outer: list[_Item] = []  # lists around a quotation
        self._depth = 0  # of quotations
        self._inner: list[_Item] = []  # lists inside the quotation
        self._marker = ""  # of the item that has no block yet
        self._fence: _Fence | None = None
        self._math_end = ""
        self._table: MarkdownTable | None = None
        self._table_start = MarkdownBlock(BlockKind.TABLE)
        self._gap = False
        self._is_first = True

    def feed(self, line: str, continues: bool = False) -> list[MarkdownBlock]:
        """The blocks that this line finishes; `continues` when it is the rest of a line that was cut."""
        if self._fence and self._depth and not _QUOTE.match(line):
            self._fence = None  # The quotation ended, and the code with it.
        if self._fence:
            self._read_code(line, self._fence)
        elif not line.strip():
            self._close_leaf()
            self._math_end = ""
            self._gap = True
        elif self._math_end:
            self._read_math(line)
        elif continues or self._is_inside_math():
            self._add_to_paragraph(line.expandtabs(4).strip())
        else:
            self._read_containers(line.expandtabs(4).rstrip())
        return self._take_blocks()

    def peek(self, partial_line: str) -> list[MarkdownBlock]:
        """The blocks that there would be if the text ended with this unfinished line."""
        reader = copy.copy(self)
        reader._blocks, reader._paragraph = [], list(self._paragraph)
        reader._outer, reader._inner = list(self._outer), list(self._inner)
        return (reader.feed(partial_line) if partial_line else []) + reader.close()

    def close(self) -> list[MarkdownBlock]:
        """The blocks that the end of the text finishes."""
        self._leave_leaf()
        return self._take_blocks()

    def _take_blocks(self) -> list[MarkdownBlock]:
        blocks, self._blocks = self._blocks, []
        return blocks

    # Containers: lists and quotations become prefixes.

    def _read_containers(self, line: str) -> None:
        text = line.lstrip()
        indent = len(line) - len(text)
        self._leave_items(self._outer, indent)
        quote = _QUOTE.match(text)
        depth = quote.group().count(">") if quote else 0
        if depth != self._depth:
            self._leave_leaf()
            self._inner.clear()
            self._depth = depth
        if quote:
            line = text[quote.end() :]
            text = line.lstrip()
            indent = len(line) - len(text)
            self._leave_items(self._inner, indent)
            if not text:
                self._close_leaf()
                self._gap = True
                return
        self._read_leaf(text, indent)

    def _leave_items(self, items: list[_Item], indent: int) -> None:
        """Close the items that a line of this indent is outside of; two columns are enough to be inside."""
        while items and indent < items[-1].marker_indent + 2:
            self._leave_leaf()
            items.pop()
            if items is self._outer:
                self._inner.clear()

    def _open_item(self, marker: str, indent: int) -> None:
        self._leave_leaf()
        self._marker = f"{marker} " if marker[0].isdigit() else "• "
        items = self._inner if self._depth else self._outer
        items.append(_Item(indent, indent + len(marker) + 1, len(self._marker)))

    def _leave_leaf(self) -> None:
        self._close_leaf()
        if self._marker:
            self._emit(BlockKind.PARAGRAPH)

    def _start(self, kind: BlockKind, text: str = "", info: str = "") -> MarkdownBlock:
        """A block that begins here: takes the pending list marker and the pending blank row."""
        rest = " " * sum(item.cells for item in self._outer) + "▌ " * self._depth
        rest = (rest + " " * sum(item.cells for item in self._inner))[-PREFIX_LIMIT:]
        first = rest[: max(0, len(rest) - len(self._marker))] + self._marker
        block = MarkdownBlock(kind, text, first, rest, self._gap and not self._is_first, info)
        self._marker, self._gap, self._is_first = "", False, False
        return block

    def _emit(self, kind: BlockKind, text: str = "", info: str = "") -> None:
        self._blocks.append(self._start(kind, text, info))

    # Leaves: what stands inside the containers.

    def _read_leaf(self, text: str, indent: int) -> None:
        if self._table and ("|" not in text or _FENCE.match(text)):
            self._close_leaf()
        if self._table:
            self._add_row(_cells(text))
        elif fence := _FENCE.match(text):
            self._close_leaf()
            mark, info = (fence[1], fence[2]) if fence[1] else (fence[3], fence[4])
            self._emit(BlockKind.FENCE_OPEN, text, info.strip().partition(" ")[0])
            self._fence = _Fence(mark, indent)
        elif heading := _HEADING.match(text):
            self._close_leaf()
            text = _CLOSING_HASHES.sub("", heading[2] or "")
            self._emit(BlockKind.HEADING, text, str(len(heading[1])))
        elif self._opens_table(text):
            return
        elif _RULE.match(text):
            self._close_leaf()
            self._emit(BlockKind.RULE)
        elif (marker := _MARKER.match(text)) and (marker[2] or not self._paragraph):
            self._open_item(marker[1], indent)
            if marker[2]:
                content = marker[2].lstrip()
                self._read_leaf(content, indent + text.rindex(content))
        elif math_end := _unclosed_math(text):
            self._close_leaf()
            self._math_end = math_end
            self._emit(BlockKind.MATH, text)
        elif indent >= 4 and not (self._paragraph or self._outer or self._inner):
            self._emit(BlockKind.CODE, " " * (indent - 4) + text)
        else:
            self._add_to_paragraph(text)

    def _read_code(self, line: str, fence: _Fence) -> None:
        text = self._without_containers(line, fence.indent)
        mark = text.strip()
        if len(mark) >= len(fence.mark) and not mark.strip(fence.mark[0]):
            self._fence = None
            self._emit(BlockKind.FENCE_CLOSE, mark)
        else:
            self._emit(BlockKind.CODE, text)

    def _read_math(self, line: str) -> None:
        items = self._inner or self._outer
        text = self._without_containers(line.expandtabs(4), items[-1].content_indent if items else 0)
        if self._math_end in text:
            self._math_end = ""
        self._emit(BlockKind.MATH, text.rstrip())

    def _without_containers(self, line: str, indent: int) -> str:
        """The line without the marks of the open quotations and at most `indent` spaces."""
        for _ in range(self._depth):
            quote = _ONE_QUOTE.match(line)
            line = line[quote.end() :] if quote else line
        return line[min(indent, len(line) - len(line.lstrip(" "))) :]

    def _is_inside_math(self) -> bool:
        """Whether the open paragraph ends inside display mathematics, where no line opens a block."""
        text = "\n".join(self._paragraph)
        return text.rfind("\\[") > text.rfind("\\]") or text.count("$$") % 2 == 1

    def _add_to_paragraph(self, text: str) -> None:
        if self._table:
            self._close_leaf()
        if not self._paragraph:
            self._paragraph_start = self._start(BlockKind.PARAGRAPH)
        self._paragraph.append(text)
        if sum(map(len, self._paragraph)) >= PARAGRAPH_LIMIT:
            self._close_leaf()

    def _close_leaf(self) -> None:
        """Emit the open paragraph or table."""
        if self._paragraph:
            self._blocks.append(replace(self._paragraph_start, text="\n".join(self._paragraph)))
            self._paragraph = []
        if self._table:
            if self._table_start.kind is BlockKind.TABLE:
                self._blocks.append(replace(self._table_start, table=self._table))
            self._table = None

    # Tables.

    def _opens_table(self, text: str) -> bool:
        """Make the paragraph's last line the head of a table if this line is its delimiter row."""
        if not (self._paragraph and "|" in self._paragraph[-1] and _DELIMITER_ROW.match(text)):
            return False
        header, delimiters = _cells(self._paragraph[-1]), _cells(text)
        if len(header) != len(delimiters):
            return False
        start = self._paragraph_start
        self._paragraph.pop()
        if self._paragraph:
            self._close_leaf()
            start = self._start(BlockKind.PARAGRAPH)
        self._table = MarkdownTable(header, tuple(map(_align, delimiters)))
        self._table_start = replace(start, kind=BlockKind.TABLE)
        return True

    def _add_row(self, cells: tuple[str, ...]) -> None:
        table, start = self._table, self._table_start
        assert table is not None
        n_columns = len(table.header)
        cells += ("",) * (n_columns - len(cells))
        # Cells beyond the last column are kept in it: no text is hidden.
        cells = (*cells[: n_columns - 1], " | ".join(cells[n_columns - 1 :]))
        grown = replace(table, rows=(*table.rows, cells))
        if start.kind is BlockKind.ROW:
            self._blocks.append(replace(start, table=replace(table, rows=(cells,))))
        elif len(grown.rows) < TABLE_SAMPLE:
            self._table = grown
        else:
            self._blocks.append(replace(start, table=grown))
            self._table = grown
            self._table_start = MarkdownBlock(BlockKind.ROW, first=start.rest, rest=start.rest)


def _unclosed_math(text: str) -> str:
    """The closer that the line's display mathematics waits for, or an empty string."""
    opener = _MATH_OPENER.match(text)
    if not opener:
        return ""
    closers = {"\\[": "\\]", "$$": "$$"}
    closer = closers.get(opener.group(), f"\\end{{{opener[1]}}}")
    return "" if closer in text[opener.end() :] else closer


def _cells(row: str) -> tuple[str, ...]:
    inner = row.strip()
    inner = inner[1:] if inner.startswith("|") else inner
    inner = inner[:-1] if inner.endswith("|") and not inner.endswith("\\|") else inner
    return tuple(cell.strip().replace("\\|", "|") for cell in _CELL_BORDER.split(inner))


def _align(delimiter: str) -> Align:
    if delimiter.startswith(":") and delimiter.endswith(":"):
        return "center"
    return "right" if delimiter.endswith(":") else "left"
