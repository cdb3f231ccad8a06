"""Words in, the turns out in which all of them occur, the newest first, each with a line around the first.

Words of three letters and more are looked up in the index, the others and what the index does not hold are
looked for in the texts. A word is found inside others, so that languages without spaces are found too. What a
person types is data: nothing in it is an operator.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

from qwq_local.errors import HistoryError
from qwq_local.history.database import Database
from qwq_local.history.index import rebuild_later
from qwq_local.history.lines import squeezed
from qwq_local.history.packing import storable
from qwq_local.history.records import ConversationRecord, Hit, Part
from qwq_local.history.rows import CONVERSATIONS, conversation_of

MAX_WORDS = 16
MAX_WORD_CHARS = 200
EXCERPT_CHARS = 160
_BEFORE_CHARS = 60
_INDEXED_CHARS = 3  # a trigram
_COLUMNS = "id, conversation, number, question, thinking, answer"


def find_words(database: Database, text: str, limit: int, part: Part | None) -> list[Hit]:
    """At most `limit` hits; of one kind of text, or of any. Raises HistoryError."""
    words = words_of(text)
    parts = tuple(Part) if part is None else (part,)
    hits: list[Hit] = []
    known: dict[int, ConversationRecord] = {}
    asked: set[tuple[int, str]] = set()
    for turn in _candidates(database, words, parts) if words and limit > 0 else ():
        row = database.row(f"SELECT {_COLUMNS} FROM turns WHERE id = ?", turn)
        if row is None:
            continue
        conversation = row["conversation"]
        for found in _parts_with(row, words, parts):
            if found is Part.QUESTION:
                question = (conversation, row[found])
                if question in asked:  # a regenerated turn asks the same again
                    continue
                asked.add(question)
            if conversation not in known:
                known[conversation] = _conversation(database, conversation)
            line = excerpt(row[found], words)
            hits.append(Hit(known[conversation], row["id"], row["number"], found, line))
            if len(hits) >= limit:
                return hits
    return hits


def words_of(text: str) -> list[str]:
    """The words to look for: what stands between spaces, each once."""
    words = storable(text).replace("\0", " ").split()
    return list(dict.fromkeys(word[:MAX_WORD_CHARS] for word in words))[:MAX_WORDS]


def excerpt(text: str, words: Sequence[str]) -> str:
    """One printable line around the first of the words that occurs, of EXCERPT_CHARS characters at most."""
    first = min((match.start() for word in words if (match := _find(word, text))), default=0)
    start = max(0, first - _BEFORE_CHARS)
    before = "…" if start else ""
    return before + squeezed(text[start:], EXCERPT_CHARS - len(before))


def _candidates(database: Database, words: Sequence[str], parts: Sequence[Part]) -> list[int]:
    """The ids of turns that may hold all of the words, the newest first."""
    indexed = [word for word in words if len(word) >= _INDEXED_CHARS]
    likes, patterns = _likes(words, parts)
    scan = f"SELECT id FROM turns WHERE {likes}"
    newest_first = "ORDER BY id DESC"
    if database.has_index and indexed:
        query = f"{{{' '.join(parts)}}} : ({' AND '.join(map(_phrase, indexed))})"
        try:
            rows = database.rows(
                "SELECT rowid AS id FROM finds WHERE finds MATCH ? "
                f"UNION {scan} AND is_indexed = 0 {newest_first}",
                *(query, *patterns),
            )
            return [row["id"] for row in rows]
        except HistoryError as error:
            if not isinstance(error.__cause__, sqlite3.DatabaseError):
                raise
            rebuild_later(database)
    return [row["id"] for row in database.rows(f"{scan} {newest_first}", *patterns)]


def _phrase(word: str) -> str:
    """The word as FTS5 takes text that is no syntax: https://www.sqlite.org/fts5.html#fts5_strings."""
    return '"' + word.replace('"', '""') + '"'


def _likes(words: Sequence[str], parts: Sequence[Part]) -> tuple[str, list[str]]:
    """A condition that every turn with all the words meets, and its values.

    LIKE folds the case of ASCII letters alone, so any other letter that has a case stands for all of them.
    """
    patterns = ["%" + "".join(map(_like_character, word)) + "%" for word in words]
    either = " OR ".join(f"{part.value} LIKE ? ESCAPE '\\'" for part in parts)
    return " AND ".join(f"({either})" for _ in words), [pattern for pattern in patterns for _ in parts]


def _like_character(character: str) -> str:
    if character in "%_\\":
        return "\\" + character
    has_case = character.lower() != character.upper()
    return "_" if has_case and not character.isascii() else character


def _find(word: str, text: str) -> re.Match[str] | None:
    return re.search(re.escape(word), text, re.IGNORECASE)


def _parts_with(row: sqlite3.Row, words: Sequence[str], parts: Sequence[Part]) -> list[Part]:
    """The parts that hold every word; where it takes several to hold them all, the first with any of them."""
    holding = {part: [word for word in words if _find(word, row[part])] for part in parts}
    whole = [part for part in parts if len(holding[part]) == len(words)]
    if whole or {word for found in holding.values() for word in found} != set(words):
        return whole
    return [part for part in parts if holding[part]][:1]


def _conversation(database: Database, conversation: int) -> ConversationRecord:
    row = database.row(f"{CONVERSATIONS} WHERE conversations.id = ?", conversation)
    assert row is not None
    return conversation_of(row)
