"""The real REPL on a real terminal, over a Talk with scripted turns.

    python tests/terminal/queued_talk.py LOG [--history FILE] [--view VIEW] [--release FIFO]

The entered line selects the turn: `lines 3000` an answer of numbered lines, `think 20000` a thought of
numbered words, `hold` a thought that lasts until the user ends it, `exotic` any character, `page 500` a
page, `boom` an error. With a FIFO every piece waits for a byte from it. LOG records all calls of the Talk, a
JSON array a line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwq_local.chat.events import (
    COMMAND,
    Asking,
    ChatEvent,
    ChatStatus,
    Completion,
    Copy,
    Edit,
    Leave,
    Page,
    Said,
    ThinkView,
)
from qwq_local.events import (
    Answer,
    CloseReason,
    Finished,
    FinishReason,
    Planned,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.app import Repl, ReplOptions

EXOTIC = (
    "中文字符。日本語のテキスト、한국어 텍스트 (전각) ｆｕｌｌｗｉｄｔｈ\n\n"
    "👩‍👩‍👧‍👦 👍🏽 🇺🇳 ❤️ e\u0301 a\u0308\u0323 ก็ क्षि עברית العربية \u202eevil\u202c\n\n"
    "\x1b[2J\x1b[31mred\x1b[0m\x07\x9b5A\u200b\u2028end of the exotic\n"
)
PLANNED = Planned("QwQ-32B · Q4_K_M", 32768, 40, 24000, 4096, 1.0, "f16", 64, 7)


class QueuedTalk:
    """Answers each line in a fixed way and logs its calls."""

    def __init__(self, log: Path, release: Path | None = None) -> None:
        self._log = log
        self._release = release.open("rb", buffering=0) if release else None
        self._lock = threading.Lock()
        self._runs = threading.Event()
        self._runs.set()
        self._is_stopped = self._answers = False
        self._sentences: list[str] = []
        self._wished = threading.Event()
        self._turn = 0
        self._thinking: list[str] = []
        self._answer: list[str] = []

    # The methods of a Talk.

    def start(self) -> Iterator[ChatEvent]:
        self._note("start")
        yield ChatStatus("QwQ-32B · Q4_K_M", 32768, 0, 1.0)

    def submit(self, line: str) -> Iterator[ChatEvent]:
        self._note("submit", line)
        self._is_stopped = self._answers = False
        self._wished.clear()
        return self._run(line)

    def _run(self, line: str) -> Iterator[ChatEvent]:
        command, _, rest = line.partition(" ")
        match command:
            case "/exit":
                yield Leave()
            case "/think" | "page":
                yield self._page(int(rest) if rest.isdigit() else 100)
            case "/copy":
                yield Copy("x" * int(rest or 10), "the answer")
            case "/edit":
                yield Edit(rest)
            case "boom":
                yield from self._turn_of(line, lambda: iter(["about to break"]), fails=True)
            case "hold":
                yield from self._turn_of(line, lambda: iter(["held\n"]), self._held())
            case "lines":
                yield from self._turn_of(line, lambda: numbered("line", int(rest)))
            case "think":
                yield from self._turn_of(
                    line, lambda: iter(["thought\n"]), (f"w{n}" + "\n "[n % 20 > 0] for n in range(int(rest)))
                )
            case "exotic":
                yield from self._turn_of(line, lambda: iter([EXOTIC]), iter([EXOTIC]))
            case _ if COMMAND.fullmatch(line):
                yield Said((f"no such command: {command}",), is_error=True)
            case _:
                yield from self._turn_of(line, lambda: iter([f"got {len(line)} characters\n"]))
        yield ChatStatus("QwQ-32B · Q4_K_M", 32768, 100 * self._turn, 1.0)

    def stop(self) -> None:
        self._note("stop")
        self._is_stopped = True
        self._runs.set()
        self._wished.set()

    def answer_now(self) -> None:
        self._note("answer_now")
        self._answers = True
        self._wished.set()

    def steer(self, text: str) -> None:
        self._note("steer", text)
        self._sentences.append(text)
        self._wished.set()

    def pause(self) -> None:
        self._note("pause")
        self._runs.clear()

    def go_on(self) -> None:
        self._note("go_on")
        self._runs.set()

    def complete(self, before_cursor: str) -> Sequence[Completion]:
        words = ("/think", "/thank", "/exit") if before_cursor.startswith("/") else ("@one.txt", "@two.txt")
        last = before_cursor.rpartition(" ")[2]
        return [Completion(word, len(last), "a word") for word in words if last and word.startswith(last)]

    def close(self) -> None:
        self._note("close")

    # The scripted turns.

    def _page(self, n_lines: int) -> Page:
        text = "".join(f"page row {n} of the thought, 中文 and more\n" for n in range(1, n_lines + 1))
        return Page("thought 1", text + "mine\n", ("mine",))

    def _turn_of(
        self,
        question: str,
        answer: Callable[[], Iterator[str]],
        thinking: Iterator[str] = iter(()),  # noqa: B008
        fails: bool = False,
    ) -> Iterator[ChatEvent]:
        self._turn += 1
        n_thinking = n_answer = 0
        yield Asking(question, self._turn)
        yield PLANNED
        yield Thinking("thinking begins. ")
        for piece in thinking:
            self._rest()
            if self._is_stopped or self._answers:
                break
            while self._sentences:
                yield Steered(self._sentences.pop(0))
            yield Thinking(piece)
            n_thinking += 1
        reason = CloseReason.ASKED if self._answers else CloseReason.MODEL
        if not self._is_stopped:
            yield ThinkingClosed(reason, n_thinking, 1.0)
            for piece in answer():
                self._rest()
                if self._is_stopped:
                    break
                yield Answer(piece)
                n_answer += 1
        if fails:
            raise ZeroDivisionError("this is the bug")
        end = FinishReason.INTERRUPTED if self._is_stopped else FinishReason.STOP
        yield Finished(end, TurnStats(40, 0, n_thinking, n_answer, 0.1, 1.0), "", "")

    def _held(self) -> Iterator[str]:
        """A thought that yields a sentence after each call, and ends only at a call."""
        n = 0
        while not (self._is_stopped or self._answers):
            yield f"step {n}. "
            n += 1
            self._wished.wait()
            self._wished.clear()

    def _rest(self) -> None:
        self._runs.wait()
        if self._release:
            self._release.read(1)

    def _note(self, *call: str) -> None:
        with self._lock, self._log.open("a") as log:
            log.write(json.dumps(call) + "\n")


def numbered(word: str, count: int) -> Iterator[str]:
    """Lines with numbers, as a model writes them: in pieces, and as Markdown that keeps its lines."""
    for n in range(1, count + 1):
        yield f"- {word} "
        yield f"{n}\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--history", type=Path)
    parser.add_argument("--view", type=ThinkView, default=ThinkView.TAIL)
    parser.add_argument("--release", type=Path)
    asked = parser.parse_args()
    place = ReplOptions(
        Output.of(sys.stdout, os.environ), sys.stdin, os.environ, time.monotonic, asked.history, asked.view
    )
    status = Repl(QueuedTalk(asked.log, asked.release), place).run()
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"left with {status}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
