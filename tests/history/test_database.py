"""A history of another version, damaged or without permissions: nothing in it is ever lost."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, closing
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.errors import HistoryError
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnStart, TurnState
from qwq_local.history.schema import APPLICATION_ID, MIGRATIONS, VERSION, Schema
from qwq_local.history.turns import Owner
from tests.history.programs import started, turn_events

# Version 1, with a conversation of two turns.
VERSION_1 = """
CREATE TABLE conversations (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL DEFAULT '',
    created_at REAL NOT NULL, changed_at REAL NOT NULL, model TEXT NOT NULL, profile TEXT NOT NULL,
    system TEXT NOT NULL, head INTEGER REFERENCES turns (id) DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE turns (id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    parent INTEGER REFERENCES turns (id), root INTEGER NOT NULL DEFAULT 0, number INTEGER NOT NULL,
    question TEXT NOT NULL, content TEXT NOT NULL, files TEXT NOT NULL DEFAULT '[]',
    thinking TEXT NOT NULL DEFAULT '', answer TEXT NOT NULL DEFAULT '', steered TEXT NOT NULL DEFAULT '[]',
    prompt BLOB NOT NULL DEFAULT x'', generated BLOB NOT NULL DEFAULT x'', state TEXT NOT NULL,
    owner TEXT NOT NULL DEFAULT '', reason TEXT, closed TEXT, origin TEXT NOT NULL DEFAULT '',
    plan TEXT NOT NULL DEFAULT '{}', stats TEXT NOT NULL DEFAULT '{}', thinking_s REAL NOT NULL DEFAULT 0,
    created_at REAL NOT NULL);
CREATE INDEX turns_of_conversation ON turns (conversation);
CREATE INDEX turns_of_parent ON turns (parent);
CREATE INDEX turns_of_an_owner ON turns (id) WHERE owner <> '';
CREATE TABLE pieces (id INTEGER PRIMARY KEY, turn INTEGER NOT NULL REFERENCES turns (id) ON DELETE CASCADE,
    thinking TEXT NOT NULL, answer TEXT NOT NULL, steered TEXT NOT NULL, start INTEGER, tokens BLOB NOT NULL,
    thinking_tokens INTEGER NOT NULL, thinking_s REAL NOT NULL);
CREATE INDEX pieces_of_turn ON pieces (turn);
INSERT INTO conversations VALUES (1, 'Physics', 100, 200, 'QwQ-32B', 'default', 'Be brief.', 2);
INSERT INTO turns (id, conversation, root, number, question, content, thinking, answer, generated, state,
    created_at) VALUES (1, 1, 1, 1, '什么是量子纠缠?', '什么是量子纠缠?', 'Think.', 'Spooky.',
    x'0100000000010000', 'done', 100);
INSERT INTO turns (id, conversation, parent, root, number, question, content, state, owner, created_at)
    VALUES (2, 1, 1, 1, 2, 'And then?', 'And then?', 'running', 'dead', 200);
INSERT INTO pieces VALUES (1, 2, 'Half a thou', '', '[]', 0, x'07000000', 1, 0.5);
PRAGMA user_version = 1;
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.sqlite3"


def filled(path: Path, n_turns: int = 3) -> int:
    """Make a history with a conversation; returns its id."""
    with Archive.open(path) as archive:
        conversation = archive.begin("miniature", "default", "", "Kept")
        parent = None
        for number in range(n_turns):
            recorder = archive.begin_turn(TurnStart(conversation, parent, f"Q{number}?", f"Q{number}?"))
            for event in turn_events(200):
                recorder.feed(event)
            parent = recorder.turn_id
    return conversation


def version_1(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1 + f"PRAGMA application_id = {APPLICATION_ID};")


def values(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.execute(sql))


def test_a_new_history_is_for_its_owner_only(path: Path) -> None:
    with Archive.open(path) as archive:
        archive.begin("miniature", "default", "")
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert modes == dict.fromkeys(
            (path.name, *(path.name + end for end in ("-wal", "-shm", ".lock"))), 0o600
        )
        assert values(path, "PRAGMA journal_mode") == [("wal",)]
    assert values(path, "PRAGMA user_version") == [(VERSION,)]


def test_an_older_version_is_migrated_after_a_copy(path: Path) -> None:
    version_1(path)
    with Archive.open(path) as archive:
        copy = path.with_name("history.sqlite3.v1.bak")
        assert archive.notices == (f"the history is of version {VERSION} now; {copy} is as it was before.",)
        record = archive.find("Physics")
        assert (record.n_turns, record.first_question, record.forked_from) == (2, "什么是量子纠缠?", None)
        assert [turn.generated for turn in archive.path(1)] == [(1, 256), (7,)]
        assert [(turn.state, turn.thinking) for turn in archive.lost()] == [(TurnState.LOST, "Half a thou")]
        assert [hit.turn for hit in archive.search("量子纠缠")] == [1]
        assert [hit.turn for hit in archive.search("half a thou")] == [2]
        assert archive.path(archive.fork(1, 1))[0].answer == "Spooky."
    with Archive.open(path) as again:
        assert again.notices == ()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert values(copy, "PRAGMA user_version") == [(1,)]
    assert values(copy, "SELECT answer FROM turns") == [("Spooky.",), ("",)]
    assert values(copy, "SELECT count(*) FROM pieces") == [(1,)]


def test_a_failed_migration_leaves_the_old_version_unchanged(path: Path) -> None:
    version_1(path)
    broken = replace(Schema(), migrations={1: (*MIGRATIONS[1], "INSERT INTO nowhere VALUES (1)")})
    with pytest.raises(HistoryError, match="nowhere"):
        Archive.open(path, broken)
    assert values(path, "PRAGMA user_version") == [(1,)]
    assert "forked_from" not in [row[1] for row in values(path, "PRAGMA table_info(conversations)")]
    with Archive.open(path) as archive:
        assert archive.find("Physics").n_turns == 2


def test_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 4")
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=r"of version 4, this qwq knows up to 3\. Install a newer qwq"):
        Archive.open(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*damaged*"))


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE bookmarks (url); INSERT INTO bookmarks VALUES ('x')")
    before = path.read_bytes()
    with pytest.raises(HistoryError, match="of another program"):
        Archive.open(path)
    assert path.read_bytes() == before


def noise(path: Path) -> None:
    path.write_bytes(random.Random(7).randbytes(50_000))


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 : len(content) // 2] = random.Random(7).randbytes(len(content) // 2 - 4096)
    path.write_bytes(content)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_the_header(path: Path) -> None:
    os.truncate(path, 100)


def emptied_beside_a_log(path: Path) -> None:
    path.with_name(path.name + "-wal").write_bytes(b"what was not folded in yet")
    os.truncate(path, 0)


def without_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE journal")


@pytest.mark.parametrize(
    "damage", [noise, overwritten, truncated, cut_to_the_header, emptied_beside_a_log, without_a_table]
)
def test_a_damaged_history_is_set_aside_with_a_notice(path: Path, damage: Callable[[Path], None]) -> None:
    filled(path)
    damage(path)
    before = path.read_bytes()
    log = path.with_name(path.name + "-wal")
    logged = log.read_bytes() if log.exists() else None
    with Archive.open(path) as archive:
        [notice] = archive.notices
        [kept] = path.parent.glob("history.damaged-????????-??????.sqlite3")
        assert f"kept as {kept}" in notice
        assert "a new history begins" in notice
        assert archive.conversations() == []
        assert kept.read_bytes() == before
        if logged is not None:
            assert kept.with_name(kept.name + "-wal").read_bytes() == logged
    assert filled(path) == 1
    with Archive.open(path) as archive:
        assert archive.notices == ()


def test_a_second_damage_in_the_same_second_gets_a_name_of_its_own(path: Path) -> None:
    path.parent.mkdir()
    for _ in range(3):
        noise(path)
        Archive.open(path).close()
    assert len(list(path.parent.glob("history.damaged-*.sqlite3"))) == 3


def test_any_damage_is_either_harmless_or_found(path: Path, tmp_path: Path) -> None:
    """Bytes are overwritten at random: a history that opens can be read, one that does not is kept."""
    filled(path)
    sound = path.read_bytes()
    chance = random.Random(7)
    n_found = 0
    for number in range(60):
        copy = tmp_path / str(number) / path.name
        copy.parent.mkdir()
        content = bytearray(sound)
        at = chance.choice([chance.randrange(len(sound)), chance.randrange(100), chance.randrange(100, 4096)])
        content[at : at + 16] = chance.randbytes(16)
        copy.write_bytes(content)
        try:
            archive = Archive.open(copy)
        except HistoryError:  # its header is that of another program or of a newer version
            assert copy.read_bytes() == content
            continue
        with archive:
            archive.search("量子纠缠")
            for record in archive.conversations():
                archive.path(record.id)
        if archive.notices:
            n_found += 1
            [kept] = copy.parent.glob("*damaged*.sqlite3")
            assert kept.read_bytes() == content
    assert n_found > 5


def test_a_history_is_checked_fully_after_damage_was_found(path: Path) -> None:
    filled(path)
    content = bytearray(path.read_bytes())
    page = content.rindex(b"Thought 100:") // 4096 * 4096
    content[page : page + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    with Archive.open(path) as archive:
        assert archive.notices == ()
        with pytest.raises(HistoryError, match="damaged"):
            archive.path(1)
    with Archive.open(path) as archive:
        assert "was damaged" in archive.notices[0]
    assert next(path.parent.glob("history.damaged-*.sqlite3")).read_bytes() == content


def test_a_path_that_is_not_a_file_is_an_error_and_stays(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(HistoryError, match="QWQ_DATA_DIR"):
        Archive.open(path)
    assert path.is_dir()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("folder_mode", [0o555, 0o777])
def test_a_history_without_write_permission_is_an_error_and_stays(
    open_folder: Path, folder_mode: int
) -> None:
    path = open_folder / "history.sqlite3"
    filled(path)
    path.chmod(0o444)
    path.with_name(path.name + ".lock").unlink()
    open_folder.chmod(folder_mode)
    before = path.read_bytes()
    with started("hold", path) as process:
        output, _ = process.communicate(timeout=60)
    assert "QWQ_DATA_DIR" in output
    assert (path.read_bytes(), list(open_folder.glob("*damaged*"))) == (before, [])


def test_a_history_being_written_is_not_taken_for_damaged(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE conversations SET name = 'half done'")
        with Archive.open(path) as archive:
            assert archive.notices == ()
            assert archive.conversations()[0].name == "Kept"


def test_processes_that_open_a_new_history_at_once_share_it(path: Path) -> None:
    archives = [Archive.open(path) for _ in range(4)]
    for number, archive in enumerate(archives):
        archive.begin("miniature", "default", "", f"number {number}")
    assert [len(archive.conversations()) for archive in archives] == [4] * 4
    for archive in archives:
        archive.close()
        archive.close()


def test_a_private_history_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    with chdir(tmp_path), Archive.private() as archive:
        conversation = archive.begin("miniature", "default", "")
        recorder = archive.begin_turn(TurnStart(conversation, None, "Why?", "Why?"))
        for event in turn_events(25):
            recorder.feed(event)
        assert [hit.part for hit in archive.search("量子纠缠")] == ["thinking"]
        assert archive.lost() == []
    assert list(tmp_path.iterdir()) == []


def test_an_owner_is_alive_only_while_it_holds_its_lock(tmp_path: Path) -> None:
    living, other = Owner(tmp_path), Owner(tmp_path)
    living.hold()
    assert other.is_alive(living.token)
    left_behind = "0" * 32
    (tmp_path / f"{left_behind}.lock").touch()
    for dead in (left_behind, "f" * 32, "../history", "", "dead"):
        assert not other.is_alive(dead)
    living.release()
    assert not other.is_alive(living.token)
    other.hold()
    assert [each.stem for each in tmp_path.iterdir()] == [other.token]


def test_a_history_that_cannot_be_locked_says_why_and_what_works_without(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    path.with_name(path.name + ".lock").mkdir()
    with pytest.raises(HistoryError, match=r"locked: Is a directory\. .* `qwq chat --private` does"):
        Archive.open(path)
