"""A chat over a queued backend and a real archive: what it asks, writes and resumes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_local.backend.api import ReplyRequest
from qwq_local.chat.events import Asking, ChatStatus, Edit, Leave, Page, Recalled, Talk
from qwq_local.dialogue.control import AnswerNow, Steer
from qwq_local.errors import Aborted, EngineError, PromptTooLong
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Loading,
    Notice,
    Thinking,
    TurnStats,
)
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnState
from tests.queued_backend import QueuedBackend, Script, Talking, errors, fails, planned, said, says, talking


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def talk(archive: Archive, tmp_path: Path) -> Talking:
    return talking(archive, tmp_path)


def contents(question: ReplyRequest) -> list[tuple[str, str]]:
    return [(message.role.value, message.content) for message in question.messages]


def stopped_while(*events: Event) -> Script:
    """A turn that yields some text and is then stopped by the user."""

    def script(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        yield from planned(backend, question)
        yield from events
        assert backend.stopped.wait(5)
        thinking = "".join(event.text for event in events if isinstance(event, Thinking))
        answer = "".join(event.text for event in events if isinstance(event, Answer))
        yield Finished(FinishReason.INTERRUPTED, TurnStats(prompt_tokens=3), thinking, answer)

    return script


def test_a_chat_is_a_talk(talk: Talking) -> None:
    held: Talk = talk.chat
    assert list(held.start()) == [ChatStatus("miniature", 0, 0, 1.0, "not kept")]


def test_a_question_is_answered_and_recorded(talk: Talking, archive: Archive) -> None:
    talk.backend.kept = ("kept 3 tokens",)
    events = talk.submit("Is it so?", says("Hm, well.", "It is."))
    kinds = [type(event).__name__ for event in events]
    assert kinds == [
        "Asking",
        "Planned",
        "Prompted",
        "Prefill",
        "Thinking",
        "ThinkingClosed",
        "Answer",
        "Generated",
        "Finished",
        "Notice",
        "ChatStatus",
    ]
    assert events[0] == Asking("Is it so?", 1)
    assert events[-1] == ChatStatus("queued", 1000, 5, 1.0, "not kept", 0)
    (turn,) = archive.path(1)
    assert (turn.question, turn.thinking, turn.answer, turn.state) == (
        "Is it so?",
        "Hm, well.",
        "It is.",
        TurnState.DONE,
    )
    assert turn.prompt == (1, 2, 3)
    assert turn.origin is not None
    assert (turn.origin.model, turn.origin.identity, turn.origin.cached_tokens) == (
        "miniature",
        "sha256:one",
        2,
    )
    assert turn.origin.settings["temperature"] == "0.6"
    assert turn.origin.seed == 7


def test_the_model_sees_earlier_turns_without_their_thinking(talk: Talking) -> None:
    talk.submit("/system Be brief.")
    talk.submit("One?", says("a b c", "1"))
    talk.submit("Two?", says("d e", "2"))
    talk.submit("Three?", says())
    assert contents(talk.backend.questions[-1]) == [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "1"),
        ("user", "Two?"),
        ("assistant", "2"),
        ("user", "Three?"),
    ]
    assert talk.backend.questions[-1].dropped_thinking == 5


def test_a_profiles_suffix_is_sent_but_not_recorded_as_the_question(archive: Archive, tmp_path: Path) -> None:
    talk = talking(archive, tmp_path, settings=("question_suffix=Think well.",))
    assert talk.submit("Why?", says())[0] == Asking("Why?", 1)
    (turn,) = archive.path(1)
    assert (turn.question, turn.content) == ("Why?", "Why?\nThink well.")


@pytest.mark.parametrize(
    "failing",
    [fails(PromptTooLong("too long.")), fails(EngineError("broken."), after=()), fails(Aborted())],
    ids=["not planned", "nothing came", "stopped while loading"],
)
def test_a_failed_question_leaves_the_conversation_unchanged(
    talk: Talking, archive: Archive, failing: Script
) -> None:
    talk.submit("One?", says("a", "1"))
    events = talk.submit("Two?", failing)
    assert said(events)
    assert [turn.question for turn in archive.path(1)] == ["One?"]
    talk.submit("Three?", says())
    assert contents(talk.backend.questions[-1]) == [("user", "One?"), ("assistant", "1"), ("user", "Three?")]
    assert [turn.question for turn in archive.path(1)] == ["One?", "Three?"]


def test_text_before_an_error_is_kept_and_can_be_continued(talk: Talking, archive: Archive) -> None:
    events = talk.submit("One?", fails(EngineError("llama.cpp broke."), after=[Thinking("Half a")]))
    assert errors(events) == ["llama.cpp broke.", "what came is kept: /continue goes on."]
    (turn,) = archive.path(1)
    assert (turn.thinking, turn.state) == ("Half a", TurnState.STOPPED)


def test_a_turn_without_an_answer_is_not_sent_with_one_notice(talk: Talking) -> None:
    talk.submit("One?", says("half", "", reason=FinishReason.NO_ANSWER))
    first = talk.lines("Two?", says("b", "2"))
    second = talk.lines("Three?", says("c", "3"))
    assert first == [
        "thought 1 had no answer: its question is left out of what the model sees; "
        "/retry-from 1 asks it again."
    ]
    assert second == []
    assert contents(talk.backend.questions[-1]) == [("user", "Two?"), ("assistant", "2"), ("user", "Three?")]


def test_stop_ends_the_running_turn_and_keeps_its_text(talk: Talking, archive: Archive) -> None:
    talk.backend.kept = ("kept",)
    talk.backend.scripts.append(stopped_while(Thinking("Half"), Thinking(" a thought")))
    events = []
    for event in talk.chat.submit("One?"):
        events.append(event)
        if event == Thinking(" a thought"):
            threading.Thread(target=talk.chat.stop).start()
    assert said(events) == []
    assert [event.reason for event in events if isinstance(event, Finished)] == [FinishReason.INTERRUPTED]
    assert not [event for event in events if isinstance(event, Notice)], "the user waits: nothing is kept now"
    (turn,) = archive.path(1)
    assert (turn.thinking, turn.answer, turn.state) == ("Half a thought", "", TurnState.STOPPED)


def test_stop_does_nothing_between_turns(talk: Talking) -> None:
    talk.chat.stop()
    assert not talk.backend.stopped.is_set()
    talk.submit("One?", says())
    talk.chat.stop()
    assert not talk.backend.stopped.is_set()


def test_a_stop_while_the_model_loads_is_reported(talk: Talking) -> None:
    def loading(backend: QueuedBackend, _question: ReplyRequest) -> Iterator[Event]:
        yield Loading("queued", 0.1)
        assert backend.stopped.wait(5)
        raise Aborted

    talk.backend.scripts.append(loading)
    events = []
    for event in talk.chat.submit("One?"):
        events.append(event)
        talk.chat.stop()
    assert said(events) == ["stopped."]


def test_a_stop_before_the_first_event_is_not_lost(talk: Talking) -> None:
    def stopped(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        # The user stops while the backend drops older requests.
        talk.chat.stop()
        backend.stopped.clear()
        yield from stopped_while()(backend, question)

    events = talk.submit("One?", stopped)
    assert [event.reason for event in events if isinstance(event, Finished)] == [FinishReason.INTERRUPTED]


def test_a_stop_before_the_turn_begins_is_not_lost(talk: Talking) -> None:
    talk.chat.stop()  # between lines: it stops nothing
    talk.backend.scripts.extend([stopped_while(), says()])
    events = talk.chat.submit("One?")
    talk.chat.stop()
    assert [event.reason for event in events if isinstance(event, Finished)] == [FinishReason.INTERRUPTED]
    assert [event.text for event in talk.chat.submit("Two?") if isinstance(event, Answer)]


def test_user_requests_reach_the_control_of_the_running_turn(talk: Talking) -> None:
    seen: list[object] = []

    def steered(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        assert question.control is not None
        talk.chat.pause()
        seen.append(question.control.wait(0))
        talk.chat.steer("Try the other way.")
        seen.append(question.control.wait(0))
        talk.chat.pause()
        talk.chat.go_on()
        seen.append(question.control.wait(0))
        talk.chat.pause()
        talk.chat.answer_now()
        seen.append(question.control.wait(0))
        talk.chat.answer_now()
        seen.extend([question.control.take(), question.control.take(), question.control.take()])
        yield from says()(backend, question)

    talk.submit("One?", steered)
    assert seen == [False, True, True, True, Steer("Try the other way."), AnswerNow(), AnswerNow()]


def test_requests_that_one_turn_did_not_take_are_dropped(talk: Talking) -> None:
    def steered(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
        talk.chat.answer_now()
        yield from says()(backend, question)

    talk.submit("One?", steered)
    talk.submit("Two?", says())
    control = talk.backend.questions[-1].control
    assert control is not None
    assert control.take() is None


def test_requests_between_turns_are_dropped(talk: Talking) -> None:
    for act in (talk.chat.answer_now, talk.chat.pause, talk.chat.go_on):
        act()
    talk.chat.steer("x")
    talk.submit("One?", says())
    control = talk.backend.questions[0].control
    assert control is not None
    assert control.take() is None
    assert control.wait(0)


def test_a_stopped_turn_is_continued_from_its_tokens(talk: Talking, archive: Archive) -> None:
    talk.submit("Zero?", says("z", "0"))
    talk.submit("One?", says("Half", "", reason=FinishReason.INTERRUPTED, closed=None, generated=(11, 12)))
    events = talk.submit("/continue", says("Half a thought", "Done.", generated=(13,)))
    assert events[0] == Asking("One?", 2, continued=True, thinking="Half", answer="")
    opening = talk.backend.questions[-1].opening
    assert opening is not None
    assert opening.generated == (11, 12)
    assert contents(talk.backend.questions[-1]) == [("user", "Zero?"), ("assistant", "0"), ("user", "One?")]
    turn = archive.path(1)[-1]
    assert (turn.thinking, turn.answer, turn.generated) == ("Half a thought", "Done.", (11, 12, 13))
    assert turn.state is TurnState.DONE
    assert [each.question for each in archive.path(1)] == ["Zero?", "One?"]


def test_a_complete_turn_is_not_continued(talk: Talking) -> None:
    assert errors(talk.submit("/continue")) == [
        "nothing was asked in this conversation yet: /resume lists the ones before."
    ]
    talk.submit("One?", says())
    assert errors(talk.submit("/continue")) == [
        "thought 1 came to its end, there is nothing to continue: /regen asks again."
    ]


def test_another_models_turn_is_not_continued(talk: Talking) -> None:
    talk.submit("One?", says(answer="", reason=FinishReason.INTERRUPTED))
    talk.backend.weights = "sha256:two"
    assert errors(talk.submit("/continue")) == [
        "thought 1 is by miniature (sha256:one), which is not miniature (sha256:two): "
        "/model miniature goes back, /regen asks again."
    ]


def test_a_turn_recorded_before_its_checksum_was_known_is_continued(talk: Talking) -> None:
    talk.backend.weights = "header:abc"
    talk.submit("One?", says(answer="", reason=FinishReason.INTERRUPTED))
    talk.backend.weights = "sha256:def"
    assert isinstance(talk.submit("/continue", says())[0], Asking)


def test_the_next_start_offers_to_continue_a_lost_turn(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    with Archive.open(path) as first:
        talk = talking(first, tmp_path)
        talk.submit("One?", says("Half", "", reason=FinishReason.INTERRUPTED, closed=None))
    with Archive.open(path) as second:
        resumed = talking(second, tmp_path, resume=1)
        events = list(resumed.chat.start())
        assert isinstance(events[0], Recalled)
        assert said(events)[-1] == "thought 1 did not come to its end: /continue goes on."
        again = resumed.submit("/continue", says("Half a thought", "Done."))
        assert again[0] == Asking("One?", 1, continued=True, thinking="Half")
        assert second.path(1)[0].answer == "Done."


def test_regen_asks_again_beside_the_old_answer(talk: Talking, archive: Archive) -> None:
    talk.submit("Zero?", says("z", "0"))
    talk.submit("One?", says("a", "1"))
    events = talk.submit("/regen --seed 42 temperature=0.1", says("b", "2"))
    assert events[0] == Asking("One?", 2)
    question = talk.backend.questions[-1]
    assert question.seed == 42
    assert contents(question)[-1] == ("user", "One?")
    assert [profile.temperature for profile in talk.backend.adopted] == [0.1, 0.6], "for this turn alone"
    path = archive.path(1)
    assert [turn.answer for turn in path] == ["0", "2"]
    assert path[1].origin is not None
    assert path[1].origin.settings["temperature"] == "0.1"


def test_the_status_is_reported_after_every_turn_even_if_unchanged(talk: Talking) -> None:
    """The screen has counted the thinking meanwhile, and the next question does not send it."""
    first = talk.submit("One?", says("a", "1"))[-1]
    again = talk.submit("/regen", says("a", "1"))[-1]
    assert isinstance(first, ChatStatus)
    assert again == first


def test_regen_draws_another_seed_when_the_seed_is_fixed(talk: Talking) -> None:
    talk.submit("/seed 5")
    talk.submit("One?", says())
    assert talk.backend.questions[-1].seed == 5
    talk.submit("/regen", says())
    assert talk.backend.questions[-1].seed not in (None, 5)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/regen --seed x", "--seed x: allowed is a whole number from 0 to 4,294,967,294 or random."),
        ("/regen hot", "'hot': write key=value, such as temperature=0.6."),
        ("/regen temperature=9", 'temperature is "9", allowed: a number from 0 to 5.'),
        ("/regen temperature=5", "too hot."),
    ],
)
def test_a_refused_regen_changes_nothing(talk: Talking, archive: Archive, line: str, complaint: str) -> None:
    talk.submit("One?", says("a", "1"))
    assert errors(talk.submit(line)) == [complaint]
    assert talk.backend.profile.temperature == 0.6
    assert [turn.answer for turn in archive.path(1)] == ["1"]


def test_undo_removes_the_last_turn_and_shows_the_one_before(talk: Talking, archive: Archive) -> None:
    talk.submit("One?", says("a b", "1"))
    talk.submit("Two?", says("c", "2"))
    events = talk.submit("/undo")
    assert said(events) == ["thought 2 is undone; the history keeps it."]
    assert events[1] == Recalled("One?", 1, 2, 72.0, "1")
    assert [turn.question for turn in archive.path(1)] == ["One?"]
    assert talk.lines("/undo")[-1] == "the conversation stands before its first question."
    assert errors(talk.submit("/undo")) == ["nothing was asked in this conversation yet."]
    talk.submit("Three?", says())
    assert [turn.question for turn in archive.path(1)] == ["Three?"]


def test_an_edited_question_replaces_the_last(talk: Talking, archive: Archive) -> None:
    talk.submit("One?", says("a", "1"))
    talk.submit("Tow?", says("b", "2"))
    assert talk.submit("/edit") == [Edit("Tow?")]
    assert talk.submit("Two?", says("c", "3"))[0] == Asking("Two?", 2)
    assert [(turn.question, turn.answer) for turn in archive.path(1)] == [("One?", "1"), ("Two?", "3")]


def test_edit_with_a_text_needs_no_editor(talk: Talking, archive: Archive) -> None:
    talk.submit("Tow?", says("a", "1"))
    assert talk.submit("/edit Two?", says("b", "2"))[0] == Asking("Two?", 1)
    assert [(turn.question, turn.answer) for turn in archive.path(1)] == [("Two?", "2")]


@pytest.mark.parametrize("line", ["", "/stats"])
def test_after_an_abandoned_edit_a_question_follows_as_usual(
    talk: Talking, archive: Archive, line: str
) -> None:
    talk.submit("One?", says())
    talk.submit("/edit")
    talk.submit(line)
    talk.submit("Two?", says())
    assert [turn.question for turn in archive.path(1)] == ["One?", "Two?"]


def test_retry_from_goes_back_and_asks_again(talk: Talking, archive: Archive) -> None:
    for question in ("One?", "Two?", "Three?"):
        talk.submit(question, says(answer=question.lower()))
    assert talk.submit("/retry-from 2", says(answer="again"))[0] == Asking("Two?", 2)
    assert [turn.answer for turn in archive.path(1)] == ["one?", "again"]
    for wrong in ("0", "3", "x", ""):
        assert "give the number of a thought, 1 to 2." in errors(talk.submit(f"/retry-from {wrong}"))[0]


def test_a_fork_continues_and_leaves_the_original_unchanged(talk: Talking, archive: Archive) -> None:
    talk.submit("One?", says())
    talk.submit("Two?", says())
    assert talk.lines("/fork 1") == ["conversation 2 goes on after thought 1; the one before stays as it is."]
    talk.submit("Three?", says())
    assert [turn.question for turn in archive.path(1)] == ["One?", "Two?"]
    assert [turn.question for turn in archive.path(2)] == ["One?", "Three?"]


def test_clear_begins_a_new_conversation_and_resume_comes_back(talk: Talking, archive: Archive) -> None:
    talk.submit("/system Be kind.")
    talk.submit("One?", says("a", "1"))
    talk.submit("/name first steps")
    assert talk.lines("/clear") == [
        "a new conversation begins with the next question. /resume 1 comes back to 'first steps'."
    ]
    talk.submit("/system none")
    talk.submit("Two?", says())
    assert contents(talk.backend.questions[-1]) == [("user", "Two?")]
    events = talk.submit("/resume first")
    assert [event for event in events if isinstance(event, Recalled)] == [Recalled("One?", 1, 1, 72.0, "1")]
    assert said(events) == ["conversation 1, 'first steps': 1 turn."]
    talk.submit("Three?", says())
    assert contents(talk.backend.questions[-1]) == [
        ("system", "Be kind."),
        ("user", "One?"),
        ("assistant", "1"),
        ("user", "Three?"),
    ]
    assert len(archive.conversations()) == 2
    talk.submit("/resume 2")
    talk.submit("/undo")
    assert talk.lines("/clear")[0].endswith("/resume 2 comes back to '(empty)'.")


def test_a_resumed_conversation_has_its_last_system_prompt_unless_another_is_given(
    talk: Talking, archive: Archive, tmp_path: Path
) -> None:
    talk.submit("One?", says("a", "1"))
    talk.submit("/system Be kind.")
    talk.submit("Two?", says("b", "2"))
    for texts, system in (((), "Be kind."), (("system=Be brief.",), "Be brief.")):
        resumed = talking(archive, tmp_path, resume=1, settings=texts)
        list(resumed.chat.start())
        resumed.submit("Three?", says())
        assert contents(resumed.backend.questions[0])[0] == ("system", system)
        resumed.submit("/undo")


def test_a_name_given_before_the_first_question_is_kept(talk: Talking, archive: Archive) -> None:
    assert talk.lines("/name") == ["this conversation has no name yet."]
    talk.submit("/name plans")
    talk.submit("One?", says())
    assert archive.conversation(1).name == "plans"
    assert talk.lines("/name") == ["this conversation is called 'plans'."]


def test_resume_lists_the_latest_and_names_an_unknown_conversation(talk: Talking) -> None:
    assert talk.lines("/resume") == ["the history is empty."]
    talk.submit("One?", says())
    lines = talk.lines("/resume")
    assert lines[0].endswith("One? · 1 turn · this one")
    assert errors(talk.submit("/resume nothing"))[0].startswith("there is no conversation 'nothing'")


def test_a_conversation_of_another_model_says_so(archive: Archive, tmp_path: Path) -> None:
    other = archive.begin("qwq-32b", "chat", "")
    assert other == 1
    lines = said(talking(archive, tmp_path, resume=1).chat.start())
    assert lines == [
        "conversation 1, '(empty)': 0 turns.",
        "it was answered by qwq-32b, miniature answers now: /model qwq-32b goes back.",
    ]


def test_a_continued_answer_does_not_repeat_how_the_thought_was_closed(talk: Talking) -> None:
    cut = says("a", "b", closed=CloseReason.BUDGET, reason=FinishReason.INTERRUPTED)
    assert talk.lines("One?", cut) == []
    assert talk.lines("/continue", says("", "b c", closed=None)) == []


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (says(closed=CloseReason.BUDGET), "the thinking was ended at its budget of 600 tokens: "),
        (
            says(closed=CloseReason.CONTEXT),
            "the thinking was ended, the context of 1,000 tokens was nearly full: ",
        ),
        (says(closed=CloseReason.LOOP), "the thinking repeated itself and was cut: "),
        (says(reason=FinishReason.MAX_TOKENS), "the answer was cut at max_tokens, 9: /continue goes on"),
        (says(reason=FinishReason.CONTEXT), "the answer was cut, the context of 1,000 tokens is full: /drop"),
        (says(reason=FinishReason.LOOP), "the answer was ended, it repeated itself: "),
        (says(answer="", reason=FinishReason.NO_ANSWER), "no answer came out of the thinking: /continue"),
    ],
)
def test_every_early_end_says_what_to_do_in_one_line(
    archive: Archive, tmp_path: Path, script: Script, line: str
) -> None:
    talk = talking(archive, tmp_path, settings=("max_tokens=9",))
    (said_line,) = talk.lines("One?", script)
    assert said_line.startswith(line)
    assert "/" in said_line.removeprefix(line) or "/" in line


def test_yarn_turning_on_is_reported_once_with_how_to_turn_it_off(talk: Talking) -> None:
    talk.submit("One?", says())
    long = "word " * 1500
    assert talk.lines(long, says()) == [
        "YaRN 2 is on from here: /drop leaves out the oldest turns, /clear begins anew without it."
    ]
    assert talk.lines("Two?", says()) == []


def test_a_prompt_that_does_not_fit_drops_nothing_and_says_what_could_go(
    talk: Talking, tmp_path: Path
) -> None:
    (tmp_path / "big.txt").write_text("word " * 2000)
    talk.submit("word " * 1500, says())
    talk.submit("word " * 1500, says())
    talk.submit("/file big.txt")
    lines = errors(talk.submit("Two?"))
    assert lines[0].startswith("the prompt has 5,0")
    assert (
        lines[1]
        == "oldest turns: thought 1 (1,503 tok), thought 2 (1,503 tok): /drop N leaves out the first N."
    )
    assert lines[2] == "attached: big.txt (2,002 tok): /file drop NAME takes one back."
    assert talk.lines("/drop 2")[0].startswith(
        "left out of what the model sees while this chat runs: thoughts 1-2"
    )
    talk.submit("Two?", says())
    assert len(talk.backend.questions[-1].messages) == 1


def test_every_name_of_the_quit_command_leaves(talk: Talking) -> None:
    for line in ("/exit", "/quit", "/bye"):
        assert Leave() in talk.submit(line)


def test_notices_of_the_archive_are_shown_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite3").write_bytes(b"no database at all " * 100)
    with Archive.open(tmp_path / "history.sqlite3") as archive:
        lines = said(talking(archive, tmp_path).chat.start())
    assert lines == list(archive.notices)
    assert lines


@pytest.mark.parametrize("before", ["", "/system ", "/name ", "/file ", "/set ", "/think grep ", "/save "])
def test_half_a_surrogate_pair_is_refused_anywhere(talk: Talking, before: str) -> None:
    (complaint,) = errors(talk.submit(f"{before}a\ud800b"))
    assert complaint == f"character {len(before) + 2} is half a surrogate pair: give valid Unicode text."
    assert talk.backend.questions == []


def test_an_abandoned_turn_is_written_as_stopped(talk: Talking, archive: Archive) -> None:
    talk.backend.scripts.append(says("a b", "c"))
    events = talk.chat.submit("One?")
    for event in events:
        if isinstance(event, Thinking):
            break
    talk.chat.close()  # while something still holds the events, as a traceback does
    assert next(events, None) is None
    (turn,) = archive.path(1)
    assert (turn.thinking, turn.state) == ("a b", TurnState.STOPPED)
    assert talk.backend.is_closed


def test_a_chat_whose_history_cannot_be_written_continues_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    with Archive.open(path) as archive:
        talk = talking(archive, tmp_path)
        talk.submit("One?", says("a", "1"))
        talk.submit("Two?", says("b", "2"))
        talk.submit("/drop")
        with closing(sqlite3.connect(path)) as other:
            other.execute("DROP TABLE turns")
            other.commit()
        (notice,) = talk.lines("Three?", says("c", "3"))
        assert notice.endswith("This conversation goes on in memory alone: /save keeps it.")
        assert contents(talk.backend.questions[-1]) == [
            ("user", "Two?"),
            ("assistant", "2"),
            ("user", "Three?"),
        ]
        assert talk.lines("Four?", says("d", "4")) == [], "said once"
        assert contents(talk.backend.questions[-1])[0] == ("user", "Two?"), "what was dropped stays dropped"
        assert talk.submit("/think 1") == [Page("thought 1 · 1m12s · 1 tok", "a")]
        assert talk.lines("/save all.md") == [f"saved 4 turns to {tmp_path / 'all.md'}"]
        talk.chat.close()


def test_a_conversation_removed_elsewhere_continues_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    with Archive.open(path) as archive, Archive.open(path) as other:
        talk = talking(archive, tmp_path)
        talk.submit("One?", says("a", "1"))
        other.remove(1)
        events = talk.submit("Two?", says("b", "2"))
        assert said(events)[0].startswith("there is no conversation 1")
        assert contents(talk.backend.questions[-1])[0] == ("user", "One?")
        assert talk.submit("/undo")[1] == Recalled("One?", 1, 1, 72.0, "1")
        talk.chat.close()


def test_two_chats_in_one_conversation_continue_as_two_conversations(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    with Archive.open(path) as mine, Archive.open(path) as theirs:
        one, two = talking(mine, tmp_path), talking(theirs, tmp_path)
        one.submit("One?", says("a", "1"))
        one.submit("Two?", says("b", "2"))
        one.submit("/drop 1")
        two.submit("/resume 1")
        two.submit("Three?", says("c", "3"))
        (notice,) = one.lines("Other three?", says("d", "4"))
        assert (
            notice == "conversation 1 was gone on with elsewhere: this goes on beside it, as conversation 2."
        )
        assert contents(one.backend.questions[-1])[0] == ("user", "Two?"), "what was dropped stays dropped"
        assert one.lines("Four?", says("e", "5")) == [], "said once"
        assert [turn.question for turn in mine.path(1)] == ["One?", "Two?", "Three?"]
        copied = mine.path(2)
        assert [turn.question for turn in copied] == ["One?", "Two?", "Other three?", "Four?"]
        assert copied[0].generated == mine.path(1)[0].generated != ()
        one.submit("/resume 1")
        two.submit("Five?", says("f", "6"))
        (notice,) = one.lines("/regen", says("g", "7"))
        assert notice.endswith("as conversation 3.")
        assert [turn.answer for turn in mine.path(1)] == ["1", "2", "3", "6"]
        assert [turn.answer for turn in mine.path(3)] == ["1", "2", "7"]
        one.chat.close()
        two.chat.close()


KILLED_IN_THOUGHT = """
import sys, threading
from pathlib import Path
from qwq_local.events import Thinking
from qwq_local.history.archive import Archive
from tests.queued_backend import planned, talking

