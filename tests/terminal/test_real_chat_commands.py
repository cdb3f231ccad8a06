"""Every command of `qwq chat`, typed into the real process in a narrow window, where every line wraps.

After each command the whole screen is checked, and its effect is read from files.
"""

from __future__ import annotations

import base64
import inspect
import json
import re
import sys
from pathlib import Path

from qwq_local.chat.commands.registry import COMMANDS
from tests.terminal.chat_terminal import (
    CERTAIN,
    COUNT,
    COUNTED,
    Terminal,
    chatting,
    last_turn,
    rows,
)
from tests.terminal.repl_terminal import ENTER, ctrl

NARROW = (20, 24)
TREE = "How many e's are in the word tree?"
TREES = r"""There are 2 e's in "tree": \boxed{2}"""
RASPBERRY = r"""There are 3 r's in "raspberry": \boxed{3}"""


def turns_now(data: Path) -> list[str]:
    """The questions of the last changed conversation, from the first turn to its head."""
    query = """WITH RECURSIVE way(id, parent, question, number) AS (
        SELECT id, parent, question, number FROM turns
        WHERE id = (SELECT head FROM conversations ORDER BY changed_at DESC, id DESC LIMIT 1)
        UNION ALL SELECT t.id, t.parent, t.question, t.number FROM turns t JOIN way ON t.id = way.parent)
        SELECT question FROM way ORDER BY number"""
    return [question for (question,) in rows(data, query)]


