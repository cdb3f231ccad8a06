"""Messages: their rules, the answer of a reply, and the parts of a question."""

from __future__ import annotations

from typing import Any, cast

import pytest

from qwq_local.dialogue.conversation import (
    Attachment,
    Framing,
    Message,
    Role,
    SplitReply,
    answer_of,
    check_conversation,
    check_json,
    split_reply,
)
from qwq_local.errors import UsageError
from qwq_local.events import ToolCall

QUESTION = Message(Role.USER, "How many?")
THOUGHT = Message(Role.ASSISTANT, "<think>\nold thoughts\n</think>\n\nThree.")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Three.", "Three."),
        ("<think>\na\n</think>\n\nThree.", "Three."),
        ("a\n</think>\n\n  indented", "  indented"),
        ("a</think>b</think>\nc", "c"),
        ("<think>\nnever closed", ""),
        ("a</think>", ""),
        ("The tag `</think>` closes it.", "The tag `</think>` closes it."),
        ("a\n</think>\n\nWrite:\n```\n</think>\n```\n", "Write:\n```\n</think>\n```\n"),
        ("a\n```\ncut</think>\n\nThree:\n```\n3\n```", "Three:\n```\n3\n```"),
        ("\n\nThree.", "Three."),
        ("", ""),
    ],
)
def test_the_answer_of_a_reply_is_what_follows_the_thinking(reply: str, answer: str) -> None:
    assert answer_of(reply) == answer


@pytest.mark.parametrize(
    ("reply", "thinking", "answer"),
    [
        ("Three.", None, "Three."),
        ("<think>\na\n</think>\n\nThree.", "\na\n", "\n\nThree."),
        ("a\n</think>b", "a\n", "b"),
        ("<think></think>", "", ""),
        ("<think>\nnever closed", "\nnever closed", ""),
        ("<think>a `</think>` b", "a `", "` b"),
    ],
)
def test_a_reply_is_split_at_its_thinking(reply: str, thinking: str | None, answer: str) -> None:
    assert split_reply(reply) == SplitReply(thinking, answer)


def test_files_come_first_and_the_question_last() -> None:
    files = (Attachment("a.txt", "one"), Attachment("b.md", "two\n"))
    (message,) = Framing("", files).messages("Which?\n", "piped\n")
    assert message == Message(Role.USER, "```a.txt\none\n```\n\n```b.md\ntwo\n```\n\npiped\n\nWhich?")


def test_a_fence_is_longer_than_any_run_of_backticks_in_the_file() -> None:
    content = Framing("", (Attachment("a.md", "```\ncode\n`````\n"),)).messages("")[0].content
    assert content == "``````a.md\n```\ncode\n`````\n``````"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb.txt", "a b.txt"),
        ("\x1b[31mred\u202e\u2028.txt", "[31mred .txt"),
        ("`tick`", "'tick'"),
        ("\n", "file"),
        ("x" * 5000, "…" + "x" * 199),
    ],
)
def test_a_file_name_stays_on_its_line(name: str, shown: str) -> None:
    first = Framing("", (Attachment(name, "t"),)).messages("q")[0].content.split("\n")[0]
    assert first == "```" + shown


def test_an_empty_question_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="nothing to ask"):
        Framing("").messages("", " \n")


@pytest.mark.parametrize("arguments", ['{"a": 1}', ["a"], None, {"a": object()}, {1: 2}, {"a": "\ud800"}])
def test_arguments_that_are_not_a_json_object_are_refused(arguments: Any) -> None:
    with pytest.raises(UsageError):
        Message(Role.ASSISTANT, "", (ToolCall("add", arguments),))


def test_messages_that_are_not_a_conversation_are_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        check_conversation([])
    with pytest.raises(UsageError, match="last message"):
        check_conversation([QUESTION, THOUGHT])
    with pytest.raises(UsageError, match="surrogate"):
        Message(Role.USER, "a\udcff")
    with pytest.raises(UsageError, match="Only the assistant"):
        Message(Role.USER, "a", (ToolCall("add", {}),))
    with pytest.raises(UsageError, match="got a NoneType"):
        Message(Role.USER, cast(str, None))


def test_json_nested_too_deeply_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(UsageError, match="nesting"):
        check_json(value, "a tool")
