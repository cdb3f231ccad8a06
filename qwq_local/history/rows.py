"""Rows of the database as records, and what a running turn has written so far put in place.

A turn's row holds what was there when it began; its pieces hold what came since, in order. Put together they
are the turn as it stands. Knows no transactions.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from qwq_local.events import CloseReason, FinishReason
from qwq_local.history.lines import QUESTION_CHARS, squeezed
from qwq_local.history.packing import (
    unpacked_mapping,
    unpacked_origin,
    unpacked_stats,
    unpacked_texts,
    unpacked_tokens,
)
from qwq_local.history.records import ConversationRecord, TurnRecord, TurnState

_Member = TypeVar("_Member", TurnState, FinishReason, CloseReason)

CONVERSATIONS = f"""
    SELECT conversations.*, coalesce(head.number, 0) AS n_turns,
           substr(first.question, 1, {8 * QUESTION_CHARS}) AS first_question
    FROM conversations
    LEFT JOIN turns AS head ON head.id = conversations.head
    LEFT JOIN turns AS first ON first.id = head.root"""

# Token ids of a long path are many and seldom wanted.
WITH_TOKENS = "turns.*"
WITHOUT_TOKENS = """id, conversation, parent, root, number, question, content, files, thinking, answer,
    steered, x'' AS prompt, x'' AS generated, state, owner, reason, closed, origin, plan, stats, thinking_s,
    created_at"""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a turn did since the last one: texts, token ids from position `start` on (None: none came).

    `thinking_tokens` and `thinking_s` are those of the thinking from the turn's beginning on.
    """

    thinking: str = ""
    answer: str = ""
    steered: tuple[str, ...] = ()
    start: int | None = None
    tokens: tuple[int, ...] = ()
    thinking_tokens: int = 0
    thinking_s: float = 0.0


def conversation_of(row: sqlite3.Row) -> ConversationRecord:
    """The conversation of a row of CONVERSATIONS."""
    return ConversationRecord(
        id=row["id"],
        name=row["name"],
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        model=row["model"],
        profile=row["profile"],
        system=row["system"],
        n_turns=row["n_turns"],
        first_question=squeezed(row["first_question"] or "", QUESTION_CHARS),
        forked_from=row["forked_from"],
    )


def turn_of(row: sqlite3.Row) -> TurnRecord:
    """The turn of a row, without its pieces."""
    return TurnRecord(
        id=row["id"],
        conversation=row["conversation"],
        parent=row["parent"],
        number=row["number"],
        question=row["question"],
        content=row["content"],
        files=unpacked_texts(row["files"]),
        thinking=row["thinking"],
        answer=row["answer"],
        steered=unpacked_texts(row["steered"]),
        prompt=unpacked_tokens(row["prompt"]),
        generated=unpacked_tokens(row["generated"]),
        state=_one_of(TurnState, row["state"]) or TurnState.LOST,
        reason=_one_of(FinishReason, row["reason"]),
        closed=_one_of(CloseReason, row["closed"]),
        origin=unpacked_origin(row["origin"]),
        plan=unpacked_mapping(row["plan"]),
        stats=unpacked_stats(row["stats"]),
        thinking_s=row["thinking_s"],
        created_at=row["created_at"],
    )


def piece_of(row: sqlite3.Row) -> Piece:
    """The piece of a row of `pieces`."""
    return Piece(
        thinking=row["thinking"],
        answer=row["answer"],
        steered=unpacked_texts(row["steered"]),
        start=row["start"],
        tokens=unpacked_tokens(row["tokens"]),
        thinking_tokens=row["thinking_tokens"],
        thinking_s=row["thinking_s"],
    )


def with_pieces(turn: TurnRecord, pieces: Iterable[Piece]) -> TurnRecord:
    """The turn as it stands after these pieces, its figures as far as they can be told from them."""
    pieces = list(pieces)
    if not pieces:
        return turn
    generated = list(turn.generated)
    for piece in pieces:
        if piece.start is not None:
            generated[piece.start :] = piece.tokens
    last = pieces[-1]
    return replace(
        turn,
        thinking=turn.thinking + "".join(piece.thinking for piece in pieces),
        answer=turn.answer + "".join(piece.answer for piece in pieces),
        steered=turn.steered + tuple(text for piece in pieces for text in piece.steered),
        generated=tuple(generated),
        thinking_s=last.thinking_s,
        stats=replace(
            turn.stats,
            prompt_tokens=len(turn.prompt) or turn.stats.prompt_tokens,
            thinking_tokens=last.thinking_tokens,
            answer_tokens=max(0, len(generated) - last.thinking_tokens),
        ),
    )


def _one_of(kind: type[_Member], value: str | None) -> _Member | None:
    try:
        return None if value is None else kind(value)
    except ValueError:
        return None
