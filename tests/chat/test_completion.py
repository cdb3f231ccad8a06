"""Completions at the cursor: commands, files, keys and values, names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwq_local.chat.completion import MAX_ITEMS
from qwq_local.chat.events import Completion
from qwq_local.history.archive import Archive
from tests.queued_backend import Talking, says, talking


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def talk(archive: Archive, tmp_path: Path) -> Talking:
    for name in ("notes.txt", "my file.txt", 'o"dd.txt', "src/main.py", ".hidden"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    return talking(
        archive,
        tmp_path,
        model_names=lambda: ["miniature", "QwQ-32B-Q4_K_M"],
        profile_names=lambda: ["chat", "math"],
    )


def applied(talk: Talking, before: str) -> list[str]:
    """The lines that the completions make of the text before the cursor."""
    return [before[: len(before) - each.replaces] + each.text for each in talk.chat.complete(before)]


@pytest.mark.parametrize(
    ("before", "lines"),
    [
        ("/con", ["/continue", "/context"]),
        ("/RE", ["/regen", "/retry-from", "/resume"]),
        ("/file no", ["/file notes.txt"]),
        ("/file my", ['/file "my file.txt"']),
        ('/file "my', ['/file "my file.txt"']),
        ("/file my\\ f", ['/file "my file.txt"']),
        ("/file o", ["/file 'o\"dd.txt'"]),
        ("/file notes.txt s", ["/file notes.txt src/"]),
        ("/file src/", ["/file src/main.py"]),
        ("/file .h", ["/file .hidden"]),
        ("/file d", ["/file drop"]),
        ("/save s", ["/save src/"]),
        ("/set kv_t", ["/set kv_type"]),
        ("/set kv_type q8", ["/set kv_type q8_0"]),
        (
            "/set flash_attention ",
            [f"/set flash_attention {value}" for value in ("on", "off", "auto", "default")],
        ),
        ("/set yarn a", ["/set yarn auto"]),
        ("/set nonsense ", []),
        ("/regen --s", ["/regen --seed"]),
        ("/regen --seed 3 loop", ["/regen --seed 3 loop_guard="]),
        ("/regen loop_guard=o", ["/regen loop_guard=on", "/regen loop_guard=off"]),
        ("/model qw", ["/model QwQ-32B-Q4_K_M"]),
        ("/profile ", ["/profile chat", "/profile math"]),
        ("/think t", ["/think tail"]),
        ("/copy c", ["/copy code"]),
        ("/help con", ["/help continue", "/help context"]),
        ("/unknown x", []),
        ("see @no", ["see @notes.txt"]),
        ("see (@src/m", ["see (@src/main.py"]),
        ('see @"my f', ['see @"my file.txt"']),
        ("first line\n@no", ["first line\n@notes.txt"]),
        ("mail me@no", []),
        ("see @notes.txt and", []),
        ("an ordinary question", []),
        ("", []),
    ],
)
def test_completions_complete_the_line(talk: Talking, before: str, lines: list[str]) -> None:
    assert applied(talk, before) == lines


def test_hidden_files_are_not_offered(talk: Talking) -> None:
    assert "/file .hidden" not in applied(talk, "/file ")
    assert "/file notes.txt" in applied(talk, "/file ")


def test_conversations_are_offered_by_name_and_by_number(talk: Talking) -> None:
    talk.submit("One?", says())
    talk.submit("/name alpha beta")
    talk.submit("/clear")
    talk.submit("Two?", says())
    assert applied(talk, "/resume al") == ["/resume alpha beta"]
    assert talk.chat.complete("/resume 2") == [Completion("2", 1, "Two?")]


def test_every_command_is_offered_with_its_meaning(talk: Talking) -> None:
    offered = talk.chat.complete("/")
    assert {"/think", "/file", "/exit", "/quit"} <= {each.text for each in offered}
    assert all(each.meaning for each in offered)


def test_a_large_folder_offers_a_limited_number(talk: Talking, tmp_path: Path) -> None:
    for number in range(MAX_ITEMS + 50):
        (tmp_path / "src" / f"{number}.txt").touch()
    assert len(talk.chat.complete("/file src/")) == MAX_ITEMS


def test_a_missing_folder_offers_nothing(talk: Talking) -> None:
    assert talk.chat.complete("/file nowhere/x") == []
    assert talk.chat.complete("/file ~no-such-user/x") == []
    assert talk.chat.complete("/file a\0b") == []
