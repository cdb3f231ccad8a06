"""The tables of the history, their version, and the steps from older versions.

A turn that runs appends to `pieces`, so that a second of it costs the same however long it is; at its end
they become the columns of its row and are removed. `finds` is the index of the search, without a copy of the
texts: https://www.sqlite.org/fts5.html#external_content_tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

VERSION = 2
APPLICATION_ID = 0x71777148  # "qwqH", where `file` and SQLite look for whose database it is

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
        forked_from INTEGER)""",
    """CREATE TABLE turns (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        parent INTEGER REFERENCES turns (id),
        root INTEGER NOT NULL DEFAULT 0,
        number INTEGER NOT NULL,
        question TEXT NOT NULL,
        content TEXT NOT NULL,
        files TEXT NOT NULL DEFAULT '[]',
        thinking TEXT NOT NULL DEFAULT '',
        answer TEXT NOT NULL DEFAULT '',
        steered TEXT NOT NULL DEFAULT '[]',
        prompt BLOB NOT NULL DEFAULT x'',
        generated BLOB NOT NULL DEFAULT x'',
        state TEXT NOT NULL,
        owner TEXT NOT NULL DEFAULT '',
        reason TEXT,
        closed TEXT,
        origin TEXT NOT NULL DEFAULT '',
        plan TEXT NOT NULL DEFAULT '{}',
        stats TEXT NOT NULL DEFAULT '{}',
        thinking_s REAL NOT NULL DEFAULT 0,
        created_at REAL NOT NULL,
        is_indexed INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX turns_of_conversation ON turns (conversation)",
    "CREATE INDEX turns_of_parent ON turns (parent)",
    "CREATE INDEX turns_of_an_owner ON turns (id) WHERE owner <> ''",
    "CREATE INDEX turns_to_index ON turns (id) WHERE is_indexed = 0",
    """CREATE TABLE pieces (
        id INTEGER PRIMARY KEY,
        turn INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
        thinking TEXT NOT NULL,
        answer TEXT NOT NULL,
        steered TEXT NOT NULL,
        start INTEGER,
        tokens BLOB NOT NULL,
        thinking_tokens INTEGER NOT NULL,
        thinking_s REAL NOT NULL)""",
    "CREATE INDEX pieces_of_turn ON pieces (turn)",
)

# Only where this SQLite has the tokenizer; the rest works without.
INDEX = """CREATE VIRTUAL TABLE finds USING fts5 (
    question, thinking, answer, content = 'turns', content_rowid = 'id', tokenize = 'trigram')"""

MIGRATIONS: Mapping[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE conversations ADD COLUMN forked_from INTEGER",
        "ALTER TABLE turns ADD COLUMN is_indexed INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX turns_to_index ON turns (id) WHERE is_indexed = 0",
    ),
}
"""For each version the statements that lead to the next one."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What a database of this program looks like: version, tables, index of the search, and steps to it."""

    version: int = VERSION
    tables: tuple[str, ...] = TABLES
    index: str = INDEX
    migrations: Mapping[int, tuple[str, ...]] = field(default_factory=lambda: MIGRATIONS)

    @property
    def table_names(self) -> list[str]:
        """The names of the tables."""
        return [statement.split()[2] for statement in self.tables if statement.startswith("CREATE TABLE")]
