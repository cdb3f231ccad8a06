"""A turn view for tests: events in, frames out; it records committed rows and their text."""

from __future__ import annotations

import io
import re

from qwq_local.chat.events import Asking, ChatEvent, ThinkView
from qwq_local.events import (
    CloseReason,
    Finished,
    FinishReason,
    Planned,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.terminal.layout import Row
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.turn_view import TurnRows, TurnView
from tests.terminal.fake_terminal import Clock

SGR = re.compile(r"\x1b\[[0-9;]*m")
ASKING = Asking("How many r?", 3)
CLOSED = ThinkingClosed(CloseReason.MODEL, 2431, 72.4)
FINISHED = Finished(FinishReason.STOP, TurnStats(), "", "")
PLANNED = Planned(
    "QwQ-32B Q4_K_M", 32_768, 4_000, 16_384, 4_096, 1.0, "q8_0", 65, 1, line="context 32,768 · q8_0 KV"
)


def text_of(row: Row) -> str:
    """The visible text of a row."""
    return SGR.sub("", row.written)


class Viewer:
    """A view in a window whose size can be set. It records every frame."""

    def __init__(
        self,
        view: ThinkView = ThinkView.TAIL,
        size: tuple[int, int] = (80, 24),
        *,
        has_color: bool = True,
    ) -> None:
        self.size = size
        self.clock = Clock()
        self.final: list[Row] = []
        self.frames: list[TurnRows] = []
        output = Output(io.StringIO(), True, False, has_color, True, lambda: self.size)
        self.view = TurnView(output, self.clock, view)

    def show(self, *events: ChatEvent, each_s: float = 0.0) -> Viewer:
        """Take events, `each_s` seconds apart, without a frame."""
        for event in events:
            self.view.show(event)
            self.clock.now += each_s
        return self

    def frame(self) -> TurnRows:
        """The next frame."""
        frame = self.view.frame()
        self.final += frame.final
        self.frames.append(frame)
        return frame

    def live(self) -> list[str]:
        """The live rows of the next frame."""
        return [text_of(row) for row in self.frame().live]

    def status(self) -> str:
        """The status line of the next frame, its rows joined."""
        return " · ".join(self.frame().status)

    def committed(self) -> list[str]:
        """Everything that was committed up to the next frame."""
        self.frame()
        return [text_of(row) for row in self.final]
