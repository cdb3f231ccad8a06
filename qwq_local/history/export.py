"""A conversation as Markdown, JSON or a page of HTML, and how such a text becomes a file.

The JSON has everything but the token ids. In Markdown and HTML the thinking is folded. No text can break what
follows it: HTML in it is shown as text, and an open code block is closed. The page has no script and loads
nothing; in its answers Markdown is rendered, images are links, and LaTeX stays as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path

from markdown_it import MarkdownIt

from qwq_local.errors import HistoryError, UsageError
from qwq_local.files import atomic_file
from qwq_local.history.labels import (
    minute_of,
    model_of,
    state_line,
    steered_parts,
    thought_line,
    title_of,
    tool_texts,
)
from qwq_local.history.records import (
    AnswerPart,
    ConversationRecord,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    TurnPart,
    TurnRecord,
)
from qwq_local.history.rows import kind_of, part_fields, storable

_CODE = ("fence", "code_block")
_AFTER = "after"
# Nothing between backticks or after a backslash is a tag: CommonMark 0.31, 2.4 and 6.1.
_SPAN = re.compile(
    r"\\.|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|`+|(?P<tag><(?=/?[A-Za-z][A-Za-z0-9-]*(?:[\s/>]|$)|[!?]))",
    re.DOTALL,
)
_TAG = re.compile(r"(?P<tag><(?=[A-Za-z/!?]))")
# A tag at the beginning of a line ends even a code span.
_FIRST = re.compile(r"^([\s>*+0-9.)-]*)<(?=[A-Za-z/!?])", re.MULTILINE)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")
# Not allowed in HTML, and invisible to a reader.
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


class Format(StrEnum):
    """What a conversation can be written as, by the ending of a file's name."""

    MARKDOWN = "md"
    JSON = "json"
    HTML = "html"


def format_of(name: str) -> Format:
    """The format by the ending of a file's name. Raises UsageError."""
    ending = Path(name).suffix.lower().removeprefix(".")
    try:
        return Format({"markdown": "md", "htm": "html"}.get(ending, ending))
    except ValueError:
        raise UsageError(
            f"{name[:200]!r}: end the name in .md, .json or .html, to say what to write."
        ) from None


