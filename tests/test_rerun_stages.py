"""`qwq rerun` of turns that were gone on with: real chats with the miniature, stopped by a person, by a limit
and by the end of the process; and what is asked of a Backend, stage by stage.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.question import Question
from qwq_local.chat.chat import Chat
from qwq_local.chat.repeating import Comparison, Here, Resumed, Stage, repeat, stages_of
from qwq_local.chat.setup import ChatSetup
from qwq_local.cli.environment import Environment
from qwq_local.cli.rerunning import Asked, rerun_in
from qwq_local.dialogue.closing import closing_text
from qwq_local.dialogue.control import Halt
from qwq_local.engine.api import AbortFlag
from qwq_local.errors import HistoryError
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Prefill,
    Thinking,
    TurnStats,
)
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.records import Continuation, Origin, TurnRecord, TurnState
from qwq_local.paths import Directories
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import ResolvedProfile, profile_folders, resolve
from tests.command import environment
from tests.models import constant_model
from tests.queued_backend import QueuedBackend, Script, planned

# Real chats.

COUNT = "How many r's are in the word strawberry?"
WILD = ("temperature=3", "top_k=0", "top_p=1", "repeat_penalty=1.3", "presence_penalty=1", "seed=4")


@contextmanager
def chatting(model: Path, folder: Path, *settings: str, resume: int | None = None) -> Iterator[Chat]:
    """A chat with a model file that is written to the history in the folder."""
    folders = profile_folders(Directories(folder, folder, folder))

    def make_backend(_: str, resolved: ResolvedProfile) -> LocalBackend:
        return LocalBackend(model, resolved.profile, 1, AbortFlag(), is_roomy=True)

    def resolved(name: str, profile: str | None, texts: Sequence[str]) -> ResolvedProfile:
        return resolve(name, profile, folders, {}, texts)

    with Archive.open(folder / FILE) as archive:
        setup = ChatSetup(
            archive, make_backend, resolved, str(model), "chat", settings=settings, resume=resume, cwd=folder
        )
        with closing(Chat(setup)) as chat:
            list(chat.start())
            yield chat


def stopped(chat: Chat, line: str, after: int) -> None:
    """Enter a line and press Ctrl-C when so many pieces have come."""
    n_pieces = 0
    for event in chat.submit(line):
        n_pieces += isinstance(event, Thinking | Answer)
        if n_pieces == after and isinstance(event, Thinking | Answer):
            chat.stop()
    assert n_pieces in (after, after + 1)


def done(chat: Chat, *lines: str) -> None:
    for line in lines:
        list(chat.submit(line))


def by_hand(model: Path, folder: Path) -> None:
    with chatting(model, folder, *WILD, "thinking_budget=40", "max_tokens=20") as chat:
        stopped(chat, COUNT, 9)
        stopped(chat, "/continue", 12)
        done(chat, "/continue")


def by_hand_and_left_so(model: Path, folder: Path) -> None:
    with chatting(model, folder, *WILD) as chat:
        stopped(chat, COUNT, 5)
        stopped(chat, "/continue", 8)


def at_limits_that_change(model: Path, folder: Path) -> None:
    with chatting(model, folder, *WILD, "max_tokens=6", "thinking_budget=12") as chat:
        done(chat, COUNT, "/continue", "/set temperature 2", "/set max_tokens 25", "/continue")


def over_a_restart(model: Path, folder: Path) -> None:
    """And once more stopped before anything came of it."""
    with chatting(model, folder, *WILD, "thinking_budget=40", "max_tokens=20") as chat:
        stopped(chat, COUNT, 9)
    with chatting(model, folder, *WILD, "thinking_budget=40", "max_tokens=20", resume=1) as chat:
        for event in chat.submit("/continue"):
            if isinstance(event, Prefill):
                chat.stop()
        done(chat, "/continue")


STORIES = {
    "by hand": (by_hand, 3, TurnState.STOPPED),
    "by hand, and left so": (by_hand_and_left_so, 2, TurnState.STOPPED),
    "at limits that change": (at_limits_that_change, 3, TurnState.STOPPED),
    "over a restart": (over_a_restart, 2, TurnState.STOPPED),
}


def only_turn(folder: Path) -> TurnRecord:
    with Archive.open(folder / FILE) as archive:
        (turn,) = archive.path(1)
    return turn


def rerun(cache: Path, folder: Path, *, as_json: bool = False) -> tuple[int, str]:
    """The exit status and what is printed."""
    out = io.StringIO()
    variables = environment(cache, QWQ_DATA_DIR=str(folder))
    status = rerun_in(Environment(None, out, io.StringIO(), variables), Asked("1", as_json=as_json))
    return status, out.getvalue()


@pytest.mark.parametrize("story", STORIES)
def test_a_turn_that_was_gone_on_with_comes_out_the_same_again(
    story: str, miniature: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    tell, n_stages, state = STORIES[story]
    tell(miniature("Q8_0"), tmp_path)
    turn = only_turn(tmp_path)
    stages = stages_of(turn)
    assert len(stages) == n_stages
    assert turn.state is state
    assert all(stage.begins != stage.end for stage in stages)

    status, out = rerun(cache, tmp_path, as_json=True)
    result = json.loads(out)
    assert (status, result["is_identical"], result["difference"]) == (0, True, None)
    assert result["n_characters"] == len(turn.thinking) + len(turn.answer)
    assert [part["generated"] for part in result["resumed"]] == [
        stage.begins.n_tokens for stage in stages[1:]
    ]
    for part in result["resumed"]:
        assert part["rerun_cached"] == part["recorded_cached"]


def test_a_loop_that_began_before_the_stop_is_cut_the_same_again(cache: Path, tmp_path: Path) -> None:
    """A model that says one letter for ever: the loop guard counts what came before the stop."""
    model = constant_model(tmp_path / "model", "a", window=2048)
    with chatting(model, tmp_path, "max_tokens=5", "thinking_budget=1000", "answer_reserve=64") as chat:
        stopped(chat, COUNT, 300)
        done(chat, "/continue", "/continue")
    turn = only_turn(tmp_path)
    first, second = stages_of(turn)[1:]
    assert (first.begins.n_tokens, second.begins.n_tokens < 300) == (300, True)
    assert turn.thinking == "a" + closing_text(CloseReason.LOOP)

    status, out = rerun(cache, tmp_path)
    assert (status, out.splitlines()[0]) == (0, f"turn 1 is identical, {len(turn.thinking) + 10} characters.")
    assert "gone on with after 300 tokens" in out


def test_a_turn_that_an_older_version_went_on_with_is_refused(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    by_hand_and_left_so(miniature("Q8_0"), tmp_path)
    turn = only_turn(tmp_path)
    assert turn.origin is not None
    with pytest.raises(
        HistoryError, match="turn 1 was stopped and gone on with: the sampler began anew there"
    ):
        stages_of(replace(turn, origin=replace(turn.origin, continuations=())))


# What is asked of a Backend.

PROMPT = (1, 2, 3)
PLAN = {"n_ctx": 1000, "answer_reserve": 100}
FIRST = Origin("m", "sha256:abc", "library 1", settings={"top_k": "1"}, seed=3, cached_tokens=2)
LATER = replace(FIRST, settings={"top_k": "2"}, seed=5)


def gone_on(*places: tuple[int, int]) -> TurnRecord:
    """A turn of ten tokens, a letter each, gone on with after so many, so many being cached then."""
    generated = tuple(range(10, 20))
    continuations = []
    for n_tokens, cached in places:
        halt = Halt.after(generated[:n_tokens])
        origin = replace(LATER, cached_tokens=cached)
        continuations.append(Continuation(halt.n_tokens, halt.digest, origin, PLAN))
    return TurnRecord(
        id=7,
        conversation=1,
        parent=None,
        number=1,
        question="Why?",
        content="Why?",
        files=(),
        thinking="abcdefghij",
        answer="",
        steered=(),
        prompt=PROMPT,
        generated=generated,
        state=TurnState.STOPPED,
        reason=FinishReason.INTERRUPTED,
        closed=None,
        origin=replace(FIRST, is_continued=bool(places), continuations=tuple(continuations)),
        plan=PLAN,
        stats=TurnStats(cached_tokens=2),
        thinking_s=1.0,
        created_at=0.0,
    )


def letters(text: str, reason: FinishReason = FinishReason.MAX_TOKENS) -> Script:
    """A stage that thinks these letters, told as the tokens of `gone_on`, from where it is opened."""

    def script(backend: QueuedBackend, question: Question) -> Iterator[Event]:
        yield from planned(backend, question)
        assert question.opening is not None
        start = len(question.opening.generated)
        for letter in text:
            yield Thinking(letter)
        yield Generated(start, tuple(range(10 + start, 10 + start + len(text))), start + len(text))
        yield Finished(reason, TurnStats(), "abcdefghij"[:start] + text, "")

    return script


@dataclass
class Asking:
    """A backend, what it was asked, and under which profiles it went on."""

    backend: QueuedBackend
    comparison: Comparison | None = None
    adopted: list[dict[str, str]] = field(default_factory=list)


def asking(turn: TurnRecord, *scripts: Script) -> Asking:
    asked = Asking(QueuedBackend(list(scripts)))

    def profile_of(stage: Stage) -> Profile:
        asked.adopted.append(dict(stage.origin.settings))
        return Profile()

    for event in repeat(turn, stages_of(turn), Here(asked.backend, "sha256:def", "library 2", profile_of)):
        if isinstance(event, Comparison):
            asked.comparison = event
    return asked


def test_each_stage_begins_where_the_one_before_it_halts() -> None:
    turn = gone_on((4, 6), (7, 0))
    asked = asking(turn, letters("abcd"), letters("efg"), letters("hij"))
    questions = asked.backend.questions
    assert [question.opening.generated for question in questions if question.opening] == [
        (),
        turn.generated[:4],
        turn.generated[:7],
    ]
    assert [question.halt for question in questions] == [Halt.after(turn.generated[:n]) for n in (4, 7, 10)]
    assert [question.seed for question in questions] == [3, 5, 5]
    # The third found none of the tokens in the cache, so it is computed anew as it was.
    assert [question.is_fresh for question in questions] == [True, False, True]
    assert asked.adopted == [{"top_k": "2"}, {"top_k": "2"}]
    assert asked.comparison is not None
    assert asked.comparison.difference is None
    assert asked.comparison.resumed == (Resumed(4, 6, 2), Resumed(7, 0, 2))


def test_after_a_difference_no_further_stage_is_run() -> None:
    asked = asking(gone_on((4, 6)), letters("abXd" + "y" * 100, FinishReason.STOP))
    assert len(asked.backend.questions) == 1
    assert asked.comparison is not None
    assert asked.comparison.difference is not None
    assert asked.comparison.difference.position == 2


def test_a_stage_that_is_interrupted_ends_it_without_a_result() -> None:
    for scripts in (
        [letters("abcd", FinishReason.INTERRUPTED)],
        [letters("abcd"), letters("ef", FinishReason.INTERRUPTED)],
    ):
        asked = asking(gone_on((4, 6)), *scripts)
        assert asked.comparison is None
        assert len(asked.backend.questions) == len(scripts)


def test_a_stage_of_no_tokens_is_left_out() -> None:
    """The turn was stopped again before anything came, at its beginning or later."""
    turn = gone_on((0, 0), (4, 6), (4, 5), (10, 12))
    stages = stages_of(turn)
    assert [(stage.begins.n_tokens, stage.origin.cached_tokens) for stage in stages] == [(0, 0), (4, 5)]
    assert stages[-1].end == Halt.after(turn.generated)


def test_a_turn_of_another_plan_in_a_later_stage_is_refused() -> None:
    turn = gone_on((4, 6))
    assert turn.origin is not None
    (part,) = turn.origin.continuations
    other = replace(turn.origin, continuations=(replace(part, plan={"n_ctx": 4000}),))
    with pytest.raises(HistoryError, match="turn 7 had n_ctx 4000, here it would have 1000"):
        asking(replace(turn, origin=other), letters("abcd"), letters("efghij"))
