"""Markdown inside a paragraph, a heading or a table cell, as styled text.

Mathematics stays as the model wrote it: `\\boxed{3}`, `$x^2$`, `\\(a_1\\)`, `2*3*4`. Links show their
address, and HTML is shown as text. The result says up to which offset later text cannot change it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich.style import Style
from rich.text import Text

from qwq_local.terminal.sanitizer import drop_special

CODE_STYLE = Style(color="cyan")
MATH_STYLE = Style(color="magenta")
LINK_STYLE = Style(underline=True)
ADDRESS_STYLE = Style(dim=True)
_SPAN_STYLES = {
    "strong": Style(bold=True),
    "em": Style(italic=True),
    "s": Style(strike=True),
    "link": LINK_STYLE,
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
    if not _PARSER:
        _PARSER.append(_make_parser())
    walk = _Walk(base)
    for token in _PARSER[0].parseInline(source)[0].children or ():
        walk.take(token)
    return Inline(walk.text, min(walk.settled, walk.provisional_from()))


_PARSER: list[MarkdownIt] = []  # made on first use: it takes longer than a short answer


def _make_parser() -> MarkdownIt:
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
            style = _SPAN_STYLES.get(token.type.removesuffix("_open"), Style())
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
            self._append(f" ({span.address})", ADDRESS_STYLE)
        self.last_span = (span.start, len(self.text))

    def _note_openers(self, content: str) -> None:
        if self.settled < 1 << 60:
            return
        for opener in _MAY_OPEN.finditer(content):
            if opener.group() == "$" and len(content) - opener.start() > DOLLAR_LIMIT + 2:
                continue
            self.settled = len(self.text) + opener.start()
            return
