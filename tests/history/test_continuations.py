"""The origin of a turn: recorded by a chat, kept when it is continued, read from any version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.backend.api import ReplyRequest
from qwq_local.events import Event, FinishReason, Generated, Planned, Steered
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnOrigin
from qwq_local.history.rows import packed_json, unpacked_json
from tests.queued_backend import QueuedBackend, Script, Talking, planned, says, talking

FIRST = TurnOrigin("m", "sha256:abc", "library 1", "math", {"temperature": "0.6"}, 3, 1.0, "f16", 12)


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def talk(archive: Archive, tmp_path: Path) -> Talking:
    return talking(archive, tmp_path)


def origin_of(archive: Archive) -> TurnOrigin:
    origin = archive.path(1)[-1].origin
    assert origin is not None
    return origin


def stopped(thinking: str, *generated: int) -> Script:
    return says(thinking, "", reason=FinishReason.INTERRUPTED, closed=None, generated=generated)


def test_a_packed_origin_unpacks_the_same() -> None:
    for origin in (FIRST, replace(FIRST, is_continued=True)):
        assert unpacked_json(TurnOrigin, packed_json(origin)) == origin


def test_a_row_of_an_older_version_is_read() -> None:
    values = json.loads(packed_json(FIRST))
    values |= {"is_fresh": True, "continuations": [{"generated": 7}]}
    assert unpacked_json(TurnOrigin, json.dumps(values)) == FIRST


def test_a_continued_turn_keeps_its_first_origin(talk: Talking, archive: Archive) -> None:
    talk.submit("One?", stopped("Half", 11, 12))
    talk.submit("/set temperature 0.9")
    talk.submit("/continue", stopped("Half a", 13))

    origin = origin_of(archive)
    assert origin.is_continued
    assert origin.settings["temperature"] == "0.6"
    assert origin.seed == 7


def test_a_turn_keeps_the_plan_it_began_with(talk: Talking, archive: Archive) -> None:
    def under(n_ctx: int) -> Script:
        def script(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
            for event in stopped("Half")(backend, question):
                yield replace(event, n_ctx=n_ctx) if isinstance(event, Planned) else event

        return script

    talk.submit("One?", under(512))
    talk.submit("/continue", under(1024))
    (turn,) = archive.path(1)
    assert turn.plan["n_ctx"] == 512


def test_steered_sentences_are_kept_with_the_tokens(talk: Talking) -> None:
    def steered(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        yield from planned(backend, question)
        yield from (Steered("But count."), Generated(0, (11, 12), 2))

    talk.submit("One?", steered)
    talk.submit("/continue", says())
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert (opening.generated, opening.steered) == ((11, 12), ("But count.",))
