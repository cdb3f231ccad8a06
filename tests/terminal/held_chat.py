"""The real chat on a real terminal, over a backend whose turns last until the user ends them.

    python tests/terminal/held_chat.py DATA [--part answer] [--resume ID]

A token is a sentence with a number: token 103 is `step 3. `. There is one every few milliseconds. The history
in DATA is real.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from qwq_local.backend.api import ReplyRequest
from qwq_local.dialogue.control import AnswerNow, Steer
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.archive import Archive
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.app import Repl, ReplOptions
from tests.queued_backend import PlanningBackend, QueuedBackend, Script, planned, talking

FIRST = 100
TOKEN_S = 0.005


def step(token: int) -> str:
    """The text of a token."""
    return f"step {token - FIRST}. "


def held(part: str) -> Script:
    """A turn whose thinking or answer continues until it is stopped or must answer."""

    def script(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        yield from planned(backend, question)
        tokens = list(question.opening.generated) if question.opening is not None else []
        control = question.control
        assert control is not None
        steered = ""
        is_thinking = part == "thinking"
        n_thinking = 0 if part == "answer" else len(tokens)
        reason = CloseReason.MODEL
        while is_thinking and not backend.stopped.is_set():
            match control.take():
                case AnswerNow():
                    is_thinking, reason = False, CloseReason.ASKED
                case Steer(text):
                    steered = f"\n\n{text}\n\n"
                    yield Steered(steered)
                case None if control.wait(TOKEN_S):
                    yield from token(tokens, Thinking)
                    n_thinking = len(tokens)
            backend.stopped.wait(TOKEN_S)
        thinking = "".join(map(step, tokens[:n_thinking])) + steered
        if not backend.stopped.is_set() and not (part == "answer" and tokens):
            yield ThinkingClosed(reason, n_thinking, 1.0)
        while part == "answer" and not backend.stopped.is_set():
            yield from token(tokens, Answer)
            backend.stopped.wait(TOKEN_S)
        if part == "thinking" and not backend.stopped.is_set():
            yield from token(tokens, Answer)
        end = FinishReason.INTERRUPTED if backend.stopped.is_set() else FinishReason.STOP
        stats = TurnStats(40, 0, n_thinking, len(tokens) - n_thinking, 0.1, 1.0)
        yield Finished(end, stats, thinking, "".join(map(step, tokens[n_thinking:])))

    def token(tokens: list[int], kind: type[Thinking] | type[Answer]) -> Iterator[Event]:
        tokens.append(FIRST + len(tokens))
        yield kind(step(tokens[-1]))
        n_thinking = len(tokens) if kind is Thinking else 0 if part == "answer" else len(tokens) - 1
        yield Generated(len(tokens) - 1, (tokens[-1],), n_thinking)

    return script


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--part", default="thinking", choices=("thinking", "answer"))
    parser.add_argument("--resume", type=int)
    asked = parser.parse_args()
    backend = PlanningBackend([held(asked.part)] * 100, name="QwQ held")
    with closing(Archive.open(asked.data / "history.sqlite3")) as archive:
        chat = talking(archive, asked.data, lambda _: backend, resume=asked.resume).chat
        output = Output.of(sys.stdout, os.environ)
        return Repl(chat, ReplOptions(output, sys.stdin, os.environ, time.monotonic, None)).run()


if __name__ == "__main__":
    sys.exit(main())
