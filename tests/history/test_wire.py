"""Events as lines of JSON and back; docs/jsonl.md agrees with the code."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_local.cli.output import JsonLines
from qwq_local.events import (
    CloseReason,
    DeviceBytes,
    Event,
    Finished,
    FinishReason,
    Generated,
    Ledger,
    Prompted,
    Steered,
    Thinking,
    TokenLogprob,
    TurnStats,
)
from qwq_local.wire import event_line, event_name, event_object, event_of

DOCUMENT = (Path(__file__).parents[2] / "docs" / "jsonl.md").read_text()
WRITTEN = [kind for kind in get_args(Event) if kind is not Prompted]


@given(event=st.one_of(*map(st.from_type, get_args(Event))))
def test_every_event_comes_back_from_its_object(event: Event) -> None:
    """Compared as text, because NaN does not equal itself."""
    assert repr(event_of(json.loads(json.dumps(event_object(event))))) == repr(event)


def test_unknown_fields_are_ignored_and_missing_ones_have_their_default() -> None:
    stats = {"prompt_tokens": 5, "later": [1]}
    value = {"event": "finished", "reason": "stop", "stats": stats, "thinking": "a", "answer": "b", "v": 2}
    assert event_of(value) == Finished(FinishReason.STOP, TurnStats(prompt_tokens=5), "a", "b")


@pytest.mark.parametrize(
    "value",
    [
        3,
        None,
        [],
        {},
        {"event": "turn_stats"},
        {"event": "thinking"},
        {"event": "thinking", "text": 3},
        {"event": "generated", "start": True, "tokens": [], "thinking": 0},
        {"event": "generated", "start": 0, "tokens": 7, "thinking": 0},
        {"event": "generated", "start": 0, "tokens": [1, "2"], "thinking": 0},
        {"event": "thinking_closed", "reason": "tired", "tokens": 1, "elapsed_s": 0.5},
    ],
)
def test_objects_that_are_not_events_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"no event|expected|missing|not a valid"):
        event_of(value)


def test_token_ids_alone_write_no_line() -> None:
    stream = io.StringIO()
    sink = JsonLines(stream)
    for event in (Prompted((1, 2)), Thinking("a"), Generated(0, (3,), 1), Steered("b")):
        sink.show(event)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["thinking", "steered"]


def test_token_ids_with_log_probabilities_are_a_line() -> None:
    logprobs = (TokenLogprob(3, -0.123456, ((3, -0.123456), (4, -2.5))), None)
    line = event_line(Generated(5, (3, 9), 7, (True, False), logprobs))
    assert json.loads(line) == {
        "v": 2,
        "event": "generated",
        "start": 5,
        "tokens": [3, 9],
        "thinking": 7,
        "sampled": [True, False],
        "logprobs": [{"token": 3, "logprob": -0.1235, "top": [[3, -0.1235], [4, -2.5]]}, None],
    }


def test_the_figures_of_a_continued_turn_are_its_own() -> None:
    """Ten of its thirty tokens were another turn's, six of these prefilled with the prompt."""
    stats = TurnStats(50, 20, 25, 5, 2.0, 4.0, resumed_tokens=10, resumed_cached=4)
    line = json.loads(event_line(Finished(FinishReason.STOP, stats, "a", "b")))
    assert (line["stats"]["prefill_rate"], line["stats"]["decode_rate"]) == (18.0, 5.0)
    assert line["stats"]["resumed_tokens"] == 10


def test_fractions_are_rounded_for_readers_and_exact_in_the_object() -> None:
    finished = Finished(FinishReason.STOP, TurnStats(decode_s=1.23456789), "", "")
    assert json.loads(event_line(finished))["stats"]["decode_s"] == 1.2346
    assert event_of(event_object(finished)) == finished


def documented(event: str) -> set[str]:
    """The words in code type of an event's row in docs/jsonl.md."""
    (row,) = re.findall(rf"^\| `{event}` \| (.*) \|$", DOCUMENT.split("## Many questions")[0], re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize("kind", WRITTEN, ids=event_name)
def test_the_document_names_every_event_and_all_its_fields(kind: type) -> None:
    nested = {"planned": (DeviceBytes, Ledger), "generated": (TokenLogprob,)}.get(event_name(kind), ())
    for described in (kind, *nested):
        fields = {field.name for field in dataclasses.fields(described)}
        assert fields <= documented(event_name(kind))


def test_the_document_names_no_unknown_event() -> None:
    table = DOCUMENT.split("| `event` | fields |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {event_name(kind) for kind in WRITTEN}


def test_the_document_names_all_figures_and_reasons() -> None:
    (figures,) = re.findall(r"^`stats` holds (.*?)\n\n", DOCUMENT, re.MULTILINE | re.DOTALL)
    stats = json.loads(event_line(Finished(FinishReason.STOP, TurnStats(), "", "")))["stats"]
    assert set(stats) == set(re.findall(r"`(\w+)`", figures))
    assert set(FinishReason) <= documented("finished")
    assert set(CloseReason) <= documented("thinking_closed")
