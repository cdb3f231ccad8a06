"""The search of the history, and its index.

Words of three letters and more are looked up in the index; shorter ones, and turns that are not in the index,
are searched in the texts. A word is found inside others, so that languages without spaces are found too.
Nothing that is typed is an operator.

Turns that ended are in the index, removed and running ones are not. A damaged index is emptied and filled
again later: it holds nothing that the turns do not.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from contextlib import suppress

from qwq_local.errors import HistoryError
from qwq_local.history.database import DAMAGED_CODES, Database, error_code
from qwq_local.history.labels import squeezed
from qwq_local.history.records import ConversationRecord, SearchHit, TextKind, TurnState
from qwq_local.history.rows import CONVERSATIONS, conversation_of, storable

MAX_WORDS = 16
MAX_WORD_CHARS = 200
EXCERPT_CHARS = 160
_BEFORE_CHARS = 60
_INDEXED_CHARS = 3  # a trigram
_BATCH = 10  # turns, about a second of work, during which another process waits
_TEXTS = "question, thinking, answer"
_COLUMNS = f"id, conversation, number, {_TEXTS}"


def find_words(database: Database, text: str, limit: int, kind: TextKind | None) -> list[SearchHit]:
    """At most `limit` hits in one kind of text or in any, the newest turns first. Raises HistoryError."""
    words = words_of(text)
    kinds = tuple(TextKind) if kind is None else (kind,)
    hits: list[SearchHit] = []
    known: dict[int, ConversationRecord] = {}
    asked: set[tuple[int, str]] = set()
    for turn in _candidates(database, words, kinds) if words and limit > 0 else ():
        row = database.row(f"SELECT {_COLUMNS} FROM turn_texts WHERE id = ?", turn)
        if row is None:
            continue
        conversation = row["conversation"]
        for found in _kinds_with(row, words, kinds):
            if found is TextKind.QUESTION:
                question = (conversation, row[found])
                if question in asked:  # a regenerated turn asks the same again
                    continue
                asked.add(question)
            if conversation not in known:
                [record] = database.rows(f"{CONVERSATIONS} WHERE conversations.id = ?", conversation)
                known[conversation] = conversation_of(record)
            line = excerpt(row[found], words)
            hits.append(SearchHit(known[conversation], row["id"], row["number"], found, line))
            if len(hits) >= limit:
                return hits
    return hits


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


def _candidates(database: Database, words: Sequence[str], kinds: Sequence[TextKind]) -> list[int]:
    """The ids of turns that may have all of the words, the newest first."""
    indexed = [word for word in words if len(word) >= _INDEXED_CHARS]
    likes, patterns = _likes(words, kinds)
    scan = f"SELECT id FROM turn_texts WHERE {likes}"
    newest_first = "ORDER BY id DESC"
    if database.has_index and indexed:
        query = f"{{{' '.join(kinds)}}} : ({' AND '.join(map(_phrase, indexed))})"
        try:
            rows = database.rows(
                "SELECT rowid AS id FROM finds WHERE finds MATCH ? "
                f"UNION {scan} AND is_indexed = 0 {newest_first}",
                query,
                *patterns,
            )
            return [row["id"] for row in rows]
        except HistoryError as error:
            if not isinstance(error.__cause__, sqlite3.DatabaseError):
                raise
            with suppress(HistoryError), database.writing() as connection:
                _empty_index(connection)  # the next start fills it again
    return [row["id"] for row in database.rows(f"{scan} {newest_first}", *patterns)]


def _phrase(word: str) -> str:
    """The word as FTS5 takes plain text: https://www.sqlite.org/fts5.html#fts5_strings."""
    return '"' + word.replace('"', '""') + '"'


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


def add_to_index(database: Database, turns: Sequence[int]) -> None:
    """Put turns into the index that are not in it; inside a transaction."""
    insert = f"INSERT INTO finds (rowid, {_TEXTS}) SELECT id, {_TEXTS} FROM turn_texts WHERE id = ?"
    _change_index(database, turns, insert, "UPDATE turns SET is_indexed = 1 WHERE id = ?")


def take_out_of_index(database: Database, turns: Sequence[int]) -> None:
    """Take turns out of the index before their texts change or go; inside a transaction."""
    delete = (
        f"INSERT INTO finds (finds, rowid, {_TEXTS}) SELECT 'delete', id, {_TEXTS} FROM turn_texts "
        "WHERE id = ? AND is_indexed"
    )
    _change_index(database, turns, delete, "UPDATE turns SET is_indexed = 0 WHERE id = ?")


def purge_index(database: Database) -> None:
    """Write the index again without what was taken out, which otherwise stays until it merges by itself."""
    _change_index(database, ["optimize"], "INSERT INTO finds (finds) VALUES (?)")


def _change_index(database: Database, values: Sequence[object], *statements: str) -> None:
    """Run each statement for all of the values. An index that turns out to be damaged is emptied instead."""
    if not database.has_index:
        return
    connection = database.connection
    connection.execute("SAVEPOINT indexing")
    try:
        for statement in statements:
            connection.executemany(statement, [(value,) for value in values])
    except sqlite3.DatabaseError as error:
        if error_code(error) not in DAMAGED_CODES:
            raise
        connection.execute("ROLLBACK TO indexing")
        _empty_index(connection)
    connection.execute("RELEASE indexing")


def catch_up(database: Database) -> None:
    """Put every ended turn into the index that is not in it, as far as the history can be written now."""
    query = "SELECT id FROM turns WHERE is_indexed = 0 AND state <> ? ORDER BY id LIMIT ?"
    with suppress(HistoryError):
        while database.has_index and database.row(query, TurnState.RUNNING, _BATCH) is not None:
            with database.writing() as connection:
                turns = [row["id"] for row in connection.execute(query, (TurnState.RUNNING, _BATCH))]
                add_to_index(database, turns)
                if not connection.execute("SELECT 1 FROM turns WHERE is_indexed LIMIT 1").fetchone():
                    return  # the index does not take them


def _empty_index(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO finds (finds) VALUES ('delete-all')")
    connection.execute("UPDATE turns SET is_indexed = 0 WHERE is_indexed")
