"""`qwq chat` as a person sees it: the real process on a pseudo-terminal, the miniature thinking in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.terminal.chat_terminal import (
    CERTAIN,
    COUNT,
    COUNTED,
    LONG,
    Terminal,
    at_every_size,
    bare,
    chatting,
    last_turn,
    rows,
    starting,
)
from tests.terminal.repl_terminal import ENTER, ESCAPE, UP, ctrl

STRAWBERRY = [f"{n:02} {letter} " for n, letter in enumerate("strawberry", 1)]


def in_order(text: str, *parts: str) -> bool:
    """Whether each part stands in the text once, and one after the other."""
    places = [text.find(part) for part in parts]
    return [text.count(part) for part in parts] == [1] * len(parts) and places == sorted(places)


@at_every_size
def test_a_conversation(cache: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    with chatting(cache, tmp_path, *CERTAIN, size=size) as chat:
        said = chat.asks(COUNT)
        assert said.startswith(COUNT)
        assert in_order(re.sub(r" \d+s ", " 0s ", said), "▸ thought 1 · 0s · 91 tok", COUNTED)
        assert "01 s" not in said
        assert chat.asks("and in raspberry?").endswith(r"""There are 3 r's in "raspberry": \boxed{3}""")

        before = chat.visible
        chat.type(ctrl("t"))
        chat.sees("05 b - 1")
        assert chat.screen.is_alternate
        assert chat.visible.startswith("I count r in")
        assert "raspberry." in chat.visible
        assert "line 10/10 · 100%" in chat.status
        chat.type("q")
        chat.wait_for(lambda: not chat.screen.is_alternate and chat.visible == before)

        chat.type("/think 1" + ENTER)
        chat.sees("10 y - 3")
        assert "strawberry." in chat.visible
        chat.type("/+" + ENTER)
        chat.wait_for(lambda: "1 of 3" in chat.status)
        chat.type("N")
        chat.wait_for(lambda: "3 of 3" in chat.status)
        chat.type(ctrl("t"))
        chat.wait_for(lambda: not chat.screen.is_alternate and chat.input_rows == ["❯"])

        chat.type("/think full" + ENTER)
        chat.wait_for(lambda: "full" in chat.said and chat.input_rows == ["❯"])
        said = chat.asks("/retry-from 1")
        trace, fold, answer = re.sub(r" \d+s ", " 0s ", said).partition("▸ thought 1 · 0s · 91 tok")
        assert in_order(trace, "I count r in strawberry.", *STRAWBERRY)
        assert fold
        assert not any(row in answer for row in STRAWBERRY)
        assert answer.strip() == COUNTED

        chat.does("/think tail")
        assert len(chat.status) < size[0]
        chat.leaves()
        asked = re.findall(r"❯ (\S+)", chat.above + " ❯ /exit")
        assert asked[:2] == ["How", "and"]
        assert rows(tmp_path, "SELECT number, state FROM turns") == [(1, "done"), (2, "done"), (1, "done")]