path = Path(sys.argv[1])

def thinks(backend, question):
    yield from planned(backend, question)
    yield Thinking("Half a thought")
    with Archive.open(path) as reader:
        while not reader.path(1)[0].thinking:
            threading.Event().wait(0.01)
    print("written", flush=True)
    threading.Event().wait()

talking(Archive.open(path), path.parent).submit("One?", thinks)
"""


def test_after_a_kill_in_mid_thought_the_next_start_offers_to_continue(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    root = Path(__file__).parent.parent.parent
    program = [sys.executable, "-c", KILLED_IN_THOUGHT, str(path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=root) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "written\n"
        running.kill()
    with Archive.open(path) as archive:
        assert archive.lost(), "another program may be the first to notice"
        talk = talking(archive, tmp_path)
        assert said(talk.chat.start()) == [
            "thought 1 of 'One?' was cut off when its process ended: /continue goes on, /resume 1 opens it."
        ]
        again = talk.submit("/continue", says("Half a thought more", "Done."))
        assert isinstance(again[0], Recalled)
        assert said(again) == ["conversation 1, 'One?': 1 turn."]
        assert Asking("One?", 1, continued=True, thinking="Half a thought") in again
        assert [turn.answer for turn in archive.path(1)] == ["Done."]
        talk.submit("/clear")
        assert "/resume lists" in errors(talk.submit("/continue"))[0]


QUESTIONS = ("One?", "/regen", "/regen --seed 3 temperature=0.1", "/continue", "/edit Two?", "/retry-from 1")
OTHERS = (
    "/undo",
    "/edit",
    "",
    "/fork",
    "/fork 1",
    "/clear",
    "/name x",
    "/resume 1",
    "/resume x",
    "/drop none",
    "/set temperature 1",
    "/model other",
    "/context",
    "/think",
    "/copy code",
    "/plan",
    "/retry-from 7",
)
OUTCOMES = {
    "answers": says("t", "answer"),
    "ends without an answer": says("t", "", reason=FinishReason.NO_ANSWER),
    "is stopped": says("t", "", reason=FinishReason.INTERRUPTED, closed=None),
    "is cut": says("t", "half", reason=FinishReason.MAX_TOKENS),
    "does not fit": fails(PromptTooLong("too long.")),
    "breaks at once": fails(EngineError("broke."), after=()),
    "breaks later": fails(EngineError("broke."), after=[Thinking("t")]),
    "is aborted": fails(Aborted()),
}


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(sorted(OUTCOMES))) | st.sampled_from(OTHERS)
    )
)
def test_after_any_lines_the_model_sees_the_path_of_the_archive(
    lines: list[str | tuple[str, str]],
) -> None:
    with Archive.private() as archive:
        talk = talking(archive, Path("/"))
        for entered in lines:
            line, outcome = (entered, "answers") if isinstance(entered, str) else entered
            talk.submit(line, OUTCOMES[outcome])
            talk.backend.scripts.clear()
        last = talk.submit("Last?", says("t", "so"))
        (asking,) = [event for event in last if isinstance(event, Asking)]
        paths = [archive.path(record.id) for record in archive.conversations()]
        (path,) = [each for each in paths if each and each[-1].question == "Last?"]
    assert asking.thought == len(path) == path[-1].number
    expected = [
        part
        for turn in path[:-1]
        if turn.answer
        for part in (("user", turn.content), ("assistant", turn.answer))
    ]
    assert contents(talk.backend.questions[-1]) == [*expected, ("user", "Last?")]
