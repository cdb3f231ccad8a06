"""A text on the alternate screen: scrolled, searched, copied."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.bindings.named_commands import get_by_name
from prompt_toolkit.layout import DynamicContainer, HSplit, Layout, Window
from prompt_toolkit.layout.controls import BufferControl, FormattedTextControl
from prompt_toolkit.layout.processors import BeforeInput
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.styles import Style

from qwq_local.chat.events import Page
from qwq_local.terminal.layout import TAB, row_spans
from qwq_local.terminal.repl.thinking_view import STEERED
from qwq_local.terminal.sanitizer import cell_width, one_line, sanitize

MAX_HITS = 10_000


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A part of a line: a row, or a hit of a search."""

    line: int
    start: int
    end: int


class PagerText:
    """The lines of a page, their rows for a width, and the hits of a search. The cost is linear in the text.

    The user's sentences are marked, each once, since a thought may repeat them.
    """

    def __init__(self, page: Page) -> None:
        self.lines: list[str] = []
        self._steered: set[int] = set()
        left = Counter(line.strip() for text in page.steered for line in sanitize(text).split("\n"))
        for index, line in enumerate(sanitize(page.text).rstrip().split("\n")):
            text = line.expandtabs(TAB).rstrip()
            key = line.strip()
            if key and left[key]:
                left[key] -= 1
                self._steered.add(index)
                text = STEERED.first + text
            self.lines.append(text)
        self.rows: list[TextSpan] = []
        self.hits: list[TextSpan] = []
        self._width = 0

    def wrap(self, width: int) -> None:
        """Break the lines for a width."""
        if width != self._width:
            self._width = width
            self.rows = [
                TextSpan(index, start, end)
                for index, line in enumerate(self.lines)
                for start, end in row_spans(line, width)
            ]

    def search(self, words: str) -> None:
        """Find the words, ignoring case."""
        pattern = re.compile(re.escape(words), re.IGNORECASE)
        self.hits = []
        for index, line in enumerate(self.lines if words else ()):
            self.hits += [TextSpan(index, match.start(), match.end()) for match in pattern.finditer(line)]
            if len(self.hits) >= MAX_HITS:
                break

    def row_of(self, hit: TextSpan) -> int:
        """The row in which a hit begins."""
        starts = (hit.line, hit.start)
        return max(0, bisect_right(self.rows, starts, key=lambda row: (row.line, row.start)) - 1)

    def fragments(self, row: int, here: TextSpan | None) -> StyleAndTextTuples:
        """One row with its hits marked; `here` is the current hit."""
        place = self.rows[row]
        line = self.lines[place.line]
        base = "class:steered" if place.line in self._steered else ""
        first = bisect_right(self.hits, place.line - 1, key=lambda hit: hit.line)
        parts: StyleAndTextTuples = []
        position = place.start
        for hit in self.hits[first:]:
            if hit.line != place.line or hit.start >= place.end:
                break
            start, end = max(hit.start, place.start), min(hit.end, place.end)
            if start < end:
                style = "class:here" if hit == here else "class:hit"
                parts += [(base, line[position:start]), (style, line[start:end])]
                position = end
        parts.append((base, line[position : place.end]))
        return parts


TITLE_CELLS = 8
"""A title is never cut shorter."""

_STYLE = Style.from_dict({"hit": "reverse", "here": "reverse bold", "steered": "bold", "status": "reverse"})


