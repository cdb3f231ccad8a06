"""What lasts of a `qwq chat` on a pseudo-terminal: killed in mid-thought, taken up again, two at once."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.terminal.chat_terminal import CERTAIN, COUNT, COUNTED, LONG, Terminal, chatting, last_turn, rows
from tests.terminal.repl_terminal import ENTER, ctrl

PIECES = "SELECT coalesce(group_concat({}, ''), '') FROM (SELECT {} FROM pieces ORDER BY id)"


def kept(data: Path, part: str) -> str:
    """What of the running turn's thinking or answer is on disk."""
    if not (data / "history.sqlite3").exists():
        return ""
    ((text,),) = rows(data, PIECES.format(part, part))
    assert isinstance(text, str)
    return text


def n_kept_tokens(data: Path) -> int:
    """How many tokens of the running turn are on disk; each is a character at least."""
    ((n_bytes,),) = rows(data, "SELECT sum(length(tokens)) FROM pieces")
    assert isinstance(n_bytes, int)
    return n_bytes // 4


def n_tokens(chat: Terminal) -> int:
    """The tokens that the status line counts."""
    found = re.search(r" · ([\d,]+)(?:/[\d,]+)?(?: tok)? · ", chat.status)
    return int(found[1].replace(",", "")) if found else 0


def test_a_thought_that_was_killed_is_offered_and_ended(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *LONG) as chat:
        chat.thinks(COUNT)
        chat.wait_for(lambda: len(kept(tmp_path, "thinking")) > 50)
        chat.signal(signal.SIGKILL)
        chat.read_to_end()
    lost, n_kept = kept(tmp_path, "thinking"), n_kept_tokens(tmp_path)
    assert lost.startswith("I count r in strawberry.")
    assert n_kept > 20
    assert last_turn(tmp_path, "state") == ("running",)

    with chatting(cache, tmp_path, *LONG) as chat:
        chat.wait_for(lambda: "/continue goes on, /resume 1 opens it." in chat.above)
        assert f"thought 1 of '{COUNT}' was cut off" in chat.above.replace('"', "'").replace("''", "'")
        chat.does("/resume 1", "thought 1 did not come to its end: /continue goes on.")
        chat.thinks("/continue")
        chat.wait_for(lambda: n_tokens(chat) > len(lost))  # past what it had thought
        chat.type(ctrl("g"))
        chat.turn_is_over(2)
        thinking, answer, state = last_turn(tmp_path, "thinking, answer, state")
        assert thinking[:n_kept] == lost[:n_kept]
        assert answer
        assert state in ("done", "stopped")
        assert rows(tmp_path, "SELECT (SELECT count(*) FROM pieces), (SELECT count(*) FROM turns)") == [
            (0, 1)
        ]
        assert chat.leave() == 0

    with chatting(cache, tmp_path, *CERTAIN) as chat:
        chat.asks("and in raspberry?")
        assert "cut off" not in chat.above


def test_an_answer_that_was_killed_is_taken_up_by_continue(cache: Path, tmp_path: Path) -> None:
    flags = (*LONG, "--set", "thinking_budget=30")
    with chatting(cache, tmp_path, *flags, "--set", "max_tokens=3000") as chat:
        chat.type(COUNT + ENTER)
        chat.wait_for(lambda: len(kept(tmp_path, "answer")) > 200)
        chat.signal(signal.SIGKILL)
        chat.read_to_end()
    lost = kept(tmp_path, "answer")
    n_kept = n_kept_tokens(tmp_path) - len(kept(tmp_path, "thinking"))
    assert n_kept > 20

    with chatting(cache, tmp_path, *flags, "--set", "max_tokens=3000", "--continue") as chat:
        chat.wait_for(lambda: "did not come to its end: /continue goes on." in chat.above)
        chat.type("/continue" + ENTER)
        chat.wait_for(lambda: chat.status.startswith("answering") and n_tokens(chat) > len(lost))
        chat.interrupt()
        chat.wait_for(lambda: chat.is_done)
        (answer,) = last_turn(tmp_path, "answer")
        assert answer[:n_kept] == lost[:n_kept]


@pytest.mark.parametrize("flags", [("--continue",), ("--resume", "berries"), ("--resume", "1")], ids=" ".join)
def test_a_conversation_is_taken_up_where_it_was(cache: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    with chatting(cache, tmp_path, *CERTAIN) as chat:
        chat.asks(COUNT)
        chat.does("/name berries", "called 'berries' now.")
        assert chat.leave() == 0
    with chatting(cache, tmp_path, *CERTAIN, *flags) as chat:
        chat.wait_for(lambda: "conversation 1, 'berries': 1 turn." in chat.above)
        assert chat.above.startswith(f"❯ {COUNT} ▸ thought 1 · ")
        assert chat.above.count(COUNTED) == 1
        chat.asks("and in raspberry?", r"""There are 3 r's in "raspberry": \boxed{3}""")
        assert rows(tmp_path, "SELECT conversation, number FROM turns") == [(1, 1), (1, 2)]


def test_two_chats_share_a_history(cache: Path, tmp_path: Path) -> None:
    with chatting(cache, tmp_path, *LONG) as one, chatting(cache, tmp_path, *CERTAIN) as two:
        one.thinks(COUNT)
        two.asks(COUNT, COUNTED)
        two.does("/name second", "called 'second' now.")
        assert one.status.startswith("thinking")
        assert "cut off" not in two.above
        two.does("/resume 1", "conversation 1,")
        two.does("/continue", "✗ thought 1 is being answered by another process.")
        one.type(ctrl("g"))
        one.turn_is_over(1)
        one.does("/history", "second · 1 turn", "this one")
        assert rows(tmp_path, "SELECT conversation, closed FROM turns") == [(1, "asked"), (2, "model")]
