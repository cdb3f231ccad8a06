"""The real `qwq chat` on a pseudo-terminal, with the miniature."""

from __future__ import annotations

import re
from pathlib import Path

from tests.terminal.chat_terminal import (
    CERTAIN,
    COUNT,
    COUNTED,
    at_every_size,
    chatting,
    last_turn,
    rows,
    starting,
)
from tests.terminal.repl_terminal import ENTER, TAB, ctrl

STRAWBERRY = [f"{n:02} {letter} " for n, letter in enumerate("strawberry", 1)]


def in_order(text: str, *parts: str) -> bool:
    """Whether the text has each part once, in this order."""
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
        # The status line is drawn last.
        chat.wait_for(lambda: chat.screen.is_alternate and "line 10/10 · 100%" in chat.status)
        assert chat.visible.startswith("I count r in")
        assert "raspberry." in chat.visible
        assert "05 b - 1" in chat.visible
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


def test_a_question_in_chinese_with_emoji(cache: Path, tmp_path: Path) -> None:
    question = "你好，世界！🦊🍓 草莓里有几个字母？🙂 tell me"
    with chatting(cache, tmp_path, *CERTAIN, size=(20, 24)) as chat:
        chat.asks(question, "I am a tiny test model")
        assert "".join(question.split()) in "".join(chat.above.split())
        assert last_turn(tmp_path, "question") == (question,)
        chat.does("/history 几个字母", "this one · question 1:")
        chat.type("🦊你好" + "\x7f")
        chat.wait_for(lambda: "".join("".join(chat.input_rows).split()) == "❯🦊你")


def test_without_colour_no_colour_is_written(cache: Path, tmp_path: Path) -> None:
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


def test_only_answers_go_to_a_pipe(cache: Path, tmp_path: Path) -> None:
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


def test_a_conversation_is_resumed_where_it_was(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *CERTAIN) as chat:
        chat.asks(COUNT)
        chat.does("/name berries", "called 'berries' now.")
        assert chat.leave() == 0
    for flags in (("--continue",), ("--resume", "berries"), ("--resume", "1")):
        with chatting(cache, tmp_path, *CERTAIN, *flags) as chat:
            chat.wait_for(lambda: "conversation 1, 'berries': 1 turn." in chat.above)
            assert chat.above.startswith(f"❯ {COUNT} ▸ thought 1 · ")
            assert chat.above.count(COUNTED) == 1
            if flags == ("--resume", "1"):
                chat.asks("and in raspberry?", r"""There are 3 r's in "raspberry": \boxed{3}""")
    assert rows(tmp_path, "SELECT conversation, number FROM turns") == [(1, 1), (1, 2)]


def test_commands_keys_profiles_and_files_are_completed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a_file.txt").write_text("x")
    with chatting(cache, tmp_path, *CERTAIN) as chat:
        chat.type("/re")
        chat.wait_for(lambda: all(name in chat.visible for name in ("/regen ", "/retry-from ", "/resume ")))
        chat.type(ctrl("c"))
        for start, offer, whole in (
            ("/sta", "/stats", "/stats"),
            ("/set thinking_b", "thinking_budget", "/set thinking_budget"),
            ("/profile ma", "math", "/profile math"),
        ):
            chat.has_input("❯")
            chat.type(start)
            chat.sees(f"\n {offer}")
            chat.type(TAB)
            chat.has_typed(whole)
            chat.type(ctrl("c"))
        chat.has_input("❯")
        chat.type(f"see @{tmp_path}/a_f" + TAB)
        chat.has_typed(f"see @{tmp_path}/a_file.txt")
