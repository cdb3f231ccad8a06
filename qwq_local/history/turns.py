"""Turns in the database: begun, written piece by piece, ended, taken up again, and found after a crash.

Records and pieces in, rows out. A second of a turn is one short row, appended; the turn's own row is written
at its beginning and its end, and where its plan or its prompt become known. Knows no conversation but by id.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qwq_local.errors import HistoryError
from qwq_local.events import FinishReason, TurnStats
from qwq_local.history.database import Database
from qwq_local.history.index import add_turns, take_out
from qwq_local.history.owners import Owner
from qwq_local.history.packing import (
    packed_json,
    packed_origin,
    packed_stats,
    packed_texts,
    packed_tokens,
    storable,
)
from qwq_local.history.records import Origin, TurnRecord, TurnStart, TurnState
from qwq_local.history.rows import WITH_TOKENS, WITHOUT_TOKENS, Piece, piece_of, turn_of, with_pieces

_PIECES = "SELECT * FROM pieces WHERE turn = ? ORDER BY id"
_PATH = """WITH RECURSIVE path (turn) AS (
        SELECT head FROM conversations WHERE conversations.id = ?
        UNION ALL SELECT parent FROM turns JOIN path ON turns.id = path.turn WHERE parent IS NOT NULL)
    SELECT {} FROM turns WHERE id IN (SELECT turn FROM path) ORDER BY number"""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a turn ended; None leaves what its pieces come to, `changes` are other fields."""

    state: TurnState
    reason: FinishReason | None = None
    stats: TurnStats | None = None
    thinking: str | None = None
    answer: str | None = None
    changes: Mapping[str, object] = field(default_factory=dict)


