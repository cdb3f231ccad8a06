"""The search of the history, which reads all texts: a thousand long thoughts take less than 0.1 s.

A word is found inside others, so that languages without spaces are found too. Nothing that is typed is an
operator.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from qwq_local.history.database import Database
from qwq_local.history.labels import squeezed
from qwq_local.history.records import ConversationRecord
from qwq_local.history.rows import CONVERSATIONS, conversation_of, storable

MAX_WORDS = 16
MAX_WORD_CHARS = 200
EXCERPT_CHARS = 160
_BEFORE_CHARS = 60


class TextKind(StrEnum):
    """The three texts of a turn that can be searched."""

    QUESTION = "question"
    THINKING = "thinking"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A text of a turn in which a search found its words; `excerpt` is one line around the first of them.

    `turn` is the turn's id and `number` its place on its path.
    """

    conversation: ConversationRecord
    turn: int
    number: int
    part: TextKind
    excerpt: str


def find_words(database: Database, text: str, limit: int, kind: TextKind | None) -> list[SearchHit]:
    """At most `limit` hits in one kind of text or in any, the newest turns first. Raises HistoryError."""
    words = words_of(text)
    kinds = tuple(TextKind) if kind is None else (kind,)
    if not words:
        return []
    with database.reading() as connection:
        return list(islice(_hits(connection, words, kinds), limit))


def _hits(
    connection: sqlite3.Connection, words: Sequence[str], kinds: Sequence[TextKind]
) -> Iterator[SearchHit]:
    known: dict[int, ConversationRecord] = {}
    asked: set[tuple[int, str]] = set()
    likes, patterns = _likes(words, kinds)
    for row in connection.execute(f"SELECT * FROM turn_texts WHERE {likes} ORDER BY id DESC", patterns):
        conversation = row["conversation"]
        for found in _kinds_with(row, words, kinds):
            if found is TextKind.QUESTION:
                question = (conversation, row[found])
                if question in asked:  # a regenerated turn asks the same again
                    continue
                asked.add(question)
            if conversation not in known:
                query = f"{CONVERSATIONS} WHERE conversations.id = ?"
                known[conversation] = conversation_of(connection.execute(query, (conversation,)).fetchone())
            line = excerpt(row[found], words)
            yield SearchHit(known[conversation], row["id"], row["number"], found, line)


def words_of(text: str) -> list[str]:
    """The words to search, split at spaces, each once."""
    words = storable(text).replace("\0", " ").split()
    return list(dict.fromkeys(word[:MAX_WORD_CHARS] for word in words))[:MAX_WORDS]


def excerpt(text: str, words: Sequence[str]) -> str:
    """One printable line around the first of the words that occurs, of EXCERPT_CHARS characters at most."""
    first = min((match.start() for word in words if (match := _find(word, text))), default=0)
    start = max(0, first - _BEFORE_CHARS)
    before = "…" if start else ""
    return before + squeezed(text[start:], EXCERPT_CHARS - len(before))


def _likes(words: Sequence[str], kinds: Sequence[TextKind]) -> tuple[str, list[str]]:
    """A condition that every turn with all the words meets, and its values.

    LIKE folds the case of ASCII letters alone, so any other letter that has a case stands for all of them.
    """
    patterns = ["%" + "".join(map(_like_character, word)) + "%" for word in words]
    either = " OR ".join(f"{kind.value} LIKE ? ESCAPE '\\'" for kind in kinds)
    return " AND ".join(f"({either})" for _ in words), [pattern for pattern in patterns for _ in kinds]


def _like_character(character: str) -> str:
    if character in "%_\\":
        return "\\" + character
    has_case = character.lower() != character.upper()
    return "_" if has_case and not character.isascii() else character


def _find(word: str, text: str) -> re.Match[str] | None:
    return re.search(re.escape(word), text, re.IGNORECASE)


def _kinds_with(row: sqlite3.Row, words: Sequence[str], kinds: Sequence[TextKind]) -> list[TextKind]:
    """The texts with every word. If only several together have them all, the first with any of them."""
    holding = {kind: [word for word in words if _find(word, row[kind])] for kind in kinds}
    whole = [kind for kind in kinds if len(holding[kind]) == len(words)]
    if whole or {word for found in holding.values() for word in found} != set(words):
        return whole
    return [kind for kind in kinds if holding[kind]][:1]
