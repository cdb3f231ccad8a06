"""A conversation as a text to keep or to pass on: Markdown, JSON, or a page of HTML.

Records in, text out; and the one way such a text becomes a file. The JSON has everything but the token ids.
Knows no database.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from qwq_local.errors import HistoryError, UsageError
from qwq_local.files import atomic_file
from qwq_local.history.as_html import to_html
from qwq_local.history.as_markdown import to_markdown
from qwq_local.history.packing import storable
from qwq_local.history.records import ConversationRecord, TurnRecord

JSON_FORMAT = "qwq-conversation"
JSON_VERSION = 1


class Format(StrEnum):
    """What a conversation can be written as, by the ending of a file's name."""

    MARKDOWN = "md"
    JSON = "json"
    HTML = "html"


def format_of(name: str) -> Format:
    """The format that a file's name asks for. Raises UsageError."""
    ending = Path(name).suffix.lower().removeprefix(".")
    try:
        return Format({"markdown": "md", "htm": "html"}.get(ending, ending))
    except ValueError:
        raise UsageError(
            f"{name[:200]!r}: end the name in .md, .json or .html, to say what to write."
        ) from None


def exported(kind: Format, conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """The conversation with these turns in a format."""
    write = {Format.MARKDOWN: to_markdown, Format.JSON: to_json, Format.HTML: to_html}[kind]
    return write(conversation, turns)


def to_json(conversation: ConversationRecord, turns: Sequence[TurnRecord]) -> str:
    """A JSON object: `format`, `version`, the conversation's fields, and `turns` with theirs but token ids.

    Times are ISO 8601 in UTC.
    """
    content = {
        "format": JSON_FORMAT,
        "version": JSON_VERSION,
        **asdict(conversation),
        "created_at": _moment(conversation.created_at),
        "changed_at": _moment(conversation.changed_at),
        "turns": [_turn_object(turn) for turn in turns],
    }
    return storable(json.dumps(content, ensure_ascii=False, indent=1)) + "\n"


def save_text(path: Path, text: str, *, replaces: bool = False, mend: str = "Choose another name.") -> None:
    """Write a file, whole or not at all.

    Raises HistoryError, with what to do, when it is there and must not be replaced.
    """
    try:
        with atomic_file(path, overwrite=replaces) as file:
            file.write(text.encode())
    except FileExistsError:
        raise HistoryError(f"{path} is there already; nothing was written. {mend}") from None
    except OSError as error:
        raise HistoryError(f"{path} cannot be written: {error.strerror or error}.") from error


def _turn_object(turn: TurnRecord) -> dict[str, object]:
    values = asdict(turn)
    del values["prompt"], values["generated"]
    return {**values, "created_at": _moment(turn.created_at), "n_generated": len(turn.generated)}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
