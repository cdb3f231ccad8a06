"""A chat with the real miniature: questions, stops, continuing, steering, undo, resuming after a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.backend.local import LocalBackend
from qwq_local.chat.chat import Chat
from qwq_local.chat.events import Asking, ChatEvent, ChatStatus, Recalled
from qwq_local.chat.model import ChatSetup
from qwq_local.errors import AbortFlag
from qwq_local.events import (
    Answer,
    CloseReason,
    Finished,
    FinishReason,
    Generated,
    Loading,
    Planned,
    Prefill,
    Steered,
    Thinking,
    ThinkingClosed,
)
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnState
from qwq_local.paths import Directories
from qwq_local.profiles.layers import ResolvedProfile, profile_folders, resolve
from tests.queued_backend import errors, said

QUESTION = "How many r's are in the word strawberry?"


@contextmanager
def chatting(
    miniature: Callable[[str], Path],
    archive: Archive,
    tmp_path: Path,
    *settings: str,
    resume: int | None = None,
) -> Iterator[Chat]:
    folders = profile_folders(Directories(tmp_path, tmp_path, tmp_path))

    def make_backend(model: str, resolved: ResolvedProfile) -> LocalBackend:
        file_type = model.partition(":")[2] or "Q8_0"
        return LocalBackend(miniature(file_type), resolved.profile, 1, AbortFlag(), takes_largest=True)

    def resolved(model: str, profile: str | None, texts: Sequence[str]) -> ResolvedProfile:
        return resolve(model, profile, folders, {}, texts)

    setup = ChatSetup(
        archive, make_backend, resolved, "miniature", "chat", settings=settings, resume=resume, cwd=tmp_path
    )
    with closing(Chat(setup)) as chat:
        yield chat


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def chat(miniature: Callable[[str], Path], archive: Archive, tmp_path: Path) -> Iterator[Chat]:
    with chatting(miniature, archive, tmp_path, "temperature=0") as opened:
        yield opened


def finished(events: Sequence[ChatEvent]) -> Finished:
    (last,) = [event for event in events if isinstance(event, Finished)]
    return last


def submit_until(chat: Chat, line: str, when: type, do: Callable[[], None], nth: int = 1) -> list[ChatEvent]:
    """The events of a line; `act` runs at the nth event of a kind."""
    events: list[ChatEvent] = []
    for event in chat.submit(line):
        events.append(event)
        if isinstance(event, when) and sum(isinstance(each, when) for each in events) == nth:
            do()
    return events


def test_a_question_is_answered_and_the_next_one_sees_it(chat: Chat, archive: Archive) -> None:
    first = chat.submit(QUESTION)
    events = list(first)
    assert "3" in finished(events).answer
    assert isinstance(events[-1], ChatStatus)
    second = list(chat.submit("How many e's are in the word tree?"))
    (plan,) = [event for event in second if isinstance(event, Planned)]
    assert plan.ledger.history > 0
    assert plan.ledger.thinking_dropped > 0
    assert [event.cached for event in second if isinstance(event, Prefill)][-1] > 0
    one, two = archive.path(1)
    assert (one.state, two.state) == (TurnState.DONE, TurnState.DONE)
    assert one.origin is not None
    assert one.origin.identity
    assert two.prompt[: len(one.prompt)] != one.prompt or len(two.prompt) > len(one.prompt)


def continues(event: ChatEvent, cut: Finished) -> bool:
    """Whether the event continues the cut thought and gives its time."""
    assert isinstance(event, Asking)
    assert 0 < event.thinking_s < 60
    expected = Asking(QUESTION, 1, continued=True, thinking=cut.thinking)
    return replace(event, thinking_s=0.0) == expected


def test_a_stopped_thought_continues_to_the_same_text(chat: Chat, archive: Archive) -> None:
    whole = finished(list(chat.submit(QUESTION)))
    list(chat.submit("/clear"))
    events = submit_until(chat, QUESTION, Thinking, chat.stop, nth=4)
    cut = finished(events)
    assert cut.reason is FinishReason.INTERRUPTED
    assert whole.thinking.startswith(cut.thinking)
    assert cut.answer == ""
    again = list(chat.submit("/continue"))
    assert continues(again[0], cut)
    assert finished(again).thinking == whole.thinking
    assert finished(again).answer == whole.answer
    (turn,) = archive.path(2)
    assert (turn.thinking, turn.answer, turn.state) == (whole.thinking, whole.answer, TurnState.DONE)
    assert turn.origin is not None
    assert turn.origin.is_continued


def test_a_stop_while_it_loads_leaves_nothing_and_the_next_question_loads_again(
    chat: Chat, archive: Archive
) -> None:
    events = submit_until(chat, QUESTION, Loading, chat.stop)
    assert said(events) == ["stopped."]
    assert archive.conversations() == []
    assert finished(list(chat.submit(QUESTION))).reason is FinishReason.STOP


def test_a_thought_continues_after_a_restart(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    with Archive.open(path) as archive, chatting(miniature, archive, tmp_path, "temperature=0") as chat:
        whole = finished(list(chat.submit(QUESTION)))
        list(chat.submit("/clear"))
        cut = finished(submit_until(chat, QUESTION, Thinking, chat.stop, nth=4))
    with (
        Archive.open(path) as archive,
        chatting(miniature, archive, tmp_path, "temperature=0", resume=2) as chat,
    ):
        assert [event for event in chat.start() if isinstance(event, Recalled)]
        again = list(chat.submit("/continue"))
        assert continues(again[0], cut)
        assert (finished(again).thinking, finished(again).answer) == (whole.thinking, whole.answer)


def test_another_quantization_is_not_continued(chat: Chat, archive: Archive) -> None:
    submit_until(chat, QUESTION, Thinking, chat.stop, nth=4)
    list(chat.submit("/model miniature:BF16"))
    (complaint,) = errors(list(chat.submit("/continue")))
    assert complaint.startswith("thought 1 is by miniature (header:")
    assert "/model miniature goes back, /regen asks again." in complaint
    list(chat.submit("/model miniature"))
    assert finished(list(chat.submit("/continue"))).answer
    assert len(archive.path(1)) == 1


def test_regen_with_the_same_seed_says_the_same(
    miniature: Callable[[str], Path], archive: Archive, tmp_path: Path
) -> None:
    with chatting(
        miniature, archive, tmp_path, "temperature=3", "top_k=0", "top_p=1", "max_tokens=40"
    ) as chat:
        texts = [
            finished(list(chat.submit(line))) for line in (QUESTION, "/regen --seed 5", "/regen --seed 5")
        ]
        other = finished(list(chat.submit("/regen --seed 6")))
    assert (texts[1].thinking, texts[1].answer) == (texts[2].thinking, texts[2].answer)
    assert other.thinking != texts[1].thinking
    (turn,) = archive.path(1)
    assert turn.origin is not None
    assert turn.origin.seed == 6


def test_a_steered_thought_has_the_users_sentence_and_continues(chat: Chat, archive: Archive) -> None:
    def steer() -> None:
        chat.pause()
        chat.steer("Let me count again.")

    events = submit_until(chat, QUESTION, Thinking, steer, nth=3)
    (steered,) = [event for event in events if isinstance(event, Steered)]
    assert "Let me count again." in steered.text
    assert finished(events).thinking.count("Let me count again.") == 1
    (turn,) = archive.path(1)
    assert turn.steered == (steered.text,)
    assert turn.thinking == finished(events).thinking
    at = [type(event) for event in events].index(Steered)
    assert any(isinstance(event, Thinking) for event in events[at + 1 :])


def test_answer_now_closes_the_thought_and_answers(chat: Chat, archive: Archive) -> None:
    events = submit_until(chat, QUESTION, Thinking, chat.answer_now, nth=2)
    (closed,) = [event for event in events if isinstance(event, ThinkingClosed)]
    assert closed.reason is CloseReason.ASKED
    assert any(isinstance(event, Answer) for event in events)
    (turn,) = archive.path(1)
    assert turn.closed is CloseReason.ASKED


def test_undo_forgets_a_turn_for_the_model(chat: Chat, archive: Archive) -> None:
    list(chat.submit(QUESTION))
    list(chat.submit("How many e's are in the word tree?"))
    list(chat.submit("/undo"))
    list(chat.submit("How many o's are in the word book?"))
    assert [turn.number for turn in archive.path(1)] == [1, 2]
    planned = [event for event in chat.submit("/regen") if isinstance(event, Planned)]
    assert planned[0].prompt_tokens == len(archive.path(1)[-1].prompt)


def test_the_budget_ends_a_thought_with_a_hint(
    miniature: Callable[[str], Path], archive: Archive, tmp_path: Path
) -> None:
    with chatting(miniature, archive, tmp_path, "temperature=0") as chat:
        list(chat.submit("/set thinking_budget 3"))
        events = list(chat.submit(QUESTION))
    assert said(events)[0] == (
        "the thinking was ended at its budget of 3 tokens: /set thinking_budget N, then /regen."
    )


def test_a_file_past_the_window_switches_yarn_on_and_clear_switches_it_off(
    chat: Chat, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("The cat sat on the mat. " * 60)
    lines = said(list(chat.submit("/file long.txt")))
    assert "YaRN 2 needed: window 2,048" in lines[-1]
    events = submit_until(chat, "What sat?", Thinking, chat.stop, nth=2)
    planned = [event for event in events if isinstance(event, Planned)]
    assert planned[0].yarn_factor == 2
    assert any("YaRN 2 is on from here" in line for line in said(events))
    list(chat.submit("/clear"))
    planned = [event for event in chat.submit(QUESTION) if isinstance(event, Planned)]
    assert planned[0].yarn_factor == 1


def test_a_prompt_that_does_not_fit_is_an_error_that_suggests_what_to_remove(
    chat: Chat, tmp_path: Path
) -> None:
    (tmp_path / "huge.txt").write_text("The cat sat on the mat. " * 600)
    lines = said(list(chat.submit("/file huge.txt")))
    assert any(line.startswith("the prompt has ") for line in lines)
    assert lines[-1].startswith("attached: huge.txt (")
    assert errors(list(chat.submit("What sat?")))[-1].startswith("attached: huge.txt (")


def test_the_ledger_and_the_plan_are_shown_before_a_model_is_loaded(chat: Chat) -> None:
    lines = said(list(chat.submit("/context")))
    assert lines[0].endswith("·")
    assert lines[-1].endswith("of 1,024 tokens")
    assert said(list(chat.submit("/plan")))[0].startswith("context 1,024 · ")


def test_tokens_are_recorded(chat: Chat, archive: Archive) -> None:
    events = list(chat.submit(QUESTION))
    tokens: list[int] = []
    for event in events:
        if isinstance(event, Generated):
            tokens[event.start :] = event.tokens
    (turn,) = archive.path(1)
    assert list(turn.generated) == tokens
    assert turn.stats.thinking_tokens + turn.stats.answer_tokens <= len(tokens)
