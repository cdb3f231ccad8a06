"""`qwq chat` in pipes, as scripts use it: real processes, the miniature, a history of their own."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
from pathlib import Path

import pytest

from qwq_local.history.archive import FILE, Archive
from tests.command import QWQ, TIMEOUT_S, Ran, environment, qwq, qwq_here

SEEDED = ("chat", "--model", "miniature", "--seed", "1", "--set", "temperature=0")
COUNT = "How many r's are in the word strawberry?"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


def chat(cache: Path, typed: str, *flags: str) -> Ran:
    return qwq_here(cache, *SEEDED, *flags, stdin=typed.encode())


def test_each_line_is_answered_on_stdout_and_a_second_turn_knows_the_first(cache: Path) -> None:
    ran = chat(cache, f"{COUNT}\nand in raspberry?\n", "--private")
    assert ran.status == 0, ran.stderr
    first, second = (line for line in ran.stdout.splitlines() if line)
    assert r"\boxed{3}" in first
    assert "raspberry" in second


def test_an_empty_input_asks_nothing(cache: Path) -> None:
    assert chat(cache, "", "--private") == Ran(0, "", "")


def test_a_line_that_fails_sets_the_exit_status(cache: Path) -> None:
    ran = chat(cache, "/cler\n", "--private")
    assert (ran.status, ran.stdout) == (1, "")
    assert "/clear" in ran.stderr


def test_a_conversation_is_kept_and_continued(tmp_path: Path) -> None:
    assert chat(tmp_path, f"/name berries\n{COUNT}\n").status == 0
    ran = chat(tmp_path, "and in raspberry?\n", "--resume", "berries")
    assert ran.status == 0, ran.stderr
    assert "raspberry" in ran.stdout
    assert r"\boxed{3}" in ran.stderr  # earlier turns are shown, but not as answers
    listed = qwq(tmp_path, "history", "--json")
    [conversation] = json.loads(listed.stdout)
    assert (conversation["name"], conversation["n_turns"]) == ("berries", 2)


def test_private_writes_nothing(tmp_path: Path) -> None:
    chat(tmp_path, f"{COUNT}\n")
    [database] = tmp_path.rglob("history.sqlite3")
    before = sqlite3.connect(database).execute("SELECT count(*) FROM turns").fetchone()
    assert chat(tmp_path, f"{COUNT}\n", "--private").status == 0
    assert sqlite3.connect(database).execute("SELECT count(*) FROM turns").fetchone() == before == (1,)
    assert (database.stat().st_mode & 0o777, database.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_continue_without_a_past_says_so(tmp_path: Path) -> None:
    ran = chat(tmp_path, "", "--continue")
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr == "qwq: there is no conversation yet to go on with. Leave out --continue.\n"


def test_a_file_goes_with_the_first_question(tmp_path: Path) -> None:
    (tmp_path / "key file.txt").write_text("The pass key is 51423. Remember it.\n")
    ran = chat(tmp_path, "What is the pass key?\n", "--private", "-f", str(tmp_path / "key file.txt"))
    assert ran.status == 0, ran.stderr
    assert "key file.txt" in ran.stderr
    assert "51423" in ran.stdout


def test_dry_run_prints_the_plan_and_loads_nothing(tmp_path: Path) -> None:
    ran = chat(tmp_path, "", "--private", "--dry-run")
    assert ran.status == 0, ran.stderr
    assert re.search(r"context [\d,]+", ran.stdout)


def test_a_reader_that_goes_away_ends_it_quietly_and_the_turn_is_kept(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with os.fdopen(ours, "wb") as stdout:
        ran = subprocess.run(
            [*QWQ, *SEEDED],
            input=f"{COUNT}\n".encode(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment(tmp_path),
            timeout=TIMEOUT_S,
        )
    assert (ran.returncode, ran.stderr) == (141, b"")
    with Archive.open(tmp_path / "data" / FILE) as archive:
        assert [turn.question for turn in archive.path(1)] == [COUNT]


def test_bytes_that_are_not_text_are_refused_with_their_position(tmp_path: Path) -> None:
    ran = qwq_here(tmp_path, *SEEDED, "--private", stdin=b"\xff\n")
    assert ran.status == 2
    assert ran.stderr == "qwq: a line of standard input is not UTF-8 text: byte 0 is 0xff.\n"
