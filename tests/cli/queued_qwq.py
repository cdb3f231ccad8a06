"""`qwq` whose models all answer through a QueuedBackend: no plans, no token counts, no model file.

    python tests/cli/queued_qwq.py ask --model queued "Why?"

It answers with the last line of the question. A question that begins with `wait` thinks until it is stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.make import BackendRequest
from qwq_local.cli.environment import engine_environment
from qwq_local.cli.main import main
from qwq_local.events import Event, Finished, FinishReason, Thinking, TurnStats
from tests.queued_backend import QueuedBackend, says


class EchoingBackend(QueuedBackend):
    """Repeats the last line of each question."""

    def reply(self, question: ReplyRequest) -> Iterator[Event]:
        """The answer to a question."""
        line = question.messages[-1].content.strip().rpartition("\n")[2]
        self.scripts.append(waiting if line.startswith("wait") else says(f"Asked: {line}", f"Heard: {line}"))
        yield from super().reply(question)


def waiting(backend: QueuedBackend, _question: ReplyRequest) -> Iterator[Event]:
    """A thought that lasts until it is stopped."""
    yield Thinking("Waiting.")
    backend.stopped.wait()
    yield Finished(FinishReason.INTERRUPTED, TurnStats(), "Waiting.", "")


def make(_request: BackendRequest) -> QueuedBackend:
    """The backend of any model."""
    return EchoingBackend()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], replace(engine_environment(), make_backend=make)))
