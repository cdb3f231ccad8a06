"""Events as lines of JSON: what a program reads of a turn."""

from __future__ import annotations

import io
import json

from qwq_local.cli.jsonl import event_line
from qwq_local.cli.sinks import JsonLines
from qwq_local.events import Finished, FinishReason, Generated, Prompted, Steered, Thinking, TurnStats


def test_token_ids_are_no_lines() -> None:
    stream = io.StringIO()
    sink = JsonLines(stream)
    for event in (Prompted((1, 2)), Thinking("a"), Generated(0, (3,), 1), Steered("b")):
        sink.show(event)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["thinking", "steered"]


def test_the_figures_of_a_turn_that_was_gone_on_with_are_its_own() -> None:
    """Ten of its thirty tokens were another turn's, six of these prefilled with the prompt."""
    stats = TurnStats(
        prompt_tokens=50, cached_tokens=20, thinking_tokens=25, answer_tokens=5, prefill_s=2.0, decode_s=4.0,
        resumed_tokens=10, resumed_cached=4,
    )  # fmt: skip
    line = json.loads(event_line(Finished(FinishReason.STOP, stats, "a", "b")))
    assert (line["stats"]["prefill_rate"], line["stats"]["decode_rate"]) == (18.0, 5.0)
    assert line["stats"]["resumed_tokens"] == 10