@at_every_size
def test_taking_part_in_a_thought(cache: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    with chatting(cache, tmp_path, *LONG, size=size) as chat:
        chat.thinks(COUNT)
        chat.type(ctrl("g"))
        chat.turn_is_over(1)
        assert re.search(r"▸ thought 1 · \d+s · \d+ tok · ended on request", chat.above)
        closed, answer = last_turn(tmp_path, "closed, answer")
        assert closed == "asked"
        assert bare(answer.strip().split("\n")[0])[:10] in bare(chat.said)

        chat.thinks(COUNT)
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
        thinking, steered = last_turn(tmp_path, "thinking, steered")
        assert steered == '["Look again."]'
        assert thinking.count("\n\nLook again.\n\n") == 1
        chat.type(ctrl("t"))
        chat.wait_for(lambda: chat.screen.is_alternate and "I count" in chat.visible)
        chat.type("/look" + ENTER)
        chat.wait_for(lambda: "1 of 1" in chat.status)
        assert "Look again." in chat.visible
        chat.type("q")
        chat.wait_for(lambda: not chat.screen.is_alternate and chat.is_done)
        chat.leaves()


@at_every_size
def test_a_thought_is_stopped_and_gone_on_with_while_lines_wait(
    cache: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    with chatting(cache, tmp_path, *LONG, size=size) as chat:
        chat.thinks(COUNT)
        chat.type("/stats" + ENTER)
        chat.sees("⋯ waiting: /stats")
        chat.type(UP)
        chat.has_input("❯ /stats")
        assert "waiting" not in chat.visible
        chat.interrupt()
        chat.wait_for(lambda: chat.status.startswith("QwQ"))
        assert chat.input_rows == ["❯ /stats"]
        stopped, state, reason = last_turn(tmp_path, "thinking, state, reason")
        assert (state, reason) == ("stopped", "interrupted")
        assert stopped
        chat.type(ENTER)
        chat.wait_for(lambda: "ended: interrupted" in chat.said)

        chat.thinks("/continue")
        chat.type("/name zeros" + ENTER + ctrl("g"))
        chat.wait_for(lambda: chat.said.endswith("called 'zeros' now."))
        thinking, answer, state = last_turn(tmp_path, "thinking, answer, state")
        assert thinking.startswith(stopped)
        assert thinking.startswith("I count r in")
        assert len(thinking) > len(stopped)
        assert answer
        assert rows(tmp_path, "SELECT count(*) FROM turns") == [(1,)]


def test_a_stopped_answer_is_gone_on_with(cache: Path, tmp_path: Path) -> None:
    flags = (*LONG, "--set", "thinking_budget=30", "--set", "max_tokens=3000")
    with chatting(cache, tmp_path, *flags) as chat:
        for n_turns in (1, 2):
            chat.type((COUNT if n_turns == 1 else "/continue") + ENTER)
            chat.wait_for(lambda: re.match(r"answering .*? · \d", chat.status) is not None)
            chat.interrupt()
            chat.wait_for(lambda: chat.is_done)
            if n_turns == 1:
                stopped, reason = last_turn(tmp_path, "answer, reason")
                assert reason == "interrupted"
                assert stopped
        (answer,) = last_turn(tmp_path, "answer")
        assert answer.startswith(stopped)
        assert len(answer) > len(stopped)


def is_caught(chat: Terminal, data: Path, question: str) -> bool:
    """Ask and stop at once; whether the thought, which lasts a fraction of a second, was stopped in time."""
    n_thoughts = chat.above.count("▸")
    chat.type(question + ENTER)
    chat.wait_for(lambda: chat.status.startswith("thinking") or chat.above.count("▸") > n_thoughts)
    chat.interrupt()
    chat.wait_for(lambda: chat.status.startswith(("QwQ", "Ctrl-C again")))
    return last_turn(data, "state, answer") == ("stopped", "")


def test_what_was_stopped_ends_as_if_it_had_not_been(cache: Path, tmp_path: Path) -> None:
    question = "What is 48213 + 39178?"
    with chatting(cache, tmp_path, *CERTAIN) as chat:
        chat.asks(question, r"\boxed{87391}")
        whole = last_turn(tmp_path, "thinking, answer, generated")
        for _ in range(50):
            chat.does("/undo", "is undone")
            if is_caught(chat, tmp_path, question):
                break
        (stopped,) = last_turn(tmp_path, "thinking")
        assert whole[0].startswith(stopped)
        assert 0 < len(stopped) < len(whole[0])
        chat.does("/continue", r"\boxed{87391}")
        chat.wait_for(lambda: chat.is_done)
        assert last_turn(tmp_path, "thinking, answer, generated") == whole


@at_every_size
def test_the_views_of_a_thought_that_runs(cache: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    with chatting(cache, tmp_path, *LONG, "--think", "off", size=size) as chat:
        chat.thinks(COUNT)
        assert "strawberry." not in chat.visible
        chat.type(ctrl("t"))
        chat.wait_for(lambda: b"thinking: excerpt" in chat.raw and "0000000000" in chat.visible)
        chat.type(ctrl("t"))
        chat.wait_for(lambda: b"thinking: tail" in chat.raw and "00000000000000000000" in chat.visible)
        assert "strawberry." not in chat.visible  # a third of the window, the last lines
        chat.type(ctrl("t"))
        chat.wait_for(lambda: b"thinking: full" in chat.raw and "I count r in strawberry." in chat.above)
        chat.type(ctrl("g"))
        chat.turn_is_over(1)
        (thinking,) = last_turn(tmp_path, "thinking")
        trace = chat.text.partition("▸ thought 1")[0]
        assert in_order(bare(trace), *map(bare, thinking.split("\n")[:6]))
        assert bare(thinking) in bare(trace)
        chat.wait_for(lambda: chat.is_whole)


def test_the_window_changes_while_it_thinks(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *LONG) as chat:
        chat.thinks(COUNT)
        for size in ((20, 24), (200, 50), (34, 16), (120, 30), (80, 24)):
            chat.resize(*size)
            seen = len(chat.raw)
            chat.wait_for(
                lambda seen=seen: len(chat.raw) > seen and chat.status.startswith("thinking")  # type: ignore[misc]
            )
            assert chat.input_rows == ["❯"]
        chat.type(ctrl("g"))
        chat.turn_is_over(1)
        assert chat.above.count("❯ How many") == 1
        assert chat.above.count("▾") == 0
        assert chat.does("/name sea", "called 'sea' now.")


@pytest.mark.parametrize("size", [(80, 24), (20, 24)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_question_in_chinese_with_emoji(cache: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    question = "你好，世界！🦊🍓 草莓里有几个字母？🙂 tell me"
    with chatting(cache, tmp_path, *CERTAIN, size=size) as chat:
        chat.asks(question, "I am a tiny test model")
        assert "".join(question.split()) in "".join(chat.above.split())
        assert last_turn(tmp_path, "question") == (question,)
        chat.does("/history 几个字母", "this one · question 1:")
        chat.type("🦊你好" + "\x7f")
        chat.wait_for(lambda: "".join("".join(chat.input_rows).split()) == "❯🦊你")


def test_without_colour_nothing_is_coloured(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *CERTAIN, NO_COLOR="1") as chat:
        chat.asks(COUNT)
        chat.does("/nothing", "error: there is no command /nothing.")
        chat.type(ctrl("t"))
        chat.sees("10 y - 3")
        chat.type("q")
        chat.wait_for(lambda: not chat.screen.is_alternate and chat.is_done)
        parts = b";".join(re.findall(rb"\x1b\[([\d;]*)m", chat.raw))
        attributes = {int(each) for each in parts.split(b";") if each}
        assert attributes <= {0, 1, 7}  # bold and reverse are no colours


def test_a_terminal_that_cannot_draw_has_the_plain_chat(cache: Path, tmp_path: Path) -> None:
    with starting(cache, tmp_path, *CERTAIN, TERM="dumb") as chat:
        chat.sees(">>>")
        chat.type(COUNT + "\n")
        chat.wait_for(lambda: COUNTED in chat.visible and chat.visible.count(">>>") == 2)
        chat.type("/exit\n")
        assert chat.read_to_end() == 0
        assert b"\x1b" not in chat.raw


def test_answers_go_to_a_pipe_alone(cache: Path, tmp_path: Path) -> None:
    into = tmp_path / "answers"
    with (
        into.open("wb") as out,
        starting(cache, tmp_path, *CERTAIN, stdout=out.fileno()) as chat,
    ):
        chat.sees(">>>")
        chat.type(COUNT + "\n")
        chat.wait_for(lambda: chat.visible.count(">>>") == 2)
        chat.type(ctrl("d"))
        assert chat.read_to_end() == 0
    assert into.read_text().split() == COUNTED.split()
