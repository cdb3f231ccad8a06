"""`qwq history` with real processes, files and terminals."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from qwq_local.events import (
    CloseReason,
    Finished,
    FinishReason,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.records import TurnStart
from tests.command import Terminal, environment, qwq
from tests.history.programs import started

NOTHING = "No conversation is kept yet; `qwq chat` and `qwq ask` keep every one.\n"
EVIL = "evil\x1b[2J\x1b]0;title\x07name\u202e"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A cache with three conversations in the data folder beside it."""
    with Archive.open(tmp_path / "data" / FILE) as archive:
        for name, question in (("Adding", "What is 1+1?"), ("", "什么是量子纠缠?"), ("", EVIL)):
            conversation = archive.begin("QwQ-32B Q4_K_M", "math", "", name)
            recorder = archive.begin_turn(TurnStart(conversation, None, question, question, ("notes.txt",)))
            recorder.feed(Thinking("Two fingers.\n\n"))
            recorder.feed(Steered("Be quick."))
            recorder.feed(ThinkingClosed(CloseReason.MODEL, 2431, 72.4))
            stats = TurnStats(thinking_tokens=2431)
            thinking = "Two fingers.\n\nBe quick.\n\nTwo."
            recorder.feed(Finished(FinishReason.STOP, stats, thinking, f"It is **2**, {question}"))
    return tmp_path


def test_reading_an_empty_history_creates_nothing(tmp_path: Path) -> None:
    listed = qwq(tmp_path, "history")
    assert (listed.status, listed.stdout) == (0, NOTHING)
    assert qwq(tmp_path, "history", "--json").stdout == "[]\n"
    assert qwq(tmp_path, "history", "show", "1").status == 1
    assert not (tmp_path / "data").exists()


def test_the_list_has_all_conversations_the_last_first(place: Path) -> None:
    lines = qwq(place, "history").stdout.splitlines()
    assert lines[0].split() == ["ID", "CONVERSATION", "CHANGED", "MODEL", "TURNS"]
    assert [line.split()[0] for line in lines[1:]] == ["3", "2", "1"]
    assert "什么是量子纠缠?" in lines[2]
    assert "Adding" in lines[3]
    assert lines[3].endswith("QwQ-32B Q4_K_M  1")
    limited = qwq(place, "history", "--limit", "2")
    assert len(limited.stdout.splitlines()) == 3
    assert limited.stderr == "1 older one is not listed: --limit 0 lists all.\n"
    rows = json.loads(qwq(place, "history", "--json").stdout)
    assert [(row["id"], row["name"], row["n_turns"]) for row in rows] == [
        (3, "", 1),
        (2, "", 1),
        (1, "Adding", 1),
    ]


def test_a_search_shows_where_the_words_are(place: Path) -> None:
    found = qwq(place, "history", "search", "量子纠缠")
    assert found.status == 0
    first, *places = found.stdout.splitlines()
    assert first.startswith("2  什么是量子纠缠? · 20")
    assert places == ["    question 1: 什么是量子纠缠?", "    answer 1: It is **2**, 什么是量子纠缠?"]
    several = qwq(place, "history", "search", "fingers", "QUICK", "--json").stdout
    assert [(hit["turn"], hit["part"]) for hit in json.loads(several)] == [
        (3, "thinking"),
        (2, "thinking"),
        (1, "thinking"),
    ]
    nothing = qwq(place, "history", "search", "--", '-" OR *')
    assert (nothing.status, nothing.stderr) == (1, "qwq: no conversation has '-\" OR *'.\n")


def test_a_conversation_is_shown_with_its_thoughts_folded_or_not(place: Path) -> None:
    folded = qwq(place, "history", "show", "add").stdout
    assert folded.startswith("# Adding\nconversation 1 · QwQ-32B Q4_K_M · math · 20")
    question, thought = "> What is 1+1?\n> (with notes.txt)", "▸ thought 1 · 1m12s · 2,431 tok"
    assert folded.endswith(f"\n\n{question}\n\n{thought}\n\nIt is **2**, What is 1+1?\n")
    unfolded = qwq(place, "history", "show", "1", "--thinking").stdout
    assert (
        "▾ thought 1 · 1m12s · 2,431 tok\n│ Two fingers.\n│\n│ [yours] Be quick.\n│\n│ Two.\n\nIt is"
        in unfolded
    )
    unknown = qwq(place, "history", "show", "Subtracting")
    assert (unknown.status, unknown.stdout) == (1, "")
    assert "'Subtracting'; `qwq history` lists them." in unknown.stderr


def test_an_undone_turn_is_found_and_marked(place: Path) -> None:
    with Archive.open(place / "data" / FILE) as archive:
        archive.set_head(1, None)
    assert "fingers" not in qwq(place, "history", "show", "Adding", "--thinking").stdout
    every = qwq(place, "history", "show", "Adding", "--thinking", "--all").stdout
    assert "│ Two fingers." in every
    assert every.endswith("\n\n(undone or answered anew)\n")
    found = qwq(place, "history", "search", "1+1")
    assert "    question 1 (undone or answered anew): What is 1+1?\n" in found.stdout
    assert "show ID --all" in found.stderr


