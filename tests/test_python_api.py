"""The public Python API: the examples of docs/python.md, closing, Ctrl-C and wrong input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import qwq_local
from qwq_local.api import Model
from qwq_local.backend.api import ReplyRequest
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.errors import Aborted, ProfileError, UsageError
from qwq_local.events import Answer, Event, Finished, FinishReason, Notice, Thinking, TurnStats
from qwq_local.profiles.keys import Profile
from tests.command import ROOT, environment
from tests.queued_backend import PlanningBackend, QueuedBackend, fails, says

DOCUMENT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
RUNS_ALL = """
import sys
for example in sys.argv[1:]:
    exec(compile(example, "docs/python.md", "exec"), {})
    print("---", flush=True)
"""
INTERRUPTED = Finished(FinishReason.INTERRUPTED, TurnStats(), "", "")


def asked(backend: QueuedBackend, **settings: str) -> Model:
    return Model(backend, Profile(**settings))  # type: ignore[arg-type]


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    """With the miniature in place of QwQ-32B, and greedy."""
    (tmp_path / "notes.txt").write_text("Nothing happened on Monday.\nThe pass key is 4711.\nIt rained.\n")
    ran = subprocess.run(
        [sys.executable, "-c", RUNS_ALL, *(text.replace('"qwq-32b"', '"miniature"') for text in EXAMPLES)],
        cwd=tmp_path,
        env=environment(tmp_path, QWQ_TEMPERATURE="0"),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    card, streamed, conversation, schema, file, cut, rest = ran.stdout.split("---\n")
    assert "\\boxed{3}" in card
    assert re.fullmatch(r".*\\boxed\{2\}\nstop, \d+ tokens of thinking\n", streamed, re.DOTALL)
    assert "I count e in tree" in ran.stderr
    assert "\\boxed{3}" in conversation
    assert schema == "['count', 'word']\n"
    assert "4711" in file
    assert re.fullmatch(r"max_tokens '.+'\n", cut)
    assert rest == ""
    assert not (tmp_path / "data").exists()


def test_what_the_documentation_calls_public_is_what_the_package_exports() -> None:
    section = DOCUMENT.partition("## What is public\n")[2]
    named = {name.removeprefix("qwq_local.") for name in re.findall(r"`([\w.]+)`", section)}
    assert named == {*qwq_local.__all__, "events", "errors"}
    assert all(getattr(qwq_local, name) for name in qwq_local.__all__)
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = qwq_local.opne  # type: ignore[attr-defined]


def test_a_conversation_goes_with_system_prompt_suffix_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    backend = QueuedBackend([says(), says()])
    model = asked(backend, system="Be brief.", question_suffix="Step by step.")
    messages: list[Message | Mapping[str, object]] = [
        {"role": "user", "content": "One?"},
        Message(Role.ASSISTANT, "Yes."),
        Message(Role.USER, "Two?"),
    ]
    assert model.answer(messages, files=[tmp_path / "a.txt"], seed=5) == "It is so."
    question = backend.questions[0]
    fenced = f"```{tmp_path / 'a.txt'}\nfirst\n```"
    assert [(each.role, each.content) for each in question.messages] == [
        (Role.SYSTEM, "Be brief."),
        (Role.USER, "One?\nStep by step."),
        (Role.ASSISTANT, "Yes."),
        (Role.USER, f"{fenced}\n\nTwo?\nStep by step."),
    ]
    assert (question.seed, question.files, question.wants_tokens) == (5, [fenced], False)
    model.answer([{"role": "system", "content": "Sing."}, {"role": "user", "content": "Three?"}])
    assert [each.content for each in backend.questions[1].messages] == ["Sing.", "Three?\nStep by step."]


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ("", {}, "nothing to ask"),
        ([], {}, "conversation is empty"),
        ([{"role": "assistant", "content": "Yes."}], {}, "nothing to answer"),
        ([{"role": "user"}], {}, "got a NoneType"),
        (
            [{"role": "oracle", "content": "?"}],
            {},
            "the role of a message is 'oracle', allowed: system, user",
        ),
        ([{"role": "user", "content": "?", "tone": "low"}], {}, "a message has tone, allowed: role"),
        ([Message(Role.TOOL, "4")], {"files": ["a.txt"]}, "a.txt cannot be read"),
        ([Message(Role.TOOL, "4")], {"files": [__file__]}, "files go with a question"),
        ("?", {"seed": -1}, "seed is -1, allowed"),
        ("?", {"regex": "a", "grammar": "start: /a/"}, "obeys one of json_schema, regex and grammar"),
        ("?", {"regex": "["}, "unclosed character class"),
        ("?", {"json_schema": {"enum": {1}}}, "json_schema is not JSON"),
        ("?", {"json_schema": {"type": "text"}}, "#/type"),
    ],
)
def test_wrong_input_is_refused_before_the_backend_is_asked(
    messages: object, options: dict[str, object], message: str
) -> None:
    backend = QueuedBackend()
    with pytest.raises(UsageError, match=re.escape(message)):
        asked(backend).reply(messages, **options)  # type: ignore[arg-type]
    assert backend.questions == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot"}, 'qwq_local.open: temperature is "hot", allowed: a number from 0 to 5.'),
        ({"temprature": 1}, 'qwq_local.open: there is no key "temprature". Did you mean temperature?'),
    ],
)
def test_a_wrong_setting_is_refused_when_the_model_is_opened(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ProfileError, match=re.escape(message)):
        qwq_local.open("miniature", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", [reason for reason in FinishReason if reason != FinishReason.STOP])
def test_an_incomplete_answer_raises_with_the_text_so_far(reason: FinishReason) -> None:
    with pytest.raises(
        qwq_local.IncompleteAnswer, match="2 tokens of thinking and 3 of the answer"
    ) as raised:
        asked(QueuedBackend([says("Hm. So.", "It is half", reason=reason)])).answer("Is it so?")
    assert (raised.value.finished.reason, raised.value.finished.answer) == (reason, "It is half")


def test_a_closed_model_refuses_and_a_new_reply_ends_the_one_before() -> None:
    ended: list[str] = []

    def endless(_backend: QueuedBackend, _request: ReplyRequest) -> Iterator[Event]:
        try:
            while True:
                yield Thinking("On.")
        finally:
            ended.append("ended")

    backend = QueuedBackend([endless, says(), endless])
    with asked(backend) as model:
        first = model.reply("One?")
        assert next(first) == Thinking("On.")
        assert model.answer("Two?") == "It is so."
        assert ended == ["ended"]
        assert next(first, None) is None
        next(model.reply("Three?"))
    assert ended == ["ended", "ended"]
    assert backend.is_closed
    with pytest.raises(UsageError, match="closed"):
        model.reply("Four?")


def test_ctrl_c_raises_after_the_reply_has_stopped() -> None:
    seen: list[str] = []

    def interrupted(backend: QueuedBackend, _request: ReplyRequest) -> Iterator[Event]:
        yield Thinking("Hm.")
        signal.raise_signal(signal.SIGINT)
        assert backend.stopped.wait(60)
        yield Answer("Half")
        seen.append("finished")
        yield INTERRUPTED

    model = asked(QueuedBackend([interrupted, says()]))
    events = model.reply("Is it so?")
    assert next(events) == Thinking("Hm.")
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert seen == ["finished"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert model.answer("And now?") == "It is so."


def test_a_script_that_handles_ctrl_c_itself_keeps_its_handler() -> None:
    presses: list[int] = []

    def pressing(_backend: QueuedBackend, _request: ReplyRequest) -> Iterator[Event]:
        signal.raise_signal(signal.SIGINT)
        yield Finished(FinishReason.STOP, TurnStats(), "", "Whole.")

    before = signal.signal(signal.SIGINT, lambda number, _frame: presses.append(number))
    try:
        assert asked(QueuedBackend([pressing])).answer("Is it so?") == "Whole."
    finally:
        signal.signal(signal.SIGINT, before)
    assert presses == [signal.SIGINT]


def test_another_thread_may_ask_and_stop() -> None:
    def waiting(backend: QueuedBackend, _request: ReplyRequest) -> Iterator[Event]:
        yield Thinking("Waiting.")
        assert backend.stopped.wait(60)
        yield INTERRUPTED

    model, events = asked(QueuedBackend([waiting, fails(Aborted())])), []
    began = threading.Event()

    def run() -> None:
        for event in model.reply("Is it so?"):
            events.append(event)
            began.set()
        events.extend(model.reply("And now?"))  # stopped while it loads

    thread = threading.Thread(target=run)
    thread.start()
    assert began.wait(60)
    model.stop()
    thread.join()
    assert events == [Thinking("Waiting."), INTERRUPTED, INTERRUPTED]


def test_notices_come_first_and_the_prompt_is_kept_last() -> None:
    backend = PlanningBackend([says("", ""), says("", "")], kept=["kept."])
    model = Model(backend, Profile(logprobs=2), ["a GPU is idle."])
    first, second = list(model.reply("One?")), list(model.reply("Two?"))
    assert first[0] == Notice("a GPU is idle.")
    assert second[0] != first[0]
    assert [second[-2:], first[-1:]] == [[first[-2], Notice("kept.")], [Notice("kept.")]]
    assert backend.questions[0].wants_tokens


def test_importing_the_package_loads_nothing_else() -> None:
    program = "import sys, qwq_local; print(sorted(name for name in sys.modules if name.startswith('qwq_')))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    assert result.stdout == "['qwq_local']\n", result.stderr
