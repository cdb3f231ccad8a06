"""The file of entered lines: private, shared, bounded, tolerant of damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwq_local.terminal.repl.input_line import MAX_ENTRIES, MAX_ENTRY_BYTES, HistoryFile
from tests.command import ROOT


@pytest.fixture
def file(tmp_path: Path) -> HistoryFile:
    return HistoryFile(tmp_path / "chat_history")


def test_entries_come_back_in_their_order(file: HistoryFile) -> None:
    entries = [["plain"], ["two\nlines"], ["a ", "pasted\n\x1b[31m", " b"], ["中文 \ud800 \u2028"]]
    for parts in entries:
        file.append(parts)
    assert file.load() == entries


def test_the_file_is_private_even_if_it_was_not(file: HistoryFile, tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text("")
    path.chmod(0o644)
    file.append(["x"])
    assert path.stat().st_mode & 0o777 == 0o600


def test_lines_that_are_not_entries_are_skipped(file: HistoryFile, tmp_path: Path) -> None:
    file.append(["before"])
    with (tmp_path / "chat_history").open("ab") as raw:
        raw.write(b'\xff\xfe\n{"a": 1}\n[1]\n[]\n' + b"[" * 5000 + b"\n\n\0\0\n" + b'["cut off by a cra')
    file.append(["after"])
    assert file.load() == [["before"], ["after"]]


def test_an_entry_that_is_too_long_is_not_kept(file: HistoryFile) -> None:
    longest = "x" * (MAX_ENTRY_BYTES - len(json.dumps(["", "", ""])) - 1)
    for text in (longest, longest + "x"):
        file.append(["", text, ""])
    file.append(["short"])
    assert file.load() == [["", longest, ""], ["short"]]


def test_the_newest_entries_stay_when_there_are_too_many(file: HistoryFile, tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text("".join(json.dumps([f"entry {n}"]) + "\n" for n in range(MAX_ENTRIES + 1000)))
    newest = [[f"entry {n}"] for n in range(1000, MAX_ENTRIES + 1000)]
    assert file.load() == newest
    assert len(path.read_text().splitlines()) == MAX_ENTRIES
    assert file.load() == newest
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["chat_history"]


def test_processes_that_write_at_once_lose_nothing(file: HistoryFile, tmp_path: Path) -> None:
    """Also while the file is rewritten because it has grown too long."""
    path = tmp_path / "chat_history"
    path.write_text("".join(json.dumps([f"old {n}"]) + "\n" for n in range(MAX_ENTRIES + 550)))
    program = (
        "import sys, pathlib\nfrom qwq_local.terminal.repl.input_line import HistoryFile\n"
        f"file = HistoryFile(pathlib.Path({str(path)!r}))\n"
        "file.load()\nfor n in range(100): file.append([f'{sys.argv[1]} {n}'])\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(number)], cwd=ROOT) for number in range(4)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    entries = [parts[0] for parts in file.load()]
    for number in range(4):
        own = [entry for entry in entries if entry.startswith(f"{number} ")]
        assert own == [f"{number} {n}" for n in range(100)]


def test_a_broken_file_loses_only_the_history(tmp_path: Path) -> None:
    (tmp_path / "chat_history").mkdir()
    file = HistoryFile(tmp_path / "chat_history")
    file.append(["x"])
    assert file.load() == []
