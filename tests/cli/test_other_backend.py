"""`qwq` over a backend that only answers: ask, ask --each, chat on a terminal and history run unchanged."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, Ran, environment
from tests.terminal.repl_terminal import ENTER, NO_REFLOW, Chat, ctrl

PROGRAM = (sys.executable, str(ROOT / "tests" / "cli" / "queued_qwq.py"))
MODEL = ("--model", "queued")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("other")


def qwq(cache: Path, *arguments: str, stdin: str = "") -> Ran:
    ran = subprocess.run(
        [*PROGRAM, *arguments],
        input=stdin,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_ask_writes_the_answer_alone_to_stdout(cache: Path) -> None:
    ran = qwq(cache, "ask", *MODEL, "--think", "show", "--stats", "Is it so?")
    assert (ran.status, ran.stdout) == (0, "Heard: Is it so?\n")
    thinking, *_, stats = ran.stderr.strip().splitlines()
    assert thinking == "Asked: Is it so?"
    assert stats.startswith("prompt 0 tok")


def test_ask_each_answers_every_line(cache: Path) -> None:
    lines = '{"id": 1, "question": "One?"}\n{"id": 2, "question": "Two?"}\n'
    ran = qwq(cache, "ask", *MODEL, "--each", stdin=lines)
    assert (ran.status, ran.stderr) == (0, "")
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(each["id"], each["answer"]) for each in answers] == [(1, "Heard: One?"), (2, "Heard: Two?")]


@pytest.mark.parametrize("flag", ["--dry-run", "--split"])
def test_a_flag_that_it_cannot_serve_is_refused(cache: Path, flag: str) -> None:
    ran = qwq(cache, "ask", *MODEL, flag, "Why?")
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"qwq: {flag}: ")


def test_questions_are_in_the_history_and_continued(tmp_path: Path) -> None:
    assert qwq(tmp_path, "ask", *MODEL, "First?").status == 0
    assert qwq(tmp_path, "ask", *MODEL, "-c", "Second?").stdout == "Heard: Second?\n"
    assert "Second?" in qwq(tmp_path, "history", "show", "1").stdout
    assert "First?" in qwq(tmp_path, "history").stdout


def test_chat_on_a_terminal_shows_only_what_the_backend_can_do(tmp_path: Path) -> None:
    variables = environment(tmp_path, **NO_REFLOW)
    chat = Chat(["chat", *MODEL], variables, 100, 30, program=PROGRAM)
    with chat:
        chat.wait_for(lambda: chat.input_rows == ["❯"] and chat.status.startswith("queued"))
        assert chat.status == "queued · /help"
        chat.type("Is it so?" + ENTER)
        chat.sees("Heard: Is it so?")
        chat.wait_for(lambda: chat.status.startswith("queued · Is it so?"))
        assert "ctx" not in chat.status
        chat.type("/help" + ENTER)
        chat.sees("leave the oldest N turns out")
        for absent in ("/context", "/plan", "/set ", "/profile", "/continue"):
            assert absent not in chat.text
        chat.type("wait for it" + ENTER)
        chat.wait_for(lambda: chat.status.startswith("thinking"))
        assert not re.search(r"ctx|/\d", chat.status)
        chat.type(ctrl("c"))
        chat.sees("■ stopped")
        assert "/continue" not in chat.text
        chat.wait_for(lambda: chat.input_rows == ["❯"])
        chat.type("And after?" + ENTER)
        chat.sees("Heard: And after?")
        chat.wait_for(lambda: chat.input_rows == ["❯"])
        assert chat.leave() == 0
    shown = qwq(tmp_path, "history", "show", "1").stdout
    assert "Heard: Is it so?" in shown
    assert "Heard: And after?" in shown
