"""A history of version 0.1 is migrated, and its turns are continued. version-0.1.md describes it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qwq_local.backend.api import ReplyRequest
from qwq_local.events import Event, FinishReason, Generated, Thinking
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.export import Format, exported
from qwq_local.history.records import AnswerPart, ThinkingPart, TokenRun, TurnState
from tests.command import qwq_here
from tests.queued_backend import QueuedBackend, planned, said, says, talking

OLD = Path(__file__).parent / "version-0.1.db"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return Path(shutil.copy(OLD, tmp_path / "data" / FILE))


@pytest.fixture
def archive(path: Path) -> Iterator[Archive]:
    with Archive.open(path) as archive:
        yield archive


def values(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.execute(sql))


def test_a_copy_is_made_and_its_path_reported(path: Path) -> None:
    with Archive.open(path) as archive:
        (notice,) = archive.notices
    copy = path.with_name(f"{FILE}.v2.bak")
    assert notice == f"the history is of version 3 now; {copy} is as it was before."
    for sql in ("PRAGMA user_version", "SELECT * FROM turns", "SELECT * FROM pieces"):
        assert values(copy, sql) == values(OLD, sql)
    with Archive.open(path) as again:
        assert again.notices == ()


def test_conversations_are_migrated_unchanged(archive: Archive) -> None:
    assert [(record.id, record.name, record.n_turns) for record in archive.conversations()] == [
        (9, "", 1),
        (8, "", 1),
        (7, "", 1),
        (6, "", 2),
        (5, "", 1),
        (4, "", 1),
        (3, "", 1),
        (2, "", 1),
        (1, "Counting", 2),
    ]
    assert {record.command for record in archive.conversations()} == {"chat"}
    assert archive.conversation(2).forked_from == 1
    assert [turn.number for turn in archive.every_turn(1)] == [1, 2, 2, 3]


def test_turns_are_migrated_with_all_texts_and_ids(archive: Archive) -> None:
    """All but the running one, which has its own test; the origins of version 0.1 have more fields."""
    with closing(sqlite3.connect(OLD)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute("SELECT * FROM turns WHERE state <> 'running'").fetchall()
    for row in rows:
        turn = archive.turn(row["id"])
        assert (turn.question, turn.content, turn.state) == (row["question"], row["content"], row["state"])
        assert (turn.thinking, turn.answer) == (row["thinking"], row["answer"])
        assert list(turn.steered) == json.loads(row["steered"])
        assert b"".join(token.to_bytes(4, "little") for token in turn.generated) == row["generated"]
        assert b"".join(token.to_bytes(4, "little") for token in turn.prompt) == row["prompt"]
        assert turn.plan == json.loads(row["plan"])
        assert (turn.thinking_s, turn.created_at) == (row["thinking_s"], row["created_at"])
        assert turn.origin is not None
        origin = json.loads(row["origin"])
        assert (turn.origin.identity, turn.origin.seed) == (origin["identity"], origin["seed"])
        assert turn.origin.is_continued == origin["is_continued"]
        assert {part.tokens.sampled for part in turn.parts} == {None}


@pytest.mark.parametrize(
    ("turn", "tokens"),
    [
        (1, (91, 37)),  # a reply that the model closed
        (6, (12,)),  # interrupted in its thinking
        (8, (59, 2)),  # steered, interrupted in its answer
        (9, (3, 2)),
        (12, (6, 3)),  # closed by the budget: two ids of the closing sentence are not counted
    ],
)
def test_ids_go_to_their_part(archive: Archive, turn: int, tokens: tuple[int, ...]) -> None:
    parts = archive.turn(turn).parts
    assert tuple(len(part.tokens.ids) for part in parts) == tokens
    assert [type(part) for part in parts] == [ThinkingPart, AnswerPart][: len(tokens)]


def test_the_search_finds_the_same_turns(archive: Archive, path: Path) -> None:
    assert [(hit.turn, hit.part) for hit in archive.search("量子纠缠")] == [(9, "question"), (9, "thinking")]
    assert {hit.turn for hit in archive.search("strawberry")} == {1, 5, 6, 7, 8}
    archive.pick_up()
    assert [hit.turn for hit in archive.search("One, two, three")] == [13]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'finds%'").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_turn_of_a_killed_process_is_lost_with_all_that_was_written(archive: Archive) -> None:
    (lost,) = archive.lost()
    assert (lost.id, lost.state, lost.thinking) == (13, TurnState.LOST, "One, two, three")
    assert lost.generated == (61, 62, 63, 64, 65)
    assert (lost.stats.thinking_tokens, lost.stats.answer_tokens) == (5, 0)


def test_migrated_turns_are_exported_and_forked(archive: Archive) -> None:
    copy = archive.fork(6, 2)
    originals = archive.path(6)
    assert [turn.parts for turn in archive.path(copy)] == [turn.parts for turn in originals]
    text = exported(Format.MARKDOWN, archive.conversation(6), originals)
    assert "两个粒子 共享一个状态。" in text
    assert "notes.txt" in text


def test_a_resumed_conversation_is_continued_and_again_in_the_same_chat(
    archive: Archive, tmp_path: Path
) -> None:
    """The second time from the records of both versions."""

    def interrupted(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        yield from planned(backend, question)
        yield from (Thinking(" go on"), Generated(8, (70, 71), 10, (True, True)))

    talk = talking(archive, tmp_path, resume=7)
    assert any("/continue goes on" in line for line in said(talk.chat.start()))
    talk.submit("/continue", interrupted)
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert (opening.generated, opening.steered) == (tuple(range(41, 49)), ("But count twice.",))
    turn = archive.turn(11)
    assert turn.thinking == "Half a thought.\n\nBut count twice.\n\nSo I go on"
    assert turn.state is TurnState.STOPPED
    assert turn.parts[0].tokens.sampled == (*[None] * 8, True, True)

    talk.submit("/continue", says("All of the thought.", "Done.", generated=(72, 73)))
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert (opening.generated, opening.prompt) == ((*range(41, 49), 70, 71), turn.prompt)
    turn = archive.turn(11)
    assert (turn.state, turn.answer, turn.steered) == (TurnState.DONE, "Done.", ("But count twice.",))


def test_a_migrated_conversation_is_continued_in_a_chat(archive: Archive, tmp_path: Path) -> None:
    talk = talking(archive, tmp_path)
    talk.submit("/resume 8")
    talk.submit("/continue", says("A long thought, closed.", "The first half, more.", generated=(74,)))
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert opening.generated == tuple(range(51, 60))
    turn = archive.turn(12)
    assert (turn.answer, turn.reason) == ("The first half, more.", FinishReason.STOP)
    assert turn.generated == (*range(51, 60), 74)


def test_a_lost_turn_is_offered_and_continued_by_another_process(archive: Archive, tmp_path: Path) -> None:
    talk = talking(archive, tmp_path)
    assert any("/continue goes on" in line for line in said(talk.chat.start()))
    talk.submit("/continue", says("One, two, three, four.", "Four."))
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert opening.generated == (61, 62, 63, 64, 65)
    assert archive.turn(13).answer == "Four."


def test_a_new_question_follows_migrated_turns(archive: Archive, tmp_path: Path) -> None:
    talk = talking(archive, tmp_path, resume=6)
    list(talk.chat.start())
    talk.submit("And in German?", says())
    assert [message.content for message in talk.backend.questions[-1].messages][-2:] == [
        "Two particles share a state.",
        "And in German?",
    ]
    assert [turn.number for turn in archive.path(6)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "lines"), [(("--resume", "3"), "/continue\n"), ((), "/resume 3\n/continue\n")]
)
def test_the_miniature_continues_a_migrated_turn_from_its_ids(
    tmp_path: Path, path: Path, flags: tuple[str, ...], lines: str
) -> None:
    """Greedy, so it ends in the answer that version 0.1 gave without an interruption."""
    greedy = ("-m", "miniature", "-s", "temperature=0", "--seed", "7")
    # The miniature's file may have another header now; its weights and tokens are the same.
    assert qwq_here(tmp_path, "chat", *greedy, stdin=b"Hello?\n").status == 0
    with Archive.open(path) as archive:
        (latest,) = archive.path(archive.conversations(1)[0].id)
        interrupted = archive.turn(6)
        assert latest.origin is not None
        assert interrupted.origin is not None
        identities = latest.origin.identity, interrupted.origin.identity
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE turns SET origin = replace(origin, ?, ?)", identities[::-1])

    ran = qwq_here(tmp_path, "chat", *greedy, *flags, stdin=lines.encode())

    with Archive.open(path) as archive:
        whole, continued = archive.turn(1), archive.turn(6)
    assert ran.status == 0
    assert continued.generated[:12] == interrupted.generated
    assert (continued.answer, continued.thinking) == (whole.answer, whole.thinking)
    assert whole.answer.strip() in ran.stdout
    assert (continued.state, continued.reason) == (TurnState.DONE, FinishReason.STOP)


def test_a_run_of_tokens_has_the_record_of_each() -> None:
    old, new = TokenRun((1, 2)), TokenRun((3,), (False,))
    assert old.followed_by(new) == TokenRun((1, 2, 3), (None, None, False))
    assert new.followed_by(old) == TokenRun((3, 1, 2), (False, None, None))
    assert old.followed_by(old).sampled is None
    assert old.followed_by(new).part(1) == TokenRun((2, 3), (None, False))
