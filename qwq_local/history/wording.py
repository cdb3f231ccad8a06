"""What is said of conversations and turns wherever they are shown: titles, moments, the line of a thought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from qwq_local.history.records import ConversationRecord, TurnRecord, TurnState
from qwq_local.text import duration

_STATES = {
    TurnState.RUNNING: "still being answered",
    TurnState.STOPPED: "stopped before its end",
    TurnState.LOST: "lost before its end: the program died",
}


NOT_STANDING = "undone or answered anew"
"""What is said of a turn that is not on the path of its conversation any more."""


def title_of(conversation: ConversationRecord) -> str:
    """The name of a conversation, or its first question."""
    return conversation.name or conversation.first_question or "(empty)"


def minute_of(seconds: float) -> str:
    """A moment in local time, to the minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def thought_line(turn: TurnRecord) -> str:
    """What stands for a folded thought: its number, its seconds and its tokens."""
    tokens = f" · {turn.stats.thinking_tokens:,} tok" if turn.stats.thinking_tokens else ""
    return f"thought {turn.number} · {duration(turn.thinking_s)}{tokens}"


def state_line(turn: TurnRecord) -> str:
    """What a reader should know of a turn that has not come to its end; empty for one that has."""
    return _STATES.get(turn.state, "")


def model_of(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """The models that answered, in the order in which they came."""
    models = [turn.origin.model for turn in turns if turn.origin is not None]
    return ", ".join(dict.fromkeys(models)) or conversation.model


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