class Turns:
    """The turns of a history, as this process writes and reads them."""

    def __init__(self, database: Database, owner: Owner, clock: Callable[[], float]) -> None:
        self._database = database
        self._owner = owner
        self._clock = clock

    def begin(self, start: TurnStart) -> int:
        """Write a turn that is about to run, and make it the head; its id. Raises HistoryError."""
        with self._database.writing(is_lasting=True) as connection:
            self._owner.hold()
            conversation = connection.execute(
                "SELECT model FROM conversations WHERE id = ?", (start.conversation,)
            ).fetchone()
            if conversation is None:
                raise HistoryError(f"there is no conversation {start.conversation}.")
            parent = self._parent(connection, start)
            origin = Origin(conversation["model"], profile=start.profile, settings=start.settings)
            now = self._clock()
            turn = connection.execute(
                "INSERT INTO turns (conversation, parent, root, number, question, content, files, "
                "origin, state, owner, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    start.conversation,
                    start.parent,
                    parent["root"] if parent else 0,
                    parent["number"] + 1 if parent else 1,
                    storable(start.question),
                    storable(start.content),
                    packed_texts(start.files),
                    packed_origin(origin),
                    TurnState.RUNNING,
                    self._owner.token,
                    now,
                ),
            ).lastrowid
            connection.execute("UPDATE turns SET root = id WHERE id = ? AND root = 0", (turn,))
            self._stamp(connection, start.conversation, turn)
        assert turn is not None
        return turn

    def take_up(self, turn: int) -> TurnRecord:
        """Let a turn that has ended run on; as it stands. Raises HistoryError when it runs."""
        with self._database.writing(is_lasting=True) as connection:
            self._owner.hold()
            row = self._row(connection, turn)
            if row["state"] == TurnState.RUNNING:
                if self._owner.is_alive(row["owner"]):
                    raise HistoryError(
                        f"turn {turn} is being answered by a qwq right now. Stop it there first."
                    )
                self._settle(connection, self._assembled(connection, row), Ending(TurnState.LOST))
            if self._database.has_index:
                take_out(connection, [turn])
            connection.execute(
                "UPDATE turns SET state = ?, owner = ?, reason = NULL WHERE id = ?",
                (TurnState.RUNNING, self._owner.token, turn),
            )
            self._stamp(connection, row["conversation"], turn)
            return turn_of(self._row(connection, turn))

    def append(self, turn: int, piece: Piece, changes: Mapping[str, object], wait_s: float) -> None:
        """Write what came since the last piece. Raises HistoryBusy after `wait_s` seconds, HistoryError."""
        with self._database.writing(wait_s=wait_s) as connection:
            self._change(connection, turn, changes)
            connection.execute(
                "INSERT INTO pieces (turn, thinking, answer, steered, start, tokens, thinking_tokens, "
                "thinking_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    turn,
                    storable(piece.thinking),
                    storable(piece.answer),
                    packed_texts(piece.steered),
                    piece.start,
                    packed_tokens(piece.tokens),
                    piece.thinking_tokens,
                    piece.thinking_s,
                ),
            )

    def end(self, turn: int, piece: Piece, ending: Ending, wait_s: float) -> None:
        """Write the last of a turn and put it together. Raises HistoryBusy, HistoryError."""
        with self._database.writing(wait_s=wait_s, is_lasting=True) as connection:
            self._change(connection, turn, ending.changes)
            row = self._row(connection, turn)
            self._settle(connection, self._assembled(connection, row, piece), ending)
            self._stamp(connection, row["conversation"])

    def change(self, turn: int, changes: Mapping[str, object]) -> None:
        """Write fields of a turn that became known after its end. Raises HistoryError."""
        with self._database.writing() as connection:
            self._change(connection, turn, changes)

    def get(self, turn: int) -> TurnRecord:
        """A turn as it stands in the database. Raises HistoryError."""
        row = self._database.row(f"SELECT {WITH_TOKENS} FROM turns WHERE id = ?", turn)
        if row is None:
            raise HistoryError(f"there is no turn {turn}.")
        return self._with_pieces(row)

    def path(self, conversation: int, *, with_tokens: bool = True) -> list[TurnRecord]:
        """The turns from the first to the head."""
        columns = WITH_TOKENS if with_tokens else WITHOUT_TOKENS
        return [self._with_pieces(row) for row in self._database.rows(_PATH.format(columns), conversation)]

    def pick_up(self) -> None:
        """Put together what dead processes left of their turns, and mark them LOST."""
        query = "SELECT id, owner FROM turns WHERE state = 'running' AND owner <> ''"
        if all(row["owner"] == self._owner.token for row in self._database.rows(query)):
            return
        with self._database.writing(is_lasting=True) as connection:
            running = connection.execute(query).fetchall()
            is_alive = {owner: self._owner.is_alive(owner) for owner in {row["owner"] for row in running}}
            lost = [row["id"] for row in running if not is_alive[row["owner"]]]
            for turn in lost:
                record = self._assembled(connection, self._row(connection, turn))
                self._settle(connection, record, Ending(TurnState.LOST))

    def tell_lost(self) -> list[int]:
        """The ids of lost turns that nobody was told of yet."""
        query = "SELECT id FROM turns WHERE state = 'lost' AND owner <> '' ORDER BY id"
        if self._database.row(query) is None:
            return []
        with self._database.writing() as connection:
            turns = [row["id"] for row in connection.execute(query).fetchall()]
            connection.execute("UPDATE turns SET owner = '' WHERE state = 'lost'")
        return turns

    def running_elsewhere(self, connection: sqlite3.Connection, conversation: int) -> bool:
        """Whether a living process other than this one writes a turn of the conversation."""
        owners = connection.execute(
            "SELECT DISTINCT owner FROM turns WHERE conversation = ? AND state = 'running'", (conversation,)
        )
        return any(row["owner"] != self._owner.token and self._owner.is_alive(row["owner"]) for row in owners)

    def insert(self, connection: sqlite3.Connection, turn: TurnRecord) -> int:
        """Write a whole turn under a new id, with the conversation and the parent that it names."""
        new = connection.execute(
            "INSERT INTO turns (conversation, parent, number, question, content, files, state, created_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(turn.conversation, turn.parent, turn.number, storable(turn.question)),
                *(storable(turn.content), packed_texts(turn.files), turn.state, turn.created_at),
            ),
        ).lastrowid
        assert new is not None
        root = "coalesce((SELECT root FROM turns AS up WHERE up.id = turns.parent), id)"
        connection.execute(f"UPDATE turns SET root = {root} WHERE id = ?", (new,))
        known = {"prompt": turn.prompt, "plan": turn.plan, "origin": turn.origin, "closed": turn.closed}
        self._change(connection, new, {name: value for name, value in known.items() if value is not None})
        self._settle(connection, replace(turn, id=new), Ending(turn.state, turn.reason))
        return new

    def _parent(self, connection: sqlite3.Connection, start: TurnStart) -> sqlite3.Row | None:
        if start.parent is None:
            return None
        row = self._row(connection, start.parent)
        if row["conversation"] != start.conversation:
            raise HistoryError(f"turn {start.parent} is not one of conversation {start.conversation}.")
        return row

    def _row(self, connection: sqlite3.Connection, turn: int) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute("SELECT * FROM turns WHERE id = ?", (turn,)).fetchone()
        if row is None:
            raise HistoryError(f"there is no turn {turn}; it was removed.")
        return row

    def _with_pieces(self, row: sqlite3.Row) -> TurnRecord:
        turn = turn_of(row)
        if turn.state is not TurnState.RUNNING:
            return turn
        return with_pieces(turn, map(piece_of, self._database.rows(_PIECES, turn.id)))

    def _assembled(self, connection: sqlite3.Connection, row: sqlite3.Row, *more: Piece) -> TurnRecord:
        written = map(piece_of, connection.execute(_PIECES, (row["id"],)))
        return with_pieces(turn_of(row), [*written, *more])

    def _settle(self, connection: sqlite3.Connection, turn: TurnRecord, ending: Ending) -> None:
        """Write a whole turn into its row; its pieces are not needed any more."""
        connection.execute(
            "UPDATE turns SET thinking = ?, answer = ?, steered = ?, generated = ?, stats = ?, "
            "thinking_s = ?, state = ?, reason = ?, owner = iif(? = 'lost', owner, '') WHERE id = ?",
            (
                storable(turn.thinking if ending.thinking is None else ending.thinking),
                storable(turn.answer if ending.answer is None else ending.answer),
                packed_texts(turn.steered),
                packed_tokens(turn.generated),
                packed_stats(turn.stats if ending.stats is None else ending.stats),
                turn.thinking_s,
                ending.state,
                ending.reason,
                ending.state,  # a lost turn keeps its owner until someone is told of it
                turn.id,
            ),
        )
        connection.execute("DELETE FROM pieces WHERE turn = ?", (turn.id,))
        if self._database.has_index:
            add_turns(connection, [turn.id])

    def _change(self, connection: sqlite3.Connection, turn: int, changes: Mapping[str, object]) -> None:
        for name, value in changes.items():
            connection.execute(f"UPDATE turns SET {name} = ? WHERE id = ?", (_column(value), turn))
            if name == "origin" and isinstance(value, Origin):
                connection.execute(
                    "UPDATE conversations SET model = ?, profile = ? "
                    "WHERE id = (SELECT conversation FROM turns WHERE id = ?)",
                    (value.model, value.profile, turn),
                )

    def _stamp(self, connection: sqlite3.Connection, conversation: int, head: int | None = None) -> None:
        connection.execute(
            "UPDATE conversations SET changed_at = ?, head = coalesce(?, head) WHERE id = ?",
            (self._clock(), head, conversation),
        )


def _column(value: object) -> object:
    """A field of a turn that becomes known while it runs, as its column holds it."""
    if isinstance(value, Origin):
        return packed_origin(value)
    if isinstance(value, Mapping):
        return packed_json(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return packed_tokens([int(token) for token in value])
    return value
