"""Lines of code in, the same lines with colors out; cost linear in the code, whatever comes at once.

A line is colored together with the lines above it, which are forgotten from time to time at a place where a
new statement begins: colors of a string that spans such a place may be wrong, its text never is.
"""

from __future__ import annotations

from rich.style import Style
from rich.syntax import ANSI_DARK, ANSISyntaxTheme, Syntax
from rich.text import Text

CONTEXT_LINES = 10
"""Lines after which the context ends before the next unindented line that follows a blank one."""

CONTEXT_LIMIT = 60
"""Lines after which it ends anywhere."""


# Yellow and the bright colors vanish on white, blue on black: what has them gets what both can show.
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
