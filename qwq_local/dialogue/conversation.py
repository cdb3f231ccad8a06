"""Messages: who says what, the answer in a reply, and a question made of files, standard input and text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from qwq_local.dialogue.thinking import CLOSE, OPEN
from qwq_local.errors import UsageError
from qwq_local.events import ToolCall

MAX_FILE_NAME_LENGTH = 200
MAX_JSON_DEPTH = 64
_QUOTES = frozenset("`'\"“”‘’«»")
_MARK = re.compile(rf"{CLOSE}|^[ \t]*(```|~~~)", re.MULTILINE)


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """One message. An assistant's may hold tool calls, and thinking in its content.

    Raises UsageError for content that is not text and for calls whose arguments are not an object.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        _check_text(self.content, f"the content of a {self.role} message")
        if self.tool_calls and self.role is not Role.ASSISTANT:
            raise UsageError(f"A {self.role} message holds a tool call. Only the assistant calls tools.")
        for call in self.tool_calls:
            _check_text(call.name, "the name of a tool call")
            if not isinstance(call.arguments, Mapping):
                kind = type(call.arguments).__name__
                raise UsageError(
                    f"The arguments of the call to {call.name!r} are a {kind}. Give an object, not JSON text."
                )
            check_json(call.arguments, f"the arguments of {call.name!r}")


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that goes with the question."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Framing:
    """What goes with every question: the system prompt, the files before it, the suffix after it."""

    system: str
    attachments: tuple[Attachment, ...] = ()
    suffix: str = ""

    def messages(self, question: str, stdin_text: str = "") -> list[Message]:
        """System and user message: files, standard input, the question, the suffix.

        Raises UsageError when there is nothing to ask.
        """
        asked = question.rstrip()
        if self.suffix and (asked or stdin_text.strip()):
            asked = f"{asked}\n{self.suffix}" if asked else self.suffix
        parts = [fence(attachment) for attachment in self.attachments]
        parts += [text.rstrip("\n") for text in (stdin_text, asked) if text.strip()]
        if not parts:
            raise UsageError(
                "There is nothing to ask. Give a question, a file with -f, or text on standard input."
            )
        message = Message(Role.USER, "\n\n".join(parts))
        return [Message(Role.SYSTEM, self.system), message] if self.system else [message]


def fence(attachment: Attachment) -> str:
    """The file between two fences that are longer than any run of backticks in it, its name on the first."""
    longest = max((len(run) for run in re.findall("`+", attachment.text)), default=0)
    ticks = "`" * max(3, longest + 1)
    newline = "" if attachment.text.endswith("\n") or not attachment.text else "\n"
    return f"{ticks}{one_line(attachment.name)}\n{attachment.text}{newline}{ticks}"


def one_line(name: str) -> str:
    """A file name fit for the fence's line: no control, line or format character, no backtick, no edges."""
    shown = "".join(
        " " if unicodedata.category(character)[0] in "CZ" else "'" if character == "`" else character
        for character in name[-4 * MAX_FILE_NAME_LENGTH :]
    )
    shown = " ".join(shown.split())
    if len(shown) > MAX_FILE_NAME_LENGTH:
        shown = "…" + shown[-MAX_FILE_NAME_LENGTH + 1 :]
    return shown or "file"


@dataclass(frozen=True, slots=True)
class SplitReply:
    """A reply's thinking without its tags, None if it has none, and what follows it."""

    thinking: str | None
    answer: str


def split_reply(reply: str) -> SplitReply:
    """The reply, split at the last `</think>` that is not quoted.

    A tag in quotes, or between the two lines of a fence, belongs to the text. A reply that opens its thinking
    and does not close it has no answer.
    """
    marks = list(_MARK.finditer(reply))
    n_fences = sum(mark.group(1) is not None for mark in marks)
    start, end, before = 0, 0, 0
    for mark in marks:
        around = {reply[mark.start() - 1 : mark.start()], reply[mark.end() : mark.end() + 1]}
        if mark.group(1):
            before += 1
        # Thinking may end inside a fence: a fence that never closes after the tag does not hold it.
        elif not ((before % 2 and (n_fences - before) % 2) or around <= _QUOTES):
            start, end = mark.span()
    is_open = reply.lstrip().startswith(OPEN)
    if not end and not is_open:
        return SplitReply(None, reply)
    if not end:
        start, end = (at, at + len(CLOSE)) if (at := reply.rfind(CLOSE)) >= 0 else (len(reply), len(reply))
    thinking = reply[:start].lstrip().removeprefix(OPEN) if is_open else reply[:start]
    return SplitReply(thinking, reply[end:])


def answer_of(reply: str) -> str:
    """The reply without its thinking and without leading newlines."""
    return split_reply(reply).answer.lstrip("\n")


def check_conversation(messages: Sequence[Message]) -> None:
    """Raises UsageError when there is nothing to answer: no message, or the last one is the assistant's."""
    if not messages:
        raise UsageError("The conversation is empty. Give a question.")
    last = messages[-1].role
    if last not in (Role.USER, Role.TOOL):
        raise UsageError(
            f"The last message is the {last}'s: nothing to answer. End with the user's or a tool's."
        )


def check_json(value: object, what: str, depth: int = 0) -> None:
    """Raises UsageError when `value` is not made of JSON's types, or nests deeper than any tool needs."""
    if depth > MAX_JSON_DEPTH:
        raise UsageError(f"In {what}: more than {MAX_JSON_DEPTH} levels of nesting.")
    if isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, Mapping):
        for key, item in cast(Mapping[object, object], value).items():
            _check_text(key, f"a key of {what}")
            check_json(item, what, depth + 1)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[object], value):
            check_json(item, what, depth + 1)
    elif not (value is None or isinstance(value, bool | int | float)):
        raise UsageError(f"In {what}: a {type(value).__name__}, which JSON does not have.")


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"Expected text in {what}, got a {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"In {what}: half a surrogate pair at character {error.start + 1}. Give valid Unicode text."
        ) from None
