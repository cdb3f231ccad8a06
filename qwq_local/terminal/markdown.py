"""Markdown drawn while it streams: pieces of text in, rows out.

Rows that no later text can change are written once. The rest, at most six rows, is redrawn up to twenty
times a second. The cost is linear in the length of the text: finished blocks are forgotten, and the open
part is bounded.
"""

from __future__ import annotations

from qwq_local.terminal.layout import Row
from qwq_local.terminal.live_region import Cursor, Region
from qwq_local.terminal.markdown_blocks import PARAGRAPH_LIMIT, BlockKind, BlockReader, MarkdownBlock
from qwq_local.terminal.markdown_renderer import BlockRenderer
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.sanitizer import Sanitizer

LIVE_ROWS = 6
FRAME_S = 0.05
WORD = 20
"""A line is cut at a space within this many characters; rows further up are written already."""

IDLE_SHARE = 5
"""The next frame waits at least this many times as long as the last one took."""


class LineCutter:
    """Turns pieces into lines. A line that is too long comes in parts, always cut at the same places."""

    def __init__(self) -> None:
        self.partial = ""
        self.continues = False

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """The lines that are complete now, each with whether it continues the line before."""
        *ended, self.partial = (self.partial + text).split("\n")
        lines: list[tuple[str, bool]] = []
        for line in ended:
            lines.append((self._cut(line, lines), self.continues))
            self.continues = False
        self.partial = self._cut(self.partial, lines)
        return lines

    def _cut(self, line: str, lines: list[tuple[str, bool]]) -> str:
        """Cut parts off a line until the rest is short. Returns the rest."""
        start = 0
        while len(line) - start > PARAGRAPH_LIMIT:
            space = line.rfind(" ", start + PARAGRAPH_LIMIT - WORD, start + PARAGRAPH_LIMIT)
            end = space + 1 if space >= 0 else start + PARAGRAPH_LIMIT
            lines.append((line[start:end], self.continues))
            self.continues = True
            start = end
        return line[start:]


class MarkdownRows:
    """One answer as rows: feed its pieces, take final and live rows, close it at the end."""

    def __init__(self, has_color: bool = True) -> None:
        self._sanitizer = Sanitizer()
        self._cutter = LineCutter()
        self._reader = BlockReader()
        self._renderer = BlockRenderer(has_color)
        self._finished: list[MarkdownBlock] = []
        self._offset = 0  # characters of the open paragraph whose rows were taken

    def feed(self, text: str) -> None:
        """Take the next piece."""
        for line, continues in self._cutter.feed(self._sanitizer.feed(text)):
            self._finished += self._reader.feed(line, continues)

    def take(self, columns: int, limit: int) -> tuple[list[Row], list[Row]]:
        """The rows that became final since the last call, and the last `limit` rows that may still change.

        Joined, the final rows do not depend on when they are taken, as long as the width stays; only the
        colors of code may, which are those of the lines that were there. Final rows of code may be wider.
        """
        final = self._take_finished(columns)
        open_blocks = self._reader.peek(self._cutter.partial)
        if len(open_blocks) == 1 and open_blocks[0].kind is BlockKind.PARAGRAPH:
            settled, live = self._split_paragraph(open_blocks[0], columns, limit)
            final += settled
        else:
            live = self._renderer.preview(open_blocks, columns, self._offset)
        return final, live[-limit:]

    def close(self, columns: int) -> list[Row]:
        """The remaining rows, when no more text comes."""
        for line, continues in self._cutter.feed("\n" if self._cutter.partial else ""):
            self._finished += self._reader.feed(line, continues)
        self._finished += self._reader.close()
        return self._take_finished(columns)

    def _take_finished(self, columns: int) -> list[Row]:
        blocks, self._finished = self._finished, []
        if not blocks:
            return []
        offset, self._offset = self._offset, 0
        return self._renderer.render(blocks, columns, offset)

    def _split_paragraph(self, block: MarkdownBlock, columns: int, limit: int) -> tuple[list[Row], list[Row]]:
        """The rows of the open paragraph that no later text can change, and those that are still live."""
        shown = self._renderer.paragraph(block, columns, self._offset)
        gap = [Row("", 0)] if block.gap and not self._offset else []
        settled = min(shown.settled, _before_table_head(block, shown.spans[-1][1] if shown.spans else 0))
        n_final = 0
        # The row below must be settled too: when a mark in it disappears, a word may move up.
        while n_final < len(shown.rows) - limit and shown.spans[n_final + 1][1] <= settled:
            n_final += 1
        if not n_final:
            return [], gap + shown.rows
        self._offset = shown.spans[n_final][0]
        return gap + shown.rows[:n_final], shown.rows[n_final:]


class MarkdownWriter:
    """Shows one answer. Feed its pieces, suspend it before anything else is written, close it at the end."""

    def __init__(self, output: Output, clock: Clock) -> None:
        self._output = output
        self._clock = clock
        self._rows = MarkdownRows(output.has_color)
        self._region = Region(output)
        self._next_frame = clock()

    def feed(self, text: str) -> None:
        """Take the next piece; draws a frame when one is due."""
        self._rows.feed(text)
        if self._clock() >= self._next_frame:
            self._draw()

    def suspend(self) -> None:
        """Erase the live rows, so that another line can be written. The next piece draws them again."""
        self._output.write(self._region.erase())
        self._next_frame = self._clock()

    def close(self) -> None:
        """Write the remaining rows. The cursor ends at the start of a line."""
        self._write(self._rows.close(self._output.size()[0]), [])

    def _draw(self) -> None:
        started = self._clock()
        columns, window_rows = self._output.size()
        self._write(*self._rows.take(columns, live_limit(window_rows)))
        ended = self._clock()
        self._next_frame = started + max(FRAME_S, IDLE_SHARE * (ended - started))

    def _write(self, final: list[Row], live: list[Row]) -> None:
        """Write final rows above the live ones. The cursor ends behind the last live row."""
        if live:
            text = self._region.frame(final, live, Cursor(live[-1].cells, len(live) - 1))
        else:
            text = self._region.erase() + "".join(f"{row.written}\n" for row in final)
        self._output.write(text)


def live_limit(window_rows: int) -> int:
    """The largest number of live rows of an answer in a window of this height."""
    return max(1, min(LIVE_ROWS, window_rows // 3))


def _before_table_head(block: MarkdownBlock, end: int) -> int:
    """Where the last two source lines begin if one may be a table's head: the next line decides."""
    last_lines = block.text.split("\n")[-2:]
    if not any("|" in line for line in last_lines):
        return end
    return end - sum(len(line) + 1 for line in last_lines)


def markdown_rows(text: str, columns: int, has_color: bool = True) -> list[Row]:
    """The rows of a whole text: exactly those that it has when it has been streamed."""
    rows = MarkdownRows(has_color)
    rows.feed(text)
    return rows.close(columns)
