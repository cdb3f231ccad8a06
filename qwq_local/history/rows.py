"""Rows of the database as records, and values as columns: token ids as bytes, mappings as JSON.

A column that does not hold what it should is read as an empty value: the text beside it is still of use.
"""

from __future__ import annotations

import json
import re
import sqlite3
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TypeVar

from qwq_local.events import CloseReason, FinishReason, TokenLogprob, TurnStats
from qwq_local.history.labels import QUESTION_CHARS, squeezed
from qwq_local.history.records import (
    AnswerPart,
    ConversationRecord,
    ThinkingPart,
    TokenRun,
    ToolCallPart,
    ToolResultPart,
    TurnOrigin,
    TurnPart,
    TurnRecord,
    TurnState,
)
from qwq_local.wire import decoded, plain

CONVERSATIONS = f"""
    SELECT conversations.id, name, conversations.created_at, changed_at, model, profile, system, forked_from,
           command, coalesce(head.number, 0) AS n_turns,
           coalesce(substr(first.question, 1, {8 * QUESTION_CHARS}), '') AS first_question
    FROM conversations
    LEFT JOIN turns AS head ON head.id = conversations.head
    LEFT JOIN turns AS first ON first.id = head.root"""

_SURROGATE = re.compile("[\ud800-\udfff]")
_SAMPLED = (False, True, None)  # one byte for each token: forced, sampled, not recorded
_KINDS: Mapping[str, type[TurnPart]] = {
    "thinking": ThinkingPart,
    "answer": AnswerPart,
    "tool_call": ToolCallPart,
    "tool_result": ToolResultPart,
}
_Member = TypeVar("_Member", TurnState, FinishReason, CloseReason)


def storable(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", text)


def packed_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as unsigned little-endian numbers of four bytes each."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def unpacked_tokens(packed: bytes) -> tuple[int, ...]:
    """The token ids again; bytes after the last whole one are dropped."""
    return struct.unpack_from(f"<{len(packed) // 4}I", packed)


def packed_json(value: object) -> str:
    """The value, also a dataclass, as compact JSON."""
    return storable(json.dumps(plain(value), ensure_ascii=False, separators=(",", ":")))


def unpacked_json(kind: Any, packed: str | None) -> Any:
    """The value of a type that JSON holds; None if there is none or it does not fit."""
    try:
        return None if packed is None else decoded(kind, json.loads(packed))
    except (ValueError, RecursionError):
        return None


def unpacked_texts(packed: str) -> tuple[str, ...]:
    """The texts of a JSON array."""
    return tuple(unpacked_json(tuple[str, ...], packed) or ())


def conversation_of(row: sqlite3.Row) -> ConversationRecord:
    """The conversation of a row of CONVERSATIONS."""
    question = squeezed(row["first_question"], QUESTION_CHARS)
    return ConversationRecord(**{**_values(row), "first_question": question})


def turn_of(row: sqlite3.Row, parts: Iterable[sqlite3.Row]) -> TurnRecord:
    """The turn of a row of `turns` and its rows of `parts`."""
    unpacked = {
        "files": unpacked_texts(row["files"]),
        "parts": tuple(part for part in map(_part_of, parts) if part is not None),
        "prompt": unpacked_tokens(row["prompt"]),
        "state": _one_of(TurnState, row["state"]) or TurnState.LOST,
        "reason": _one_of(FinishReason, row["reason"]),
        "closed": _one_of(CloseReason, row["closed"]),
        "origin": unpacked_json(TurnOrigin, row["origin"]),
        "plan": unpacked_json(Mapping[str, object], row["plan"]) or {},
        "stats": unpacked_json(TurnStats, row["stats"]) or TurnStats(),
    }
    return TurnRecord(**{**_values(row), **unpacked})


def _values(row: sqlite3.Row) -> dict[str, Any]:
    return dict(zip(row.keys(), row, strict=True))


def kind_of(part: TurnPart) -> str:
    """What a part is called in a row and in an export."""
    return next(kind for kind, of in _KINDS.items() if isinstance(part, of))


def part_fields(part: TurnPart) -> dict[str, Any]:
    """What a part holds beside its tokens."""
    return {field.name: getattr(part, field.name) for field in fields(part) if field.name != "tokens"}


def part_values(part: TurnPart) -> tuple[object, ...]:
    """The columns of a part: `kind`, `text`, `details`, `tokens`, `sampled` and `logprobs`."""
    tokens, details = part.tokens, part_fields(part)
    return (
        kind_of(part),
        storable(details.pop("text", "")),
        packed_json(details),
        packed_tokens(tokens.ids),
        None if tokens.sampled is None else bytes(map(_SAMPLED.index, tokens.sampled)),
        None if tokens.logprobs is None else packed_json(tokens.logprobs),
    )


def _part_of(row: sqlite3.Row) -> TurnPart | None:
    ids = unpacked_tokens(row["tokens"])
    sampled = None if row["sampled"] is None else tuple(_SAMPLED[byte % 3] for byte in row["sampled"])
    logprobs = unpacked_json(tuple[TokenLogprob | None, ...], row["logprobs"])
    tokens = TokenRun(ids, _fitting(sampled, ids), _fitting(logprobs, ids))
    kind = _KINDS.get(row["kind"])
    details = unpacked_json(Mapping[str, object], row["details"]) or {}
    for values in ({**details, "text": row["text"]}, {"text": row["text"]}) if kind else ():
        with suppress(ValueError):
            part: TurnPart = replace(decoded(kind, values), tokens=tokens)
            return part
    return None


def _fitting(values: tuple[Any, ...] | None, ids: Sequence[int]) -> tuple[Any, ...] | None:
    """The values if there is one for each token."""
    return values if values is not None and len(values) == len(ids) else None


def _one_of(kind: type[_Member], value: str | None) -> _Member | None:
    try:
        return None if value is None else kind(value)
    except ValueError:
        return None
