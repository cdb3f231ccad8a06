"""`qwq rerun`: turns of a real history, made by the real chat with the miniature, once more; and what is told
when they part, over a Backend that replays a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.backend.question import Question
from qwq_local.chat.repeating import Comparison, Here, repeat, stages_of
from qwq_local.errors import HistoryError
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Notice,
    Planned,
    Prefill,
    Thinking,
    TurnStats,
)
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.records import Origin, TurnRecord, TurnState
from qwq_local.profiles.keys import Profile
from tests.command import Ran, qwq

ORIGIN = Origin("m", "sha256:abc", "library 1", seed=3, cached_tokens=12)
PLAN = {"n_ctx": 512, "yarn_factor": 1.0, "kv_type": "f16", "thinking_budget": 64, "answer_reserve": 32}
TURN = TurnRecord(
    id=7,
    conversation=1,
    parent=None,
    number=1,
    question="Why?",
    content="Why?",
    files=(),
    thinking="Let me think about it.",
    answer="Because it is so.",
    steered=(),
    prompt=(1, 2, 3),
    generated=(4, 5),
    state=TurnState.DONE,
    reason=FinishReason.STOP,
    closed=CloseReason.MODEL,
    origin=ORIGIN,
    plan=PLAN,
    stats=TurnStats(cached_tokens=12),
    thinking_s=1.0,
    created_at=0.0,
)
STOPPED = replace(TURN, state=TurnState.STOPPED, reason=FinishReason.INTERRUPTED)


class ReplayingBackend:
    """A Backend that says a given thinking and answer, in pieces of three characters."""

    def __init__(self, thinking: str, answer: str, reason: FinishReason = FinishReason.STOP) -> None:
        self.said = 0
        self.asked: list[Question] = []
        self._texts = (thinking, answer)
        self._reason = reason

    def reply(self, question: Question) -> Iterator[Event]:
        self.asked.append(question)
        yield Planned("m", 512, 3, 64, 32, 1.0, "f16", 0, 3)
        yield Prefill(3, 3, 0)
        thinking, answer = self._texts
        yield from (Thinking(piece) for piece in self._pieces(thinking))
        yield from (Answer(piece) for piece in self._pieces(answer))
        yield Finished(self._reason, TurnStats(), *self._texts)

    def _pieces(self, text: str) -> Iterator[str]:
        for at in range(0, len(text), 3):
            self.said += len(text[at : at + 3])
            yield text[at : at + 3]

    def stop(self) -> None:
        raise NotImplementedError

    def keep(self) -> Iterator[Notice]:
        yield from ()

    def dry_run(self, question: Question) -> Planned:
        raise NotImplementedError

    def count_tokens(self, text: str) -> int:
        raise NotImplementedError

    def adopt(self, profile: Profile) -> None:
        raise NotImplementedError

    def identity(self) -> str:
        return "sha256:def"

    def close(self) -> None:
        pass


def compared(turn: TurnRecord, backend: ReplayingBackend) -> Comparison | None:
    here = Here(backend, backend.identity(), "library 2", lambda _: Profile())
    *_, last = repeat(turn, stages_of(turn), here)
    return last if isinstance(last, Comparison) else None


def test_a_turn_begins_from_its_recorded_tokens_prefilled_anew() -> None:
    backend = ReplayingBackend(TURN.thinking, TURN.answer)
    found = compared(TURN, backend)
    (question,) = backend.asked

    assert question.opening is not None
    assert (question.opening.prompt, question.opening.generated) == ((1, 2, 3), ())
    assert question.is_fresh
    assert question.seed == 3
    assert found is not None
    assert found.difference is None
    assert (found.recorded.library, found.rerun.library) == ("library 1", "library 2")
    assert (found.recorded.cached_tokens, found.recorded.is_fresh) == (12, False)
    assert (found.rerun.cached_tokens, found.rerun.is_fresh) == (0, True)


def test_the_first_difference_is_told_and_the_rest_is_not_waited_for() -> None:
    backend = ReplayingBackend("Let me drink about it." + "and more " * 1000, "So.")
    found = compared(TURN, backend)

    assert found is not None
    assert found.difference is not None
    assert (found.difference.part, found.difference.position) == ("thinking", 7)
    assert found.difference.rerun.startswith("Let me drink about")
    assert backend.said < 100


def test_an_answer_that_only_goes_on_longer_differs() -> None:
    found = compared(TURN, ReplayingBackend(TURN.thinking, f"{TURN.answer} Indeed."))

    assert found is not None
    assert found.difference is not None
    assert (found.difference.part, found.difference.position) == ("answer", len(TURN.answer))


@pytest.mark.parametrize(("thinking", "answer"), [("Let me th", ""), (TURN.thinking, "Because")])
def test_a_stopped_turn_is_compared_as_far_as_it_was_recorded(thinking: str, answer: str) -> None:
    backend = ReplayingBackend(TURN.thinking, TURN.answer + "x" * 1000)
    found = compared(replace(STOPPED, thinking=thinking, answer=answer), backend)

    assert found is not None
    assert (found.difference, found.is_whole) == (None, False)
    assert backend.said < 100


def test_a_rerun_that_is_interrupted_says_nothing() -> None:
    assert compared(TURN, ReplayingBackend("Let me", "", FinishReason.INTERRUPTED)) is None


def test_another_plan_is_refused() -> None:
    with pytest.raises(HistoryError, match="had n_ctx 256, here it would have 512"):
        compared(replace(TURN, plan={**PLAN, "n_ctx": 256}), ReplayingBackend("", ""))


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (replace(TURN, steered=("But wait.",)), "by hand"),
        (replace(TURN, closed=CloseReason.ASKED), "by hand"),
        (replace(TURN, origin=replace(ORIGIN, is_continued=True)), "sampler began anew"),
        (replace(TURN, state=TurnState.RUNNING), "still running"),
        (replace(TURN, origin=None), "before it began"),
        (replace(TURN, prompt=()), "before it began"),
    ],
)
def test_what_its_prompt_alone_does_not_bring_about_is_refused(turn: TurnRecord, says: str) -> None:
    with pytest.raises(HistoryError, match=says):
        stages_of(turn)


COUNT = "How many r's are in the word strawberry?"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history of two conversations: of two turns, and of one that was sampled wildly."""
    cache = tmp_path_factory.mktemp("rerun")
    chat = ("chat", "-m", "miniature")
    asked = f"/name berries\n{COUNT}\nand in raspberry?\n".encode()
    assert qwq(cache, *chat, "--seed", "1", stdin=asked).status == 0
    wild = ("--set", "temperature=4", "--set", "top_k=0", "--set", "top_p=1", "--set", "max_tokens=40")
    # This seed's answer is cut in the middle of a character.
    cut = ("--set", "thinking_budget=60", "--seed", "25")
    qwq(cache, *chat, *wild, *cut, stdin=b"Tell me a story about the sea.")
    return cache


