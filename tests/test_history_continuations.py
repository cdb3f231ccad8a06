"""Where a turn was gone on with and with what: recorded by a chat, kept, read from any version."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwq_local.backend.question import Question
from qwq_local.dialogue.control import Halt
from qwq_local.events import Event, FinishReason, Generated, Planned, Steered
from qwq_local.history.archive import Archive
from qwq_local.history.packing import packed_origin, unpacked_origin
from qwq_local.history.records import Continuation, Origin
from tests.queued_backend import QueuedBackend, Script, Talking, planned, says, talking

FIRST = Origin("m", "sha256:abc", "library 1", "math", {"temperature": "0.6"}, 3, 1.0, "f16", 12, True)
PLAN = {"n_ctx": 512, "ledger": {"free": 4}, "devices": []}
Values = dict[str, Any]
NEXT = Continuation(7, "0123456789abcdef", replace(FIRST, seed=4, settings={"top_k": "9"}), PLAN)
WHOLE = replace(FIRST, is_continued=True, continuations=(NEXT, replace(NEXT, generated=9)))


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def talk(archive: Archive, tmp_path: Path) -> Talking:
    return talking(archive, tmp_path)


def origin_of(archive: Archive) -> Origin:
    origin = archive.path(1)[-1].origin
    assert origin is not None
    return origin


def stopped(thinking: str, *generated: int) -> Script:
    return says(thinking, "", reason=FinishReason.INTERRUPTED, closed=None, generated=generated)


def test_what_is_packed_comes_back() -> None:
    for origin in (FIRST, WHOLE, replace(FIRST, is_continued=True)):
        assert unpacked_origin(packed_origin(origin)) == origin


def test_a_row_of_an_older_version_is_read_as_it_was_meant() -> None:
    """It knows that it was gone on with, not where."""
    values = json.loads(packed_origin(WHOLE))
    del values["continuations"]
    assert unpacked_origin(json.dumps(values)) == replace(FIRST, is_continued=True)
    # An older version looks at this field alone.
    assert json.loads(packed_origin(WHOLE))["is_continued"] is True


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: 3,
        lambda part: {**part, "generated": "7"},
        lambda part: {**part, "digest": None},
        lambda part: {**part, "plan": []},
        lambda part: {**part, "origin": "m"},
        lambda part: {**part, "origin": {**part["origin"], "settings": 5}},
        lambda part: {name: part[name] for name in part if name != "generated"},
    ],
)
def test_a_damaged_part_leaves_none_but_the_rest_of_the_origin(damage: Callable[[Values], object]) -> None:
    values = json.loads(packed_origin(WHOLE))
    values["continuations"][1] = damage(values["continuations"][1])
    assert unpacked_origin(json.dumps(values)) == replace(FIRST, is_continued=True)


def test_where_and_with_what_a_turn_goes_on_is_recorded(talk: Talking, archive: Archive) -> None:
    """Each time; what it began with stays."""
    talk.submit("One?", stopped("Half", 11, 12))
    talk.submit("/set temperature 0.9")
    talk.submit("/continue", stopped("Half a", 13))
    talk.submit("/set top_k 7")
    talk.submit("/continue", says("Half a thought", "Done.", generated=(14,)))

    origin = origin_of(archive)
    assert origin.is_continued
    assert origin.settings["temperature"] == "0.6"
    first, second = origin.continuations
    assert Halt(first.generated, first.digest) == Halt.after((11, 12))
    assert Halt(second.generated, second.digest) == Halt.after((11, 12, 13))
    assert [part.origin.settings["temperature"] for part in (first, second)] == ["0.9", "0.9"]
    assert [part.origin.settings["top_k"] for part in (first, second)] == ["40", "7"]
    assert {origin.seed, first.origin.seed, second.origin.seed} == {7}
    assert [part.origin.cached_tokens for part in (first, second)] == [2, 2]
    assert first.plan["n_ctx"] == 1000


def test_a_turn_keeps_the_plan_that_it_began_under(talk: Talking, archive: Archive) -> None:
    def under(n_ctx: int) -> Script:
        def script(backend: QueuedBackend, question: Question) -> Iterator[Event]:
            for event in stopped("Half")(backend, question):
                yield replace(event, n_ctx=n_ctx) if isinstance(event, Planned) else event

        return script

    talk.submit("One?", under(512))
    talk.submit("/continue", under(1024))
    (turn,) = archive.path(1)
    assert turn.plan["n_ctx"] == 512
    assert [part.plan["n_ctx"] for part in origin_of(archive).continuations] == [1024]


def test_a_turn_that_an_older_version_went_on_with_stays_without_the_places(
    talk: Talking, archive: Archive
) -> None:
    """The first place is not known: the second alone would tell of another turn."""
    talk.submit("One?", stopped("Half", 11, 12))
    (turn,) = archive.path(1)
    recorder = archive.resume_turn(turn.id)
    recorder.set_origin(replace(origin_of(archive), is_continued=True))
    recorder.close()
    talk.submit("/continue", stopped("Half a", 13))
    assert (origin_of(archive).is_continued, origin_of(archive).continuations) == (True, ())


def test_the_sentences_that_were_put_in_go_along_with_the_tokens(talk: Talking) -> None:
    def steered(backend: QueuedBackend, question: Question) -> Iterator[Event]:
        yield from planned(backend, question)
        yield from (Steered("But count."), Generated(0, (11, 12), 2))

    talk.submit("One?", steered)
    talk.submit("/continue", says())
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert (opening.generated, opening.steered) == ((11, 12), ("But count.",))
