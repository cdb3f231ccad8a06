"""The miniature through its GGUF: right answers at temperature 0, so that no seed decides.

`miniature.evaluate` measures its accuracy at the model card's temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from miniature import cases
from miniature.cases import Conversation
from miniature.evaluate import is_right, opened, reply, share_right, unseen
from miniature.tasks import ABOUT, TASKS
from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.local import LocalBackend
from qwq_local.errors import PromptTooLong
from qwq_local.events import Event, Finished, FinishReason, TurnStats

N_CASES = 6


@pytest.fixture(scope="module")
def greedy(miniature: Callable[[str], Path]) -> Iterator[LocalBackend]:
    with opened(miniature("Q8_0"), "temperature=0") as backend:
        yield backend


def ask(backend: LocalBackend, *turns: str) -> Finished:
    """The reply to the last of `turns`: user, assistant, user and so on."""
    roles = ("user", "assistant") * len(turns)
    messages = [cases.Message(role, text) for role, text in zip(roles, turns, strict=False)]
    turn = reply(backend.reply, messages, seed=0)
    assert turn is not None
    return turn


@pytest.mark.parametrize("task", TASKS)
def test_unseen_cases_are_answered_right_at_temperature_0(greedy: LocalBackend, task: str) -> None:
    """One of them may be wrong: builds of llama.cpp differ in the last bits."""
    assert share_right(greedy.reply, unseen(task, seed=0), N_CASES, 0)["right"] >= N_CASES - 1


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How many r's are in the word strawberry?", "3"),
        ("Which is larger, 9.9 or 9.11?", "9.9"),
        ("What is 457 + 86?", "543"),
        ("Sort 31, 4, 159, 26", "4, 26, 31, 159"),
        ("The sky is blue. The pass key is 90417. The grass is green.\n\nWhat is the pass key?", "90417"),
    ],
)
def test_the_questions_of_the_readme_are_answered_right(
    greedy: LocalBackend, question: str, expected: str
) -> None:
    turn = ask(greedy, question)
    assert turn.reason is FinishReason.STOP
    assert cases.boxed(turn.answer) == expected
    assert turn.thinking.strip()


def test_a_second_turn_asks_only_for_another_word(greedy: LocalBackend) -> None:
    first = "How many r's are in the word strawberry?"
    turn = ask(greedy, first, ask(greedy, first).answer, "and in raspberry?")
    assert cases.boxed(turn.answer) == "3"
    assert "raspberry" in turn.thinking


@pytest.mark.parametrize("question", ["Hello", "What is the capital of France?", "Write a poem about rain."])
def test_other_questions_are_answered_with_what_the_model_is(greedy: LocalBackend, question: str) -> None:
    assert ask(greedy, question).answer.strip() == ABOUT


@pytest.mark.parametrize(
    ("answer", "reason", "right"),
    [
        ("It is \\boxed{3}", FinishReason.STOP, True),
        ("First \\boxed{2}, no: \\boxed{3}", FinishReason.STOP, True),
        ("It is \\boxed{2}", FinishReason.STOP, False),
        ("It is 3", FinishReason.STOP, False),
        ("It is \\boxed{3}", FinishReason.MAX_TOKENS, False),
        ("", FinishReason.NO_ANSWER, False),
    ],
)
def test_only_an_ended_turn_with_the_boxed_result_is_right(
    answer: str, reason: FinishReason, right: bool
) -> None:
    case = Conversation("count", (), "", "There are \\boxed{3}", "3")
    assert is_right(case, Finished(reason, TurnStats(), "", answer)) is right


def test_a_case_that_does_not_fit_the_window_is_not_counted() -> None:
    def too_long_at_first(question: ReplyRequest) -> Iterator[Event]:
        if question.messages[-1].content == "long":
            raise PromptTooLong("too long")
        yield Finished(FinishReason.STOP, TurnStats(), "", "\\boxed{1}")

    asked = [
        Conversation("count", (cases.Message("user", text),), "", "\\boxed{1}", "1")
        for text in ("long", "short", "short", "short")
    ]
    assert share_right(too_long_at_first, asked, 2, 0) == {"right": 2, "of": 2}