@pytest.mark.parametrize(
    "command", [(), ("search", "evil"), ("show", "3"), ("show", "3", "--thinking"), ("export", "3", "-")]
)
def test_control_sequences_in_a_conversation_do_not_reach_the_terminal(
    place: Path, command: tuple[str, ...]
) -> None:
    with Terminal(("history", *command), environment(place)) as terminal:
        assert terminal.read_to_end() == 0
        assert "evilname" in terminal.text.replace(" ", "")
    for sequence in (b"\x1b[2J", b"\x1b]0", b"\x07", "\u202e".encode()):
        assert sequence not in terminal.raw


def test_the_list_fits_a_narrow_window(place: Path) -> None:
    with Terminal(("history",), environment(place), columns=60) as terminal:
        assert terminal.read_to_end() == 0
        lines = terminal.text.splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines] == ["ID", "3", "2", "1"]


def test_a_conversation_is_exported_to_a_new_file(place: Path) -> None:
    for name, start in (("a.md", "# Adding\n"), ("a.json", "{\n"), ("a.html", "<!DOCTYPE html>")):
        file = place / name
        done = qwq(place, "history", "export", "Adding", str(file))
        assert (done.status, done.stdout, done.stderr) == (0, "", f"{file}: 1 turn.\n")
        assert file.read_text().startswith(start)
    file.write_text("mine")
    refused = qwq(place, "history", "export", "Adding", str(file))
    assert (refused.status, file.read_text()) == (1, "mine")
    assert refused.stderr.endswith("is there already; nothing was written. --force replaces it.\n")
    assert qwq(place, "history", "export", "Adding", str(file), "--force").status == 0
    assert file.read_text() != "mine"
    assert qwq(place, "history", "export", "Adding", "a.txt").status == 2
    piped = qwq(place, "history", "export", "3", "-").stdout
    assert EVIL in piped


def test_removing_shows_what_it_removes_and_asks(place: Path) -> None:
    with Terminal(("history", "rm", "Adding", "2"), environment(place)) as terminal:
        asked = terminal.read_until(lambda text: "[y/N]" in text)
        assert "1  Adding · 20" in asked
        assert "2  什么是量子纠缠? · 20" in asked
        terminal.type("n\n")
        assert terminal.read_to_end() == 0
        assert "Nothing was removed." in terminal.text
    with Terminal(("history", "rm", "Adding", "2", "1"), environment(place)) as terminal:
        assert "Remove these 2 conversations for good?" in terminal.read_until(lambda text: "[y/N]" in text)
        terminal.type("y\n")
        assert terminal.read_to_end() == 0
        assert "2 conversations are removed." in terminal.text
    assert [row["id"] for row in json.loads(qwq(place, "history", "--json").stdout)] == [3]


def test_removing_without_a_terminal_needs_yes(place: Path) -> None:
    refused = qwq(place, "history", "rm", "1", stdin=b"y\n")
    assert (refused.status, refused.stdout) == (2, "")
    assert "add --yes" in refused.stderr
    assert qwq(place, "history", "rm", "1", "99", "--yes").status == 1
    assert len(json.loads(qwq(place, "history", "--json").stdout)) == 3
    done = qwq(place, "history", "rm", "1", "--yes")
    assert (done.status, done.stdout) == (0, "1 conversation is removed.\n")
    assert len(json.loads(qwq(place, "history", "--json").stdout)) == 2


def test_a_turn_that_was_killed_is_listed_shown_and_found(tmp_path: Path) -> None:
    path = tmp_path / "data" / FILE
    with started("think", path, 50) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with Archive.open(path) as archive:
            while not archive.turn(1).thinking.endswith("Thought 49: 我们讨论量子纠缠.\n"):
                pass
    assert "thinking 1: Thought 0: 我们讨论量子纠缠." in qwq(tmp_path, "history", "search", "我们讨论").stdout
    shown = qwq(tmp_path, "history", "show", "1").stdout
    assert shown.endswith("50 tok\n\n(lost before its end: the program died)\n")


def test_notices_about_the_history_go_to_stderr(place: Path) -> None:
    path = place / "data" / FILE
    path.write_bytes(b"no database at all")
    listed = qwq(place, "history")
    assert listed.stdout == NOTHING
    assert "history.sqlite3 was damaged" in listed.stderr
    [kept] = path.parent.glob("history.damaged-*.sqlite3")
    assert kept.read_bytes() == b"no database at all"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9")
    newer = qwq(place, "history")
    assert (newer.status, newer.stdout) == (1, "")
    assert "of version 9" in newer.stderr
