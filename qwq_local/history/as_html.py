"""A conversation as one page of HTML: no script, nothing loaded from elsewhere, thoughts folded.

The answers' Markdown is rendered, with HTML in it shown as text, images as links and LaTeX as it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape

from markdown_it import MarkdownIt

from qwq_local.history.records import ConversationRecord, TurnRecord
from qwq_local.history.wording import (
    minute_of,
    model_of,
    state_line,
    steered_parts,
    thought_line,
    title_of,
)

# Not allowed in HTML, nor in a text that a person should see all of.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_STYLE = """
:root { color-scheme: light dark; --text: #1d1f21; --soft: #62676d; --line: #d5d8dc; --page: #ffffff;
  --block: #f4f5f6; --mark: #fff1b8; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e5e8; --soft: #9aa0a6; --line: #3a3f45;
  --page: #16181a; --block: #22262a; --mark: #4d4216; } }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; color: var(--soft); }
.facts, .state, summary, .files { color: var(--soft); font-size: .9rem; }
.question { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .8rem; margin: 1rem 0; }
.thinking { white-space: pre-wrap; color: var(--soft); border-left: 3px solid var(--line);
  padding-left: .8rem; margin: .5rem 0; }
mark { background: var(--mark); color: inherit; }
summary { cursor: pointer; }
pre { background: var(--block); padding: .7rem; overflow-x: auto; }
code { font: .9em/1.4 ui-monospace, monospace; }
table { border-collapse: collapse; } td, th { border: 1px solid var(--line); padding: .2rem .5rem; }
"""


def to_html(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """The conversation as a whole HTML document."""
    title = _text(title_of(conversation))
    facts = (model_of(conversation, turns), conversation.profile, minute_of(conversation.created_at))
    lines = [
        "<!DOCTYPE html>",
        '<html lang="">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        f'<p class="facts">{_text(" · ".join(filter(None, facts)))}</p>',
    ]
    if conversation.system.strip():
        lines.append(_folded("System prompt", _text(conversation.system)))
    for turn in turns:
        lines += _turn(turn)
    return "\n".join([*lines, "</body></html>", ""])


def _turn(turn: TurnRecord) -> Iterator[str]:
    yield f"<h2>{turn.number}</h2>"
    yield f'<div class="question">{_text(turn.question)}</div>'
    if turn.files:
        yield f'<p class="files">Files: {_text(", ".join(turn.files))}</p>'
    if turn.thinking.strip():
        pieces = steered_parts(turn.thinking.strip(), turn.steered)
        yield _folded(
            thought_line(turn), "".join(_mark(text) if mine else _text(text) for text, mine in pieces)
        )
    yield f'<div class="answer">{_markdown().render(_CONTROL.sub("", turn.answer))}</div>'
    if state := state_line(turn):
        yield f'<p class="state">({_text(state)})</p>'


def _folded(summary: str, content: str) -> str:
    return f'<details><summary>{_text(summary)}</summary><div class="thinking">{content}</div></details>'


def _mark(sentence: str) -> str:
    return f'<mark title="yours">{_text(sentence)}</mark>'


def _text(text: str) -> str:
    return escape(_CONTROL.sub("", text))


@cache
def _markdown() -> MarkdownIt:
    """CommonMark with tables. Images would be loaded; a backslash is more often LaTeX's than Markdown's."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "escape"])
