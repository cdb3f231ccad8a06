"""A chat whose turns last until the user ends them: steered, stopped, killed, continued; and its history."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.command import ROOT, environment
from tests.terminal.chat_terminal import SIZES, Terminal, at_every_size, last_turn, rows
from tests.terminal.repl_terminal import ENTER, ESCAPE, NO_REFLOW, UP, ctrl

PROGRAM = (sys.executable, str(ROOT / "tests" / "terminal" / "held_chat.py"))
QUESTION = "How many steps?"


@contextmanager
def chatting(data: Path, *arguments: str, size: tuple[int, int] = SIZES[0]) -> Iterator[Terminal]:
    """A chat over the held backend, ready for input."""
    chat = Terminal([str(data), *arguments], environment(data, **NO_REFLOW), *size, program=PROGRAM)
    with chat:
        chat.wait_for(lambda: chat.input_rows == ["❯"] and bool(chat.status))
        yield chat


def on_disk(data: Path, part: str) -> str:
    """The thinking or answer of the running turn that is on disk: joined pieces of the journal."""
    entries = rows(data, "SELECT events FROM journal ORDER BY id")
    events = [json.loads(line) for (lines,) in entries for line in lines.splitlines()]
    return "".join(event["text"] for event in events if event["event"] == part)


def kill(chat: Terminal) -> None:
    """Kill the process before it can write anything."""
    chat.signal(signal.SIGKILL)
    chat.read_to_end()


@at_every_size
def test_a_thought_is_answered_now_steered_and_read(tmp_path: Path, size: tuple[int, int]) -> None:
    with chatting(tmp_path, size=size) as chat:
        chat.thinks(QUESTION)
        chat.type(ctrl("g"))
        chat.turn_is_over(1)
        assert re.search(r"▸ thought 1 · \d+s · \d+ tok · ended on request", chat.above)
        assert last_turn(tmp_path, "closed")[0] == "asked"

        chat.thinks(QUESTION)
        chat.type("kept" + ctrl("s"))
        chat.has_input("steer ❯")
        chat.type("Look again." + ENTER)
        chat.sees("▏you: Look again.")
        chat.has_input("❯ kept")
        chat.type(ctrl("u") + ctrl("s"))
        chat.has_input("steer ❯")
        chat.type(ESCAPE)
        chat.has_input("❯")
        chat.type(ctrl("g"))
        chat.turn_is_over(2)
        assert chat.above.count("▏you: Look again.") == 1
        chat.type(ctrl("t"))
        chat.reads("step 0.", "%")
        chat.type("/look" + ENTER)
        chat.wait_for(lambda: "1 of 1" in chat.status)
        assert "▏you: Look again." in chat.visible
        chat.type("q")
        chat.wait_for(lambda: not chat.screen.is_alternate and chat.is_done)
        chat.leaves()


def test_a_thought_is_stopped_and_continued_while_lines_wait(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.thinks(QUESTION)
        chat.type("/stats" + ENTER)
        chat.sees("⋯ waiting: /stats")
        chat.type(UP)
        chat.has_input("❯ /stats")
        assert "waiting" not in chat.visible
        chat.interrupt()
        chat.wait_for(lambda: chat.status.startswith("QwQ"))
        chat.has_input("❯ /stats")
        stopped, state, reason = last_turn(tmp_path, "thinking, state, reason")
        assert (state, reason) == ("stopped", "interrupted")
        assert stopped
        chat.type(ENTER)
        chat.wait_for(lambda: "ended: interrupted" in chat.said)

        chat.thinks("/continue")
        chat.type("/name zeros" + ENTER + ctrl("g"))
        chat.wait_for(lambda: chat.said.endswith("called 'zeros' now."))
        thinking, answer = last_turn(tmp_path, "thinking, answer")
        assert thinking.startswith(stopped)
        assert answer
        assert rows(tmp_path, "SELECT count(*) FROM turns") == [(1,)]


def test_a_thought_that_was_killed_is_offered_and_continued(tmp_path: Path) -> None:
    with chatting(tmp_path) as chat:
        chat.thinks(QUESTION)
        chat.wait_for(lambda: len(on_disk(tmp_path, "thinking")) > 50)
        kill(chat)
    lost = on_disk(tmp_path, "thinking")
    assert lost.startswith("step 0. step 1. ")
    assert last_turn(tmp_path, "state") == ("running",)

    with chatting(tmp_path) as chat:
        chat.wait_for(lambda: "/continue goes on, /resume 1 opens it." in chat.above)
        assert f"thought 1 of '{QUESTION}' was cut off" in chat.above.replace("''", "'")
        chat.does("/resume 1", "thought 1 did not come to its end: /continue goes on.")
        chat.thinks("/continue")
        chat.type(ctrl("g"))
        chat.wait_for(lambda: chat.is_done and "ended on request" in chat.said)
        thinking, answer, state = last_turn(tmp_path, "thinking, answer, state")
        assert thinking.startswith(lost.rpartition("step")[0])
        assert answer
        assert state == "done"
        assert rows(tmp_path, "SELECT (SELECT count(*) FROM journal), (SELECT count(*) FROM turns)") == [
            (0, 1)
        ]


def test_an_answer_that_was_killed_is_continued(tmp_path: Path) -> None:
    with chatting(tmp_path, "--part", "answer") as chat:
        chat.type(QUESTION + ENTER)
        chat.wait_for(lambda: len(on_disk(tmp_path, "answer")) > 50)
        kill(chat)
    lost = on_disk(tmp_path, "answer")

    with chatting(tmp_path, "--part", "answer", "--resume", "1") as chat:
        chat.wait_for(lambda: "did not come to its end: /continue goes on." in chat.above)
        chat.type("/continue" + ENTER)
        chat.wait_for(lambda: chat.status.startswith("answering"))
        chat.interrupt()
        chat.wait_for(lambda: chat.is_done)
        (answer,) = last_turn(tmp_path, "answer")
        assert answer.startswith(lost.rpartition("step")[0])
        assert last_turn(tmp_path, "reason") == ("interrupted",)


def test_two_chats_share_a_history(tmp_path: Path) -> None:
    with chatting(tmp_path) as one, chatting(tmp_path) as two:
        one.thinks(QUESTION)
        two.thinks(QUESTION)
        two.type(ctrl("g"))
        two.turn_is_over(1)
        two.does("/name second", "called 'second' now.")
        assert one.status.startswith("thinking")
        assert "cut off" not in two.above
        two.does("/resume 1", "conversation 1,")
        two.does("/continue", "✗ thought 1 is being answered by another process.")
        one.type(ctrl("g"))
        one.turn_is_over(1)
        one.does("/history", "second · 1 turn", "this one")
        assert rows(tmp_path, "SELECT count(*) FROM conversations") == [(2,)]