def strings(value: object) -> list[str]:
    """Every text in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


def copied(chat: Terminal) -> str:
    """The last text that was sent to the clipboard."""
    return base64.b64decode(re.findall(rb"\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", chat.raw)[-1]).decode()


def test_turns_are_regenerated_undone_and_edited(cache: Path, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text(f'#!/bin/sh\ngrep -q raspberry "$1" && echo "{TREE}" > "$1"\n')
    editor.chmod(0o755)
    with chatting(cache, tmp_path, *CERTAIN, size=NARROW, EDITOR=str(editor), VISUAL="") as chat:
        chat.does("/continue", "✗ nothing was asked in this conversation yet")
        chat.asks(COUNT, COUNTED)
        chat.asks("/regen --seed 77", COUNTED)
        assert json.loads(last_turn(tmp_path, "origin")[0])["seed"] == 77
        chat.does("/stats", "thought 1 · seed 77 · ended: stop")
        chat.asks("and in raspberry?", RASPBERRY)
        assert turns_now(tmp_path) == [COUNT, "and in raspberry?"]
        chat.does(
            "/continue", "✗ thought 2 came to its end, there is nothing to continue: /regen asks again."
        )

        chat.asks("/edit", TREES)
        assert turns_now(tmp_path) == [COUNT, TREE]
        chat.does("/undo", "thought 2 is undone; the history keeps it.")
        assert turns_now(tmp_path) == [COUNT]
        chat.asks("and in raspberry?", RASPBERRY)
        chat.asks(f"/edit {TREE}", TREES)
        chat.asks("/retry-from 1 --seed 5", COUNTED)
        assert turns_now(tmp_path) == [COUNT]
        chat.does("/retry-from 9", "✗ /retry-from 9: give the number of a thought, 1 to 1.")
        assert rows(tmp_path, "SELECT count(*) FROM turns") == [(7,)]


def test_conversations_are_named_left_searched_and_resumed(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *CERTAIN, size=NARROW) as chat:
        chat.asks(COUNT)
        chat.does("/name berries", "this conversation is called 'berries' now.")
        chat.asks("and in raspberry?")
        chat.does("/fork 1", "conversation 2 goes on after thought 1; the one before stays as it is.")
        chat.does("/clear", "a new conversation begins with the next question. /resume 2 comes back")
        chat.wait_for(lambda: "ctx 0" in chat.status)
        chat.asks(TREE, TREES)

        said = chat.does("/think grep count", "this one · thought 1: I count e in tree.")
        assert "1 berries · thought 2: I count r in raspberry." in said
        assert "/resume ID opens a conversation" in said
        chat.does("/think grep nothing at all", "nothing has 'nothing at all'.")
        chat.does("/history raspberry", "1 berries · question 2: and in raspberry?")

        chat.does("/resume berries", "conversation 1, 'berries': 2 turns.", COUNT, RASPBERRY)
        chat.type("/think 2" + ENTER)
        chat.reads("I count r in raspberry.")
        chat.type("q")
        chat.is_back()
        chat.does("/resume", "berries · 2 turns · this one", "1 turn")
        chat.does("/resume missing", "✗")
        chat.does("/drop 1", "left out of what the model sees while this chat runs: thought 1")
        chat.does("/drop none", "the model sees the whole conversation again.")
        chat.does("/new", "a new conversation begins with the next question. /resume 1 comes back to")
        assert rows(tmp_path, "SELECT count(*) FROM conversations") == [(3,)]
        chat.leaves("/quit")


def test_files_go_with_a_question(cache: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    key.write_text("The pass key is 51423. Remember it.\n")
    binary = tmp_path / "picture.png"
    binary.write_bytes(b"\x89PNG\0\0\1")
    with chatting(cache, tmp_path, *CERTAIN, size=NARROW) as chat:
        said = chat.does(f"/file {key}", "1 file waits for the next question:", "and the plan stays")
        tokens = int(re.findall(r"(\d+) tokens in front of it", said)[0])
        chat.wait_for(lambda: "+1" in chat.status)
        said = chat.does("/context", "· free")
        assert int(re.findall(r"▓ files (\d+)", said)[0]) == tokens
        chat.does("/file drop", "taken back: ", "no file waits any more.")
        chat.wait_for(lambda: "attached" not in chat.status)
        assert "▓ files 0" in chat.does("/context", "· free")

        chat.does(f"/file {binary}", f"✗ {binary} is not text: byte 4 is zero.")
        chat.does(f"/file {tmp_path}/nowhere.txt", "✗", "nowhere.txt")
        chat.asks(f"What is the pass key? @{key}", f"{tokens} tokens", r"\boxed{51423}")
        content, files = last_turn(tmp_path, "content, files")
        assert "The pass key is 51423. Remember it." in content
        assert json.loads(files) == [str(key)]
        chat.leaves("/bye")


def test_files_of_the_command_line_wait_for_the_first_question(cache: Path, tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    key.write_text("The pass key is 51423. Remember it.\n")
    with chatting(cache, tmp_path, *CERTAIN, "-f", str(key)) as chat:
        chat.wait_for(lambda: "1 file waits for the next question" in chat.above)
        chat.asks("What is the pass key?", r"\boxed{51423}")
        chat.wait_for(lambda: "attached" not in chat.status)


def test_settings_are_checked_and_apply_from_the_next_question(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *CERTAIN, size=NARROW) as chat:
        chat.does("/plan", "thinking 600", "YaRN off: it fits the native window", "free")
        chat.does("/set temprature 1", '✗ there is no key "temprature". Did you mean temperature?')
        chat.does("/set temperature hot", "✗", 'temperature is "hot", allowed: a number from 0 to 5.')
        chat.does("/set thinking_budget 3", "thinking_budget 3 · set here")
        chat.does("/set", "thinking_budget 3 (profile:")
        chat.asks(COUNT, "the thinking was ended at its budget of 3 tokens: /set thinking_budget N,")
        chat.does("/set thinking_budget default", "thinking_budget")
        chat.does("/seed 99", "seed 99 · set here")
        chat.does("/system You are brief.", "the system prompt has 12 tokens.")
        chat.asks("/regen --seed 98", COUNTED)
        assert json.loads(last_turn(tmp_path, "origin")[0])["seed"] == 98
        chat.asks(COUNT)
        assert json.loads(last_turn(tmp_path, "origin")[0])["seed"] == 99
        assert re.search(r"█ system +12", chat.does("/context", "· free"))
        chat.does("/system none", "there is no system prompt any more.")

        chat.does("/profile nope", '✗ there is no task profile "nope". There are chat,')
        chat.does("/profile code", "profile code: ", "still set: ", "system none")
        chat.does("/model miniatur", "✗ no model 'miniatur' on this machine;")
        chat.does("/model miniature:Q4_0", "QwQ miniature Q4_0 answers from now on;")
        chat.asks(TREE)
        assert chat.status.startswith("QwQ ·")
        chat.does("/model miniature", "QwQ miniature Q8_0 answers from now on;")
        chat.asks(TREE, TREES)
        assert chat.status.startswith("QwQ ·")


def test_conversations_are_copied_and_saved(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *CERTAIN, size=NARROW) as chat:
        chat.does("/copy", "✗ there is no thought in this conversation yet.")
        chat.asks(COUNT)
        thinking, answer = last_turn(tmp_path, "thinking, answer")
        chat.does("/copy", f"copied answer 1 ({len(answer):,} characters) through the terminal")
        assert copied(chat) == answer == COUNTED
        chat.does("/copy thought", f"copied thought 1 ({len(thinking):,} characters)")
        assert copied(chat) == thinking
        chat.does("/copy code", "✗ answer 1 has no code block.")
        chat.type(ctrl("t"))
        chat.reads("10 y - 3")
        chat.type("/copy" + ctrl("c") + "c")  # the first is cancelled: only the last key copies
        chat.sees("copied the page")
        assert copied(chat) == thinking
        chat.type("q")
        chat.is_back()

        for ending in ("md", "json", "html"):
            chat.does(f"/save {tmp_path}/talk.{ending}", f"saved 1 turn to {tmp_path}/talk.{ending}")
        for text in ((tmp_path / "talk.md").read_text(), (tmp_path / "talk.html").read_text()):
            assert "strawberry" in text
            assert "10 y - 3" in text
            assert r"\boxed{3}" in text
        assert answer in strings(json.loads((tmp_path / "talk.json").read_text()))
        chat.does(f"/save {tmp_path}/talk.doc", "✗", "end the name in .md, .json or .html")
        (tmp_path / "own.md").write_text("mine")
        chat.does(f"/save {tmp_path}/own.md", "✗", "is there already")
        assert (tmp_path / "own.md").read_text() == "mine"


def test_help_and_unknown_commands(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *CERTAIN, size=NARROW) as chat:
        said = chat.does("/help", "@PATH in a question")
        assert {command.name for command in COMMANDS} == set(re.findall(r"(?:^| )/([a-z-]+)", said))
        for name in ("think", "save"):
            chat.does(f"/help {name}", f"/{name}")
        chat.does("/cler", "✗ there is no command /cler. Did you mean /clear?")
        chat.type(" /cler is what?" + ENTER)
        chat.turn_is_over(1)
        assert last_turn(tmp_path, "question") == ("/cler is what?",)
        chat.leaves("/exit")


def test_every_command_is_entered() -> None:
    """The tests of this module enter each command, by each of its names."""
    module = sys.modules[__name__]
    tests = [each for name, each in vars(module).items() if name.startswith("test_")]
    source = "".join(map(inspect.getsource, tests))
    entered = set(re.findall(r"""(?:does|asks|leaves|type)\(f?"/([a-z-]+)""", source))
    assert {name for command in COMMANDS for name in (command.name, *command.aliases)} - entered == set()
