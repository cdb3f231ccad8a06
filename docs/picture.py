"""The pictures of `qwq chat` in the README, from a real run of the miniature on a real pseudo-terminal.

    python docs/picture.py

Writes docs/chat-folded.svg and docs/chat-unfolded.svg from the screen of a terminal emulator.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import pyte
from pyte.screens import Char
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.command import Terminal, environment  # noqa: E402
from tests.emulator import Emulator  # noqa: E402

COLUMNS, ROWS = 84, 30
QUESTION = "How many r's are in the word strawberry?"
SEED = "1"
_DIM = re.compile(rb"(\x1b\[(?:[\d;]*;)?2(?:;[\d;]*)?m)")
# rich's own template loads its font from another server; this one uses a font of the reader's computer.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}"
height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def main() -> None:
    """Draw both."""
    for view, name in (("tail", "folded"), ("full", "unfolded")):
        path = ROOT / "docs" / f"chat-{name}.svg"
        path.write_text(picture(view))
        print(path)


def picture(view: str) -> str:
    """The screen after one question with the thinking shown as `view`, as SVG."""
    arguments = ["chat", "--model", "miniature", "--seed", SEED, "--think", view]
    with (
        tempfile.TemporaryDirectory() as cache,
        Terminal(arguments, environment(Path(cache)), COLUMNS, ROWS) as terminal,
    ):
        terminal.read_until(lambda text: "/help" in text)
        terminal.type(f"{QUESTION}\r")
        terminal.read_until(lambda text: "/help" in text.partition("▸ thought 1")[2])
        lines = drawn(bytes(terminal.raw))
        terminal.type("\x04")
        terminal.read_to_end()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(line, soft_wrap=True)
    return console.export_svg(title="qwq chat", code_format=SVG, unique_id="qwq")


def drawn(raw: bytes) -> list[Text]:
    """The styled rows of the screen after these bytes, without the empty ones at its end."""
    screen = Emulator(COLUMNS, ROWS)
    # pyte has no dim text: grey replaces it.
    pyte.ByteStream(screen).feed(_DIM.sub(lambda match: match[1] + b"\x1b[90m", raw))
    rows = [_row([screen.buffer[row][column] for column in range(COLUMNS)]) for row in range(ROWS)]
    for row in rows:
        row.rstrip()
    while rows and not rows[-1].plain:
        rows.pop()
    return rows


def _row(cells: list[Char]) -> Text:
    """Cells as text; neighbours of the same style are one span."""
    groups = groupby(cells, key=_style)
    return Text.assemble(*(("".join(cell.data for cell in group), style) for style, group in groups))


def _style(cell: Char) -> Style:
    color = {"default": None, "brightblack": "bright_black"}.get(cell.fg, cell.fg)
    if color and len(color) == 6 and not color.isalpha():
        color = f"#{color}"
    return Style(
        color=color, bold=cell.bold, italic=cell.italics, underline=cell.underscore, reverse=cell.reverse
    )


if __name__ == "__main__":
    main()
