"""A chat over a backend that only answers: what it cannot do is absent, not an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwq_local.chat.chat import Chat
from qwq_local.chat.commands.registry import COMMANDS
from qwq_local.chat.events import Asking, ChatEvent, ChatStatus, Recalled
from qwq_local.errors import EngineError
from qwq_local.events import CloseReason, FinishReason, Thinking
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnState
from tests.queued_backend import QueuedBackend, Script, chat_setup, errors, fails, said, says

ABSENT = ("context", "plan", "set", "profile", "continue")


@dataclass
class BareTalk:
    """A chat and its backend."""

    chat: Chat
    backend: QueuedBackend

    def submit(self, line: str, *scripts: Script) -> list[ChatEvent]:
        self.backend.scripts.extend(scripts)
        return list(self.chat.submit(line))

    def lines(self, line: str, *scripts: Script) -> list[str]:
        return said(self.submit(line, *scripts))


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def talk(archive: Archive, tmp_path: Path) -> Iterator[BareTalk]:
    backend = QueuedBackend()
    with closing(Chat(chat_setup(archive, tmp_path, lambda _model, _profile: backend))) as chat:
        yield BareTalk(chat, backend)


def test_a_question_is_answered_and_kept(talk: BareTalk, archive: Archive) -> None:
    assert list(talk.chat.start()) == [ChatStatus("miniature", 0, 0, 1.0, "not kept")]
    events = talk.submit("Is it so?", says("Hm.", "It is."))
    assert [type(event).__name__ for event in events] == [
        "Asking",
        "Thinking",
        "ThinkingClosed",
        "Answer",
        "Finished",
        "ChatStatus",
    ]
    assert events[0] == Asking("Is it so?", 1, can_continue=False)
    (turn,) = archive.path(1)
    assert (turn.question, turn.thinking, turn.answer, turn.state) == (
        "Is it so?",
        "Hm.",
        "It is.",
        TurnState.DONE,
    )
    talk.submit("And now?", says())
    assert [message.content for message in talk.backend.questions[-1].messages] == [
        "Is it so?",
        "It is.",
        "And now?",
    ]


def test_commands_that_it_cannot_serve_are_neither_listed_nor_offered(talk: BareTalk) -> None:
    listed = [line.split()[0] for line in talk.lines("/help")]
    offered = [completion.text for completion in talk.chat.complete("/")]
    for command in COMMANDS:
        for names in (listed, offered):
            assert (f"/{command.name}" in names) == (command.name not in ABSENT)
    for name in ABSENT:
        assert errors(talk.submit(f"/{name}"))[0].startswith(f"there is no command /{name}. ")
    assert [completion.text for completion in talk.chat.complete("/regen ")] == ["--seed"]


def test_seed_and_system_prompt_go_with_the_question(talk: BareTalk) -> None:
    assert talk.lines("/system Be brief.") == ["from the next question on there is a new system prompt."]
    assert talk.lines("/seed 5") == ["seed 5 · set here"]
    talk.submit("One?", says())
    question = talk.backend.questions[-1]
    assert (question.messages[0].content, question.seed) == ("Be brief.", 5)
    talk.submit("/regen --seed 6", says())
    assert talk.backend.questions[-1].seed == 6
    assert errors(talk.submit("/regen temperature=1")) == [
        "miniature takes no other settings than the seed and the system prompt."
    ]


def test_files_go_without_their_tokens(talk: BareTalk, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    assert talk.lines("/file a.txt") == ["a.txt", "1 file waits for the next question."]
    talk.submit("What is it?", says())
    assert talk.backend.questions[-1].messages[-1].content.startswith("```a.txt\nfirst\n```")
    assert said(talk.submit("See @a.txt", says())) == ["a.txt"]


def test_every_listed_command_works(talk: BareTalk, tmp_path: Path) -> None:
    talk.submit("One?", says("a", "1"))
    talk.submit("Two?", says("b", "2"))
    for line in ("/stats", "/think", "/think grep a", "/copy", "/save all.md", "/name x", "/history"):
        assert not errors(talk.submit(line)), line
    assert talk.lines("/drop")[0].startswith(
        "left out of what the model sees while this chat runs: thought 1; "
    )
    assert not errors(talk.submit("/model other"))
    for line in ("/regen", "/edit Three?", "/retry-from 1"):
        assert not errors(talk.submit(line, says())), line
    for line in ("/fork", "/undo", "/clear", "/resume 1", "/help resume"):
        assert not errors(talk.submit(line)), line


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (says(closed=CloseReason.BUDGET), ["the thinking was ended at its budget."]),
        (says(reason=FinishReason.MAX_TOKENS), ["the answer was cut at max_tokens, 0."]),
        (
            says(answer="", reason=FinishReason.NO_ANSWER),
            ["no answer came out of the thinking: /regen tries another seed."],
        ),
        (fails(EngineError("it broke."), after=[]), ["it broke."]),
    ],
)
def test_after_an_early_end_only_listed_commands_are_suggested(
    talk: BareTalk, script: Script, lines: list[str]
) -> None:
    assert talk.lines("One?", script) == lines


def test_text_before_an_error_is_kept(talk: BareTalk, archive: Archive) -> None:
    failing = fails(EngineError("it broke."), after=[Thinking("Half")])
    assert errors(talk.submit("One?", failing)) == ["it broke.", "what came is kept."]
    assert archive.path(1)[0].thinking == "Half"
    events = talk.submit("/resume 1")
    assert isinstance(events[0], Recalled)
    assert said(events) == ["conversation 1, 'One?': 1 turn."]