def turns(cache: Path) -> Sequence[TurnRecord]:
    with Archive.open(cache / "data" / FILE) as archive:
        return [turn for record in archive.conversations() for turn in archive.path(record.id)]


def wild_turn(cache: Path) -> TurnRecord:
    (turn,) = [turn for turn in turns(cache) if turn.conversation == 2]
    return turn


def one_line(ran: Ran) -> str:
    (line,) = ran.stderr.splitlines()
    return line


@pytest.mark.parametrize("which", ["1", "1:1", "berries:2", "1:2", "2:1"])
def test_a_turn_comes_out_the_same_again(cache: Path, which: str) -> None:
    ran = qwq(cache, "rerun", which)

    assert ran.status == 0, ran
    first, recorded, rerun = ran.stdout.splitlines()
    assert re.fullmatch(r"turn \d is identical, \d+ characters\.", first)
    assert "tokens were cached" in recorded
    assert "prefilled anew" in rerun
    assert recorded.count("llama-cpp-python") == rerun.count("llama-cpp-python") == 1


def test_the_settings_of_now_do_not_change_what_was_then(cache: Path) -> None:
    ran = qwq(cache, "rerun", "2:1", QWQ_TEMPERATURE="0", QWQ_THINKING_BUDGET="5", QWQ_KV_TYPE="q8_0")

    assert ran.status == 0, ran


def test_other_weights_are_refused_unless_wanted_and_then_they_differ(cache: Path) -> None:
    turn = wild_turn(cache)
    refused = qwq(cache, "rerun", "2:1", "-m", "miniature:Q4_0")
    assert refused.status == 1
    assert "--any-model" in one_line(refused)

    ran = qwq(cache, "rerun", "2:1", "-m", "miniature:Q4_0", "--any-model", "--json")
    result = json.loads(ran.stdout)
    assert (ran.status, result["is_identical"], result["turn"]) == (1, False, turn.id)
    found = result["difference"]
    text = turn.thinking if found["part"] == "thinking" else turn.answer
    begin = max(0, found["position"] - 40)
    assert text[begin : begin + len(found["recorded"])] == found["recorded"] != found["rerun"]
    assert result["recorded"]["identity"] != result["rerun"]["identity"]

    shown = qwq(cache, "rerun", "2:1", "-m", "miniature:Q4_0", "--any-model").stdout.splitlines()
    assert f"from character {found['position'] + 1} on" in shown[0]
    assert [">>>" in line for line in shown] == [False, True, True, False, False]


def test_a_history_without_that_turn_is_an_error(cache: Path, tmp_path: Path) -> None:
    for which, says in (("99", "no turn 99"), ("1:9", "has 2 turns, not 9"), ("abc", "is no turn")):
        ran = qwq(cache, "rerun", which)
        assert ran.status == 1
        assert says in one_line(ran)
    assert "no conversation is kept" in one_line(qwq(tmp_path, "rerun", "1"))
