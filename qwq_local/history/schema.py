"""The tables of the history, their version, and the steps from older versions.

A running turn appends its events to `journal`, so that a second of it costs the same however long it is. At
its end they become rows of `parts` and are removed. The search reads `turn_texts`.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qwq_local.history.records import AnswerPart, ThinkingPart, TokenRun
from qwq_local.history.rows import packed_json, part_values, unpacked_json, unpacked_texts, unpacked_tokens

VERSION = 3
APPLICATION_ID = 0x71777148  # "qwqH", where `file` and SQLite look for the owner of a database

INSERT_PART = (
    "INSERT INTO parts (turn, position, kind, text, details, tokens, sampled, logprobs) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_COLUMN = re.compile(r"^ {8}(\w+) (?:INTEGER|REAL|TEXT|BLOB)", re.MULTILINE)
_PARTS = """CREATE TABLE parts (
        turn INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        kind TEXT NOT NULL,
        text TEXT NOT NULL,
        details TEXT NOT NULL,
        tokens BLOB NOT NULL,
        sampled BLOB,
        logprobs TEXT,
        PRIMARY KEY (turn, position))"""
_JOURNAL = """CREATE TABLE journal (
        id INTEGER PRIMARY KEY,
        turn INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
        events TEXT NOT NULL,
        thinking_s REAL NOT NULL)"""
_JOURNAL_INDEX = "CREATE INDEX journal_of_turn ON journal (turn)"
_TEXT_OF_PARTS = (
    "coalesce((SELECT group_concat(text, '') FROM "
    "(SELECT text FROM parts WHERE turn = turns.id AND kind = '{}' ORDER BY position)), '')"
)
_TEXTS = (
    "CREATE VIEW turn_texts AS SELECT id, conversation, number, question, "
    f"{_TEXT_OF_PARTS.format('thinking')} AS thinking, {_TEXT_OF_PARTS.format('answer')} AS answer FROM turns"
)

TABLES = (
    """CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL DEFAULT '',
        created_at REAL NOT NULL,
        changed_at REAL NOT NULL,
        model TEXT NOT NULL,
        profile TEXT NOT NULL,
        system TEXT NOT NULL,
        head INTEGER REFERENCES turns (id) DEFERRABLE INITIALLY DEFERRED,
        forked_from INTEGER,
        command TEXT NOT NULL DEFAULT 'chat')""",
    """CREATE TABLE turns (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        parent INTEGER REFERENCES turns (id),
        root INTEGER NOT NULL DEFAULT 0,
        number INTEGER NOT NULL,
        question TEXT NOT NULL,
        content TEXT NOT NULL,
        files TEXT NOT NULL DEFAULT '[]',
        prompt BLOB NOT NULL DEFAULT x'',
        state TEXT NOT NULL,
        owner TEXT NOT NULL DEFAULT '',
        reason TEXT,
        closed TEXT,
        origin TEXT NOT NULL DEFAULT '',
        plan TEXT NOT NULL DEFAULT '{}',
        stats TEXT NOT NULL DEFAULT '{}',
        thinking_s REAL NOT NULL DEFAULT 0,
        created_at REAL NOT NULL)""",
    "CREATE INDEX turns_of_conversation ON turns (conversation)",
    "CREATE INDEX turns_of_parent ON turns (parent)",
    "CREATE INDEX turns_of_an_owner ON turns (id) WHERE owner <> ''",
    _PARTS,
    _JOURNAL,
    _JOURNAL_INDEX,
    _TEXTS,
)

Step = str | Callable[[sqlite3.Connection], None]
"""A statement, or a function that runs inside the transaction of the migration."""


def _split_turns_into_parts(connection: sqlite3.Connection) -> None:
    """Version 2 kept the texts and ids of a turn in one row, and those of a running turn in `pieces`."""
    rows = connection.execute(
        "SELECT id, thinking, answer, steered, generated, reason, stats, thinking_s FROM turns"
    )
    for turn, thinking, answer, steered, generated, reason, stats, thinking_s in rows.fetchall():
        figures = unpacked_json(Mapping[str, object], stats) or {}
        sentences, ids = unpacked_texts(steered), list(unpacked_tokens(generated))
        pieces = connection.execute(
            "SELECT thinking, answer, steered, start, tokens, thinking_tokens, thinking_s FROM pieces "
            "WHERE turn = ? ORDER BY id",
            (turn,),
        ).fetchall()
        for more_thinking, more_answer, more_steered, start, tokens, n_thinking, seconds in pieces:
            thinking, answer = thinking + more_thinking, answer + more_answer
            sentences += unpacked_texts(more_steered)
            if start is not None:
                ids[start:] = unpacked_tokens(tokens)
            thinking_s = seconds
            figures |= {"thinking_tokens": n_thinking, "answer_tokens": max(0, len(ids) - n_thinking)}
        n_thinking = _thinking_ids(figures, len(ids), is_loop=reason == "loop")
        run = TokenRun(tuple(ids))
        parts = (
            ThinkingPart(thinking, sentences, run.part(0, n_thinking)),
            AnswerPart(answer, run.part(n_thinking)),
        )
        for position, part in enumerate(part for part in parts if part.text or part.tokens.ids):
            connection.execute(INSERT_PART, (turn, position, *part_values(part)))
        if pieces:
            connection.execute(
                "UPDATE turns SET stats = ?, thinking_s = ? WHERE id = ?",
                (packed_json(figures), thinking_s, turn),
            )


def _thinking_ids(figures: Mapping[str, object], n_ids: int, *, is_loop: bool) -> int:
    """How many of the ids are the thinking's. Counted from the end, since the closing sentence is no token.

    After a loop in the answer the counts include what was cut: then the thinking's own count is nearer.
    """
    n_thinking, n_answer = figures.get("thinking_tokens"), figures.get("answer_tokens")
    wanted = n_thinking if is_loop else n_ids - n_answer if isinstance(n_answer, int) else None
    return min(max(wanted, 0), n_ids) if isinstance(wanted, int) else n_ids


MIGRATIONS: Mapping[int, tuple[Step, ...]] = {
    1: ("ALTER TABLE conversations ADD COLUMN forked_from INTEGER",),
    2: (
        "ALTER TABLE conversations ADD COLUMN command TEXT NOT NULL DEFAULT 'chat'",
        _PARTS,
        _split_turns_into_parts,
        # The columns stay: SQLite before 3.35 cannot drop one.
        "UPDATE turns SET thinking = '', answer = '', steered = '', generated = x''",
        "DROP TABLE pieces",
        _JOURNAL,
        _JOURNAL_INDEX,
        _TEXTS,
        # The index of the search, also where this SQLite does not know it and cannot drop it.
        "PRAGMA writable_schema = ON",
        "DELETE FROM sqlite_master WHERE name = 'finds'",
        *(f"DROP TABLE IF EXISTS finds_{name}" for name in ("data", "idx", "docsize", "config")),
        "DROP INDEX IF EXISTS turns_to_index",
        "PRAGMA writable_schema = OFF",
    ),
}
"""For each version the steps that lead to the next one."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What a database of this program looks like: its version, its tables, and the steps to it."""

    version: int = VERSION
    tables: tuple[str, ...] = TABLES
    migrations: Mapping[int, tuple[Step, ...]] = field(default_factory=lambda: MIGRATIONS)

    @property
    def columns(self) -> Mapping[str, frozenset[str]]:
        """The names of the columns by table."""
        tables = [statement for statement in self.tables if statement.startswith("CREATE TABLE")]
        return {table.split()[2]: frozenset(_COLUMN.findall(table)) for table in tables}
