"""A conversation as Markdown: questions quoted, thinking folded in <details>, answers as they came.

No text can break what follows it: HTML in it is shown, and a code block that it leaves open is closed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

from markdown_it import MarkdownIt

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

_CODE = ("fence", "code_block")
_AFTER = "after"
# What is between backticks and what a backslash stands before is no tag: CommonMark 0.31, 2.4 and 6.1.
_SPAN = re.compile(
    r"\\.|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|`+|(?P<tag><(?=/?[A-Za-z][A-Za-z0-9-]*(?:[\s/>]|$)|[!?]))",
    re.DOTALL,
)
_TAG = re.compile(r"(?P<tag><(?=[A-Za-z/!?]))")
# A tag that a line begins with ends even a code span.
_FIRST = re.compile(r"^([\s>*+0-9.)-]*)<(?=[A-Za-z/!?])", re.MULTILINE)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def to_markdown(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """The conversation as a Markdown document."""
    paragraphs = [f"# {_plain(title_of(conversation))}", _facts(conversation, turns)]
    if conversation.system.strip():
        paragraphs += _folded("System prompt", [_body(conversation.system)])
    for turn in turns:
        paragraphs += turn_paragraphs(turn)
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def turn_paragraphs(turn: TurnRecord) -> list[str]:
    """A turn as paragraphs of Markdown."""
    paragraphs = [f"## {turn.number}", _quoted(turn.question)]
    if turn.files:
        paragraphs.append("Files: " + ", ".join(map(_plain, turn.files)))
    for part in turn.parts:
        paragraphs += _part_paragraphs(part, turn)
    if state := state_line(turn):
        paragraphs.append(f"*({state})*")
    return paragraphs


def _facts(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    facts = (model_of(conversation, turns), conversation.profile, minute_of(conversation.created_at))
    return " · ".join(_plain(fact) for fact in facts if fact)


def _part_paragraphs(part: TurnPart, turn: TurnRecord) -> list[str]:
    match part:
        case ThinkingPart():
            return _folded(thought_line(turn), _thought(part)) if part.text.strip() else []
        case AnswerPart():
            return [_body(part.text)]
        case ToolCallPart() | ToolResultPart():
            summary, content = tool_texts(part)
            return _folded(_plain(summary), [_body(content)])


def _thought(part: ThinkingPart) -> Iterator[str]:
    for text, is_steered in steered_parts(part.text, part.steered):
        yield _quoted(f"**You:** {_body(text)}") if is_steered else _body(text)


def _folded(summary: str, paragraphs: Sequence[str] | Iterator[str]) -> list[str]:
    return [f"<details>\n<summary>{summary}</summary>", *paragraphs, "</details>"]


def _quoted(text: str) -> str:
    """As a quotation, which ends whatever is open in it."""
    return "\n".join(f"> {line}".rstrip() for line in _body(text).split("\n"))


def _body(text: str) -> str:
    """Text that may be Markdown itself: its tags are shown, and what follows it is not part of it."""
    lines = re.split(r"\r\n|\r|\n", text.strip("\r\n"))
    body = "\n".join(_with_tags_shown(lines))
    if _has_html(body):
        # Which backticks belong together only the blocks around them decide: show tags between them too.
        body = "\n".join(_with_tags_shown(lines, _TAG))
    if _is_closed(body):
        return body
    fence = _parser().parse(body)[-1].markup
    closed = f"{body}\n{fence}"
    return closed if fence and _is_closed(closed) else "\n".join(f"> {line}" for line in body.split("\n"))


def _with_tags_shown(lines: Sequence[str], tag: re.Pattern[str] = _SPAN) -> Iterator[str]:
    """The lines, tags outside of code escaped: what is found as `tag` in the pattern."""
    code: dict[int, str] = {}
    for token in _parser().parse("\n".join(lines)):
        if token.type in _CODE and token.map:
            code |= dict.fromkeys(range(*token.map), token.type)
    for kind, numbers in groupby(
        range(len(lines)), lambda n: code.get(n, "" if lines[n].strip() else "blank")
    ):
        part = "\n".join(lines[number] for number in numbers)
        # Behind the mark of a quotation a tab is narrower, and what it sets in is no code any more.
        part = part.expandtabs(4) if kind == "code_block" else part
        yield part if kind else _FIRST.sub(r"\1&lt;", tag.sub(_escaped, part))


def _escaped(found: re.Match[str]) -> str:
    return "&lt;" if found["tag"] else found.group()


def _has_html(body: str) -> bool:
    """Whether a reader that lets HTML through would find any, as part of a document or of a quotation."""
    quoted = "\n".join(f"> {line}" for line in body.split("\n"))
    return any(
        token.type.startswith("html") or any(child.type == "html_inline" for child in token.children or ())
        for text in (body, quoted)
        for token in _parser(lets_html_through=True).parse(text)
    )


def _is_closed(body: str) -> bool:
    """Whether a paragraph after this text is one of its own."""
    last = _parser().parse(f"{body}\n\n{_AFTER}")[-3:]
    return [token.level for token in last] == [0, 1, 0] and last[1].content == _AFTER


@cache
def _parser(*, lets_html_through: bool = False) -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": lets_html_through})


def _plain(text: str) -> str:
    """Text of one line in which nothing is Markdown."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
