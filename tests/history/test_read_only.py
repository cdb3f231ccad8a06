"""A history on a disk or in a folder without write permission is read, and nothing changes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qwq_local.history.archive import FILE, Archive
from qwq_local.history.records import TurnStart
from qwq_local.history.schema import VERSION
from tests.history.programs import started, thoughts, turn_events


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def filled(path: Path) -> Archive:
    archive = Archive.open(path)
    recorder = archive.begin_turn(TurnStart(archive.begin("miniature", "default", ""), None, "Why?", "Why?"))
    for event in turn_events(2):
        recorder.feed(event)
    return archive


def locked(folder: Path) -> dict[str, bytes]:
    """Remove write permission from a folder; returns its contents."""
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read(path: Path) -> list[object]:
    """What another user reads: the thoughts, where `量子纠缠` was found, and the error of a removal."""
    with started("read", path, "量子纠缠") as process:
        output, errors = process.communicate(timeout=60)
    assert errors == ""
    answers = json.loads(output)
    assert isinstance(answers, list)
    return answers


def test_a_closed_history_is_read_and_searched_but_not_changed(folder: Path) -> None:
    filled(folder / FILE).close()
    before = locked(folder)
    turns, found, refused = read(folder / FILE)
    assert turns == ["".join(thoughts(2))]
    assert found == ["thinking"]
    assert "may not be written" in str(refused)
    assert locked(folder) == before


def test_the_log_of_another_process_is_read_too(folder: Path) -> None:
    with filled(folder / FILE):
        assert (folder / f"{FILE}-wal").stat().st_size
        locked(folder)
        turns, found, _ = read(folder / FILE)
    assert (turns, found) == (["".join(thoughts(2))], ["thinking"])


def test_an_unreadable_log_is_named_and_never_ignored(folder: Path) -> None:
    with filled(folder / FILE):
        copy = folder / "copy"
        copy.mkdir()
        for end in ("", "-wal"):
            shutil.copy(folder / f"{FILE}{end}", copy)
    before = locked(copy)
    [refused] = read(copy / FILE)
    assert f"in {FILE}-wal" in str(refused)
    assert "QWQ_DATA_DIR" in str(refused)
    assert locked(copy) == before


def test_a_history_of_an_older_version_is_refused_with_both_versions(folder: Path) -> None:
    filled(folder / FILE).close()
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA user_version = 1")
    before = locked(folder)
    [refused] = read(folder / FILE)
    assert f"of version 1, this qwq reads version {VERSION}" in str(refused)
    assert locked(folder) == before