class Pager:
    """Shows one page; `run` ends when the user leaves it."""

    def __init__(
        self, page: Page, source: Input, output: Output, copy: Callable[[str], str], has_color: bool
    ) -> None:
        """`copy` copies the text and returns a line about it."""
        self._page = page
        self._output = output
        self._copy = copy
        self._lines = PagerText(page)
        self._top = 0
        self._here: TextSpan | None = None
        self._said = ""
        self._words = Buffer(multiline=False)
        self._is_searching = False
        self._app: Application[None] = Application(
            layout=self._layout(),
            key_bindings=self._keys(),
            style=_STYLE,
            full_screen=True,
            enable_page_navigation_bindings=False,
            color_depth=None if has_color else ColorDepth.DEPTH_1_BIT,
            terminal_size_polling_interval=None,
            input=source,
            output=output,
        )
        self._app.ttimeoutlen, self._app.timeoutlen = 0.1, 0.1

    async def run(self) -> None:
        """Return when the user leaves the page."""
        await self._app.run_async(handle_sigint=False, set_exception_handler=False)

    def end(self) -> None:
        """Leave, if it is still shown."""
        if self._app.is_running and not self._app.is_done:
            self._app.exit()

    def _layout(self) -> Layout:
        self._text = Window(FormattedTextControl(self._shown, focusable=True, show_cursor=False))
        status = Window(FormattedTextControl(self._status), height=1, style="class:status")
        self._search = Window(BufferControl(self._words, input_processors=[BeforeInput("/")]), height=1)
        below = DynamicContainer(lambda: self._search if self._is_searching else status)
        return Layout(HSplit([self._text, below]), focused_element=self._text)

    def _shown(self) -> StyleAndTextTuples:
        """The visible rows."""
        size = self._output.get_size()
        before = self._lines.rows[self._top] if self._top < len(self._lines.rows) else None
        n_rows = len(self._lines.rows)
        self._lines.wrap(max(1, size.columns))
        if before and len(self._lines.rows) != n_rows:
            self._top = self._lines.row_of(before)
        self._scroll(0)
        parts: StyleAndTextTuples = []
        for row in range(self._top, min(self._top + self._height, len(self._lines.rows))):
            parts += [*self._lines.fragments(row, self._here), ("", "\n")]
        return parts

    def _status(self) -> StyleAndTextTuples:
        columns = self._output.get_size().columns
        n_rows = len(self._lines.rows)
        end = min(self._top + self._height, n_rows)
        last = self._lines.rows[end - 1].line + 1 if n_rows else 0
        where = f"line {last:,}/{len(self._lines.lines):,} · {100 * end // max(1, n_rows)}%"
        leaves = f"{where} · q leaves"
        keys = f"{leaves} · / searches · c copies"
        title = one_line(self._page.title, max(TITLE_CELLS, columns - len(keys) - 3))
        forms = [text for text in (f"{title} · {keys}", keys, leaves) if cell_width(text) <= columns]
        return [("", one_line(self._said or (forms or [where])[0], columns))]

    @property
    def _height(self) -> int:
        return max(1, self._output.get_size().rows - 1)

    def _scroll(self, rows: int) -> None:
        self._top = max(0, min(self._top + rows, len(self._lines.rows) - self._height))

    def _find(self) -> None:
        """Search for the entered words and go to the first hit from here on."""
        self._lines.search(self._words.text)
        self._leave_search()
        if not self._lines.hits:
            self._here = None
            self._said = f"not found: {self._words.text}" if self._words.text else ""
            return
        top = self._lines.rows[self._top]
        after = [hit for hit in self._lines.hits if (hit.line, hit.start) >= (top.line, top.start)]
        self._go_to(after[0] if after else self._lines.hits[0])

    def _next(self, step: int) -> None:
        hits = self._lines.hits
        if hits:
            index = hits.index(self._here) if self._here in hits else 0
            self._go_to(hits[(index + step) % len(hits)])

    def _go_to(self, hit: TextSpan) -> None:
        self._here = hit
        row = self._lines.row_of(hit)
        if not self._top <= row < self._top + self._height:
            self._top = max(0, row - self._height // 3)
        number = self._lines.hits.index(hit) + 1
        self._said = f"{number:,} of {len(self._lines.hits):,} · n next · N previous · q leaves"

    def _leave_search(self) -> None:
        self._is_searching = False
        self._app.layout.focus(self._text)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        searches = Condition(lambda: self._is_searching)
        reads = ~searches

        def scrolls(names: tuple[str, ...], rows: Callable[[], int]) -> None:
            def scroll(_: KeyPressEvent) -> None:
                self._said = ""
                self._scroll(rows())

            for name in names:
                keys.add(name, filter=reads)(scroll)

        scrolls(("down", "j", "enter"), lambda: 1)
        scrolls(("up", "k"), lambda: -1)
        scrolls(("pagedown", "space", "f", "c-f"), lambda: self._height)
        scrolls(("pageup", "b", "c-b"), lambda: -self._height)
        scrolls(("d", "c-d"), lambda: self._height // 2)
        scrolls(("u", "c-u"), lambda: -(self._height // 2))
        scrolls(("g", "home"), lambda: -len(self._lines.rows))
        scrolls(("G", "end"), lambda: len(self._lines.rows))

        for name in ("q", "Q", "escape", "c-c", "c-t"):
            keys.add(name, filter=reads)(lambda _: self.end())

        @keys.add("/", filter=reads)
        def _(_: KeyPressEvent) -> None:
            self._words.reset()
            self._said = ""
            self._is_searching = True
            self._app.layout.focus(self._search)

        keys.add("n", filter=reads)(lambda _: self._next(1))
        keys.add("N", filter=reads)(lambda _: self._next(-1))
        keys.add("enter", filter=searches)(lambda _: self._find())
        for name in ("escape", "c-c", "c-g"):
            keys.add(name, filter=searches)(lambda _: self._leave_search())
        keys.add("backspace", filter=searches)(get_by_name("backward-delete-char"))

        @keys.add("c", filter=reads)
        @keys.add("y", filter=reads)
        def _(_: KeyPressEvent) -> None:
            self._said = self._copy(self._page.text)

        return keys
