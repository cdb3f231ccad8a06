"""How conversations and turns are named and dated wherever they are shown, always on one line.

What reaches a terminal is sanitised again where it is printed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import datetime

from qwq_local.history.records import ConversationRecord, ToolCallPart, ToolResultPart, TurnRecord, TurnState
from qwq_local.text import duration

NOT_STANDING = "undone or answered anew"
"""Says of a turn that it is no longer on the path of its conversation."""

NAME_CELLS = 100
QUESTION_CHARS = 200
_STATES = {
    TurnState.RUNNING: "still being answered",
    TurnState.STOPPED: "stopped before its end",
    TurnState.LOST: "lost before its end: the program died",
}
# ECMA-48 control sequences and strings: without their first character the rest would be left as text.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*"
)


def squeezed(text: str, max_chars: int) -> str:
    """The text on one line, printable, with at most `max_chars` characters; a cut is shown as …"""
    # The start of a long text is enough for a line.
    shown = _SEQUENCE.sub("", text[: 4 * max_chars + 1])
    line = " ".join("".join(each if each.isprintable() else " " for each in shown).split())
    if len(line) <= max_chars and len(text) <= 4 * max_chars:
        return line
    return line[: max_chars - 1].rstrip() + "…"


def clean_name(text: str) -> str:
    """The text as a name: one printable line of at most NAME_CELLS terminal cells."""
    line = squeezed(text, 2 * NAME_CELLS)
    cells = 0
    for end, character in enumerate(line):
        is_wide = unicodedata.east_asian_width(character) in "WF"
        cells += 2 if is_wide else unicodedata.category(character) not in ("Mn", "Me", "Cf")
        if cells > NAME_CELLS:
            return line[:end].rstrip()
    return line


def title_of(conversation: ConversationRecord) -> str:
    """The name of a conversation, or its first question."""
    return conversation.name or conversation.first_question or "(empty)"


def minute_of(seconds: float) -> str:
    """A moment in local time, to the minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def thought_line(turn: TurnRecord) -> str:
    """The line for folded thinking: its number, its seconds and its tokens."""
    tokens = f" · {turn.stats.thinking_tokens:,} tok" if turn.stats.thinking_tokens else ""
    return f"thought {turn.number} · {duration(turn.thinking_s)}{tokens}"


def state_line(turn: TurnRecord) -> str:
    """Why a turn has no end; empty if it has one."""
    return _STATES.get(turn.state, "")


def model_of(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """The models that answered, in order."""
    models = [turn.origin.model for turn in turns if turn.origin is not None]
    return ", ".join(dict.fromkeys(models)) or conversation.model


def tool_texts(part: ToolCallPart | ToolResultPart) -> tuple[str, str]:
    """A heading and the whole text of what was called with which arguments, or of what it returned."""
    if isinstance(part, ToolCallPart):
        return f"called {part.name}", json.dumps(part.arguments, ensure_ascii=False, indent=1)
    return f"{part.name} returned", part.text


def steered_parts(thinking: str, steered: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The thinking in pieces, each with whether it is a sentence that the person put in."""
    position = 0
    for sentence in steered:
        found = thinking.find(sentence, position) if sentence else -1
        if found < 0:
            continue  # the loop guard cut it away
        if found > position:
            yield thinking[position:found], False
        yield sentence, True
        position = found + len(sentence)
    if position < len(thinking):
        yield thinking[position:], False