def exported(kind: Format, conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """The conversation with these turns in a format."""
    write = {Format.MARKDOWN: _to_markdown, Format.JSON: to_json, Format.HTML: _to_html}[kind]
    return write(conversation, turns)


def to_json(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """A JSON object: `format`, `version`, the conversation's fields, and `turns` with theirs.

    Times are ISO 8601 in UTC. Of the token ids only the counts are there.
    """
    content = {
        "format": "qwq-conversation",
        "version": 1,
        **asdict(conversation),
        "created_at": _moment(conversation.created_at),
        "changed_at": _moment(conversation.changed_at),
        "turns": [_turn_object(turn) for turn in turns],
    }
    return storable(json.dumps(content, ensure_ascii=False, indent=1)) + "\n"


def save_text(path: Path, text: str, *, replaces: bool = False, advice: str = "Choose another name.") -> None:
    """Write a file, whole or not at all.

    Raises HistoryError, with the advice, if it is there and must not be replaced.
    """
    try:
        with atomic_file(path, overwrite=replaces) as file:
            file.write(text.encode())
    except FileExistsError:
        raise HistoryError(f"{path} is there already; nothing was written. {advice}") from None
    except OSError as error:
        raise HistoryError(f"{path} cannot be written: {error.strerror or error}.") from error


def _turn_object(turn: TurnRecord) -> dict[str, object]:
    values = asdict(replace(turn, parts=()))
    del values["prompt"]
    return {
        **values,
        "thinking": turn.thinking,
        "answer": turn.answer,
        "steered": turn.steered,
        "parts": [_part_object(part) for part in turn.parts],
        "created_at": _moment(turn.created_at),
        "n_generated": len(turn.generated),
    }


def _part_object(part: TurnPart) -> dict[str, object]:
    return {"kind": kind_of(part), **part_fields(part), "n_tokens": len(part.tokens.ids)}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


# Markdown


def _to_markdown(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    facts = " · ".join(map(_plain, _facts(conversation, turns)))
    paragraphs = [f"# {_plain(title_of(conversation))}", facts]
    if conversation.system.strip():
        paragraphs += _folded("System prompt", [_body(conversation.system)])
    for turn in turns:
        paragraphs += _turn_paragraphs(turn)
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _turn_paragraphs(turn: TurnRecord) -> list[str]:
    paragraphs = [f"## {turn.number}", _quoted(turn.question)]
    if turn.files:
        paragraphs.append("Files: " + ", ".join(map(_plain, turn.files)))
    for part in turn.parts:
        paragraphs += _part_paragraphs(part, turn)
    if state := state_line(turn):
        paragraphs.append(f"*({state})*")
    return paragraphs


def _facts(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> Iterator[str]:
    model, day = model_of(conversation, turns), minute_of(conversation.created_at)
    return filter(None, (model, conversation.profile, day))


def _part_paragraphs(part: TurnPart, turn: TurnRecord) -> list[str]:
    match part:
        case ThinkingPart():
            pieces = steered_parts(part.text, part.steered)
            thought = [_quoted(f"**You:** {_body(text)}") if yours else _body(text) for text, yours in pieces]
            return _folded(thought_line(turn), thought) if part.text.strip() else []
        case AnswerPart():
            return [_body(part.text)]
        case ToolCallPart() | ToolResultPart():
            summary, content = tool_texts(part)
            is_json = isinstance(part, ToolCallPart)
            return _folded(_plain(summary), [f"```json\n{content}\n```" if is_json else _body(content)])


def _folded(summary: str, paragraphs: Sequence[str]) -> list[str]:
    return [f"<details>\n<summary>{summary}</summary>", *paragraphs, "</details>"]


def _quoted(text: str) -> str:
    """The text as a quotation, whose end closes what is open in it."""
    return "\n".join(f"> {line}".rstrip() for line in _body(text).split("\n"))


def _body(text: str) -> str:
    """A text that may be Markdown: its tags are shown, and it ends where it ends."""
    lines = re.split(r"\r\n|\r|\n", text.strip("\r\n"))
    body = "\n".join(_with_tags_shown(lines))
    if _has_html(body):
        # Only the blocks around backticks decide which of them belong together: show tags between them too.
        body = "\n".join(_with_tags_shown(lines, _TAG))
    if _is_closed(body):
        return body
    fence = _parser().parse(body)[-1].markup
    closed = f"{body}\n{fence}"
    return closed if fence and _is_closed(closed) else "\n".join(f"> {line}" for line in body.split("\n"))


def _with_tags_shown(lines: Sequence[str], tag: re.Pattern[str] = _SPAN) -> Iterator[str]:
    """The lines with tags outside of code escaped: those that the pattern finds as `tag`."""
    code: dict[int, str] = {}
    for token in _parser().parse("\n".join(lines)):
        if token.type in _CODE and token.map:
            code |= dict.fromkeys(range(*token.map), token.type)
    for kind, numbers in groupby(
        range(len(lines)), lambda n: code.get(n, "" if lines[n].strip() else "blank")
    ):
        part = "\n".join(lines[number] for number in numbers)
        # After the mark of a quotation a tab is narrower, and would no longer indent code.
        part = part.expandtabs(4) if kind == "code_block" else part
        yield (
            part
            if kind
            else _FIRST.sub(r"\1&lt;", tag.sub(lambda found: "&lt;" if found["tag"] else found.group(), part))
        )


def _has_html(body: str) -> bool:
    """Whether a reader that lets HTML through finds any, in a document or in a quotation."""
    quoted = "\n".join(f"> {line}" for line in body.split("\n"))
    return any(
        token.type.startswith("html") or any(child.type == "html_inline" for child in token.children or ())
        for text in (body, quoted)
        for token in _parser(lets_html_through=True).parse(text)
    )


def _is_closed(body: str) -> bool:
    """Whether a paragraph after this text stands for itself."""
    last = _parser().parse(f"{body}\n\n{_AFTER}")[-3:]
    return [token.level for token in last] == [0, 1, 0] and last[1].content == _AFTER


@cache
def _parser(*, lets_html_through: bool = False) -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": lets_html_through})


def _plain(text: str) -> str:
    """The text on one line without any Markdown."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


# HTML


def _to_html(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    title = _text(title_of(conversation))
    lines = [
        "<!DOCTYPE html>",
        '<html lang="">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{title}</h1>",
        f'<p class="facts">{_text(" · ".join(_facts(conversation, turns)))}</p>',
    ]
    if conversation.system.strip():
        lines.append(_details("System prompt", _text(conversation.system)))
    for turn in turns:
        lines += _turn_html(turn)
    return "\n".join([*lines, "</body></html>", ""])


def _turn_html(turn: TurnRecord) -> Iterator[str]:
    yield f"<h2>{turn.number}</h2>"
    yield f'<div class="question">{_text(turn.question)}</div>'
    if turn.files:
        yield f'<p class="files">Files: {_text(", ".join(turn.files))}</p>'
    for part in turn.parts:
        yield _part_html(part, turn)
    if state := state_line(turn):
        yield f'<p class="state">({_text(state)})</p>'


def _part_html(part: TurnPart, turn: TurnRecord) -> str:
    match part:
        case ThinkingPart():
            pieces = steered_parts(part.text.strip(), part.steered)
            content = "".join(
                f'<mark title="yours">{_text(text)}</mark>' if yours else _text(text)
                for text, yours in pieces
            )
            return _details(thought_line(turn), content) if content else ""
        case AnswerPart():
            return f'<div class="answer">{_markdown().render(_CONTROL.sub("", part.text))}</div>'
        case ToolCallPart() | ToolResultPart():
            summary, content = tool_texts(part)
            return _details(summary, _text(content))


def _details(summary: str, content: str) -> str:
    return f'<details><summary>{_text(summary)}</summary><div class="thinking">{content}</div></details>'


def _text(text: str) -> str:
    return escape(_CONTROL.sub("", text))


@cache
def _markdown() -> MarkdownIt:
    """CommonMark with tables. Images would be loaded; a backslash is more often LaTeX's than Markdown's."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable(["image", "escape"])
