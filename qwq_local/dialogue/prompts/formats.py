"""The prompt format of a model, prompts in it, and what takes up the context.

A model file carries a chat template, which is a program. It is never run: the marks in its text say which
format it describes.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwq_local.dialogue.conversation import Message, Role, answer_of, check_conversation, check_json
from qwq_local.dialogue.prompts.chatml import ChatML, match_chatml
from qwq_local.dialogue.prompts.deepseek import match_deepseek
from qwq_local.dialogue.prompts.segments import Control, Segment, Tools, encode_plain, encode_segments
from qwq_local.dialogue.thinking import OPEN
from qwq_local.engine.api import Vocabulary
from qwq_local.errors import TemplateError, UsageError
from qwq_local.events import Ledger

_MARK = re.compile(r"<[|｜][\w▁]{1,40}[|｜]>")
_BUILT_IN = "The model's file holds no chat template; QwQ's turns are written by the built-in one."


class PromptForm(Protocol):
    """What a prompt format gives for one model: see chatml.py and deepseek.py."""

    @property
    def controls(self) -> tuple[str, ...]:
        """The control tokens that a vocabulary must have."""

    @property
    def thinks(self) -> bool:
        """Whether the model was trained to think before it answers."""

    @property
    def keeps_thinking(self) -> bool:
        """Whether earlier thinking is in the prompt, all or some of it."""

    @property
    def takes_tools(self) -> bool:
        """Whether its prompts can hold tool definitions."""

    @property
    def notices(self) -> tuple[str, ...]:
        """The differences to the model's chat template, one line each."""

    def segments(self, messages: Sequence[Message], tools: Tools) -> Iterator[Segment]:
        """The prompt, up to the opening of the assistant's turn."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids and as text; `notices` are the differences to the model's chat template."""

    tokens: tuple[int, ...]
    notices: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How messages become the prompt of a model."""

    form: PromptForm

    def encode(
        self,
        messages: Sequence[Message],
        vocabulary: Vocabulary,
        tools: Tools = (),
        *,
        opens_thinking: bool = True,
    ) -> Prompt:
        """The prompt for the next reply, which may open its thinking.

        Raises UsageError for messages or tools that make no conversation.
        """
        check_conversation(messages)
        for tool in tools:
            if not isinstance(tool, Mapping):
                raise UsageError(f"A tool is a {type(tool).__name__}. Give its definition as an object.")
            check_json(tool, "a tool's definition")
        notices = list(self.form.notices)
        if tools and not self.form.takes_tools:
            notices.append("The model's prompt format has no place for tool definitions; they are left out.")
        if opens_thinking and not self.form.thinks:
            notices.append("The chat template does not open the thinking with <think>; it was opened.")
        segments = list(self.form.segments(messages, tools))
        if opens_thinking:
            segments += [Control(OPEN), "\n"]
        text = "".join(segment if isinstance(segment, str) else segment.text for segment in segments)
        return Prompt(tuple(encode_segments(segments, vocabulary)), tuple(notices), text)

    def ledger(
        self,
        messages: Sequence[Message],
        files: Sequence[str],
        vocabulary: Vocabulary,
        prompt_tokens: int,
        n_ctx: int,
    ) -> Ledger:
        """The tokens of system prompt, files, earlier turns and this question.

        `files` are the texts of attached files as they stand in the last message. What the format itself
        writes counts as the question's.
        """

        def count(text: str) -> int:
            return len(encode_plain(text, vocabulary))

        system = history = dropped = 0
        for message in messages[:-1]:
            content = kept = message.content
            if message.role is Role.ASSISTANT and not self.form.keeps_thinking:
                kept = answer_of(content)
            if message.role is Role.SYSTEM:
                system += count(content)
                continue
            history += count(kept)
            if kept != content:
                dropped += count(content) - count(kept)
        attached = sum(map(count, files))
        prompt = max(0, prompt_tokens - system - attached - history)
        return Ledger(system, attached, history, prompt, max(0, n_ctx - prompt_tokens), dropped)


def prompt_format(template: str | None, special_tokens: Container[str], name: str) -> PromptFormat:
    """The prompt format of the model called `name`, by its chat template; QwQ's if it has none.

    Raises TemplateError when the template describes neither format, or when the vocabulary lacks one of the
    format's control tokens.
    """
    form: PromptForm | None = ChatML(notices=(_BUILT_IN,))
    if template and template.strip():
        form = match_chatml(template, name) or match_deepseek(template)
    shown = " ".join("".join(c if c.isprintable() else " " for c in name[:100]).split()) or "the model"
    if form is None:
        marks = ", ".join(sorted(set(_MARK.findall(template or "")))[:3])
        raise TemplateError(
            f"The chat template of {shown} is neither ChatML as QwQ and Qwen write it nor DeepSeek-R1's"
            f"{f' (it has {marks})' if marks else ''}. Use another GGUF."
        )
    for control in form.controls:
        if control not in special_tokens:
            raise TemplateError(f"The vocabulary of {shown} has no token {control}. Use another GGUF.")
    return PromptFormat(form)
