"""Prompts have the ids of the published chat templates, rendered by Jinja and tokenized as a whole.

Text from outside that spells a control token is the only intended difference. Below, a private
character stands for each such spelling. The template is rendered with these characters, so it takes none
for its own, and they become plain text before the rest is tokenized. Our prompt gets the spellings.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import pytest
from tokenizers import Tokenizer

from qwq_local.dialogue.conversation import Message, Role
from qwq_local.dialogue.prompts.formats import prompt_format
from qwq_local.engine.model import LoadedModel
from qwq_local.events import ToolCall
from tests.dialogue.chat_templates import (
    MINIATURE,
    ROOT,
    SPECIAL,
    as_variables,
    published,
    rendered,
    vocabulary,
)

PUBLISHED = {
    "QwQ-32B": "Qwen-QwQ-32B",
    "Qwen2.5-7B-Instruct": "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3-0.6B": "Qwen-Qwen3-0.6B",
    "DeepSeek-R1-Distill-Qwen-32B": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
}
N_CONVERSATIONS = 300
SPELLINGS = {chr(0xE000 + at): piece for at, piece in enumerate(SPECIAL)}
_TABLE = str.maketrans(SPELLINGS)
STAND_INS = {piece: character for character, piece in SPELLINGS.items()}
PIECES = (
    "words here",
    "How many r's?",
    " 12",
    "a",
    "量子纠缠",
    "草莓 🍓",
    "cafe\u0301",
    "Привет",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "   ",
    "\t",
    "\u00a0",
    "\u2028",
    "\x0b",
    *(
        "</",
        "<|",
        "|>",
        "<think",
        " tool_call>",
        "`",
        "```\n",
        '"',
        "\\",
        "{}",
        "{% raw %}",
        "｜",
        "<tools>",
        "\ufdd0",
    ),
)


class Generator:
    """Conversations made from a seed. Odd seeds use no spellings of control tokens."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._pieces = PIECES + (() if seed % 2 else tuple(SPELLINGS))

    def text(self, most: int = 6) -> str:
        return "".join(self._random.choices(self._pieces, k=self._random.randint(0, most)))

    def reply(self) -> str:
        """A reply with or without thinking. Only the tag that ends the thinking is outside quotes."""
        close = STAND_INS["</think>"]
        answer = self.text().replace(close, f"`{close}`")
        if self._random.random() < 0.5:
            # A reply that begins with the tag would be thinking without an end.
            return f"So: {answer}" if answer.lstrip().startswith(STAND_INS["<think>"]) else answer
        thinking = self.text().replace(close, "").replace("```", "")
        gap = self._random.choice(["\n\n", "", "\n", " \n"])
        return f"<think>{self._random.choice(['', chr(10)])}{thinking}\n</think>{gap}{answer}"

    def json(self, depth: int = 2) -> object:
        kind = self._random.randrange(7 if depth else 5)
        if kind < 5:
            return [self.text(3), 12, 1.5, True, None][kind]
        if kind == 5:
            return [self.json(depth - 1) for _ in range(self._random.randint(0, 2))]
        return self.arguments(depth - 1)

    def arguments(self, depth: int = 2) -> dict[str, object]:
        return {self.text(2): self.json(depth) for _ in range(self._random.randint(0, 3))}

    def messages(self) -> list[Message]:
        messages = [Message(Role.SYSTEM, self.text())] if self._random.random() < 0.5 else []
        for _ in range(self._random.randint(0, 3)):
            messages.append(Message(Role.USER, self.text()))
            messages += self._calls() if self._random.random() < 0.4 else []
            messages.append(Message(Role.ASSISTANT, self.reply()))
            if self._random.random() < 0.1:
                messages.append(Message(Role.SYSTEM, self.text()))
        messages.append(Message(Role.USER, self.text()))
        return messages + (self._calls() if self._random.random() < 0.3 else [])

    def _calls(self) -> list[Message]:
        messages = []
        for _ in range(self._random.randint(1, 2)):
            calls = tuple(ToolCall(self._name(), self.arguments()) for _ in range(self._random.randint(1, 3)))
            content = self.reply() if self._random.random() < 0.6 else ""
            messages.append(Message(Role.ASSISTANT, content, calls))
            messages += [Message(Role.TOOL, self.text()) for _ in calls]
        return messages

    def _name(self) -> str:
        return self._random.choice(["add", "get_weather", "f", f"f{self.text(1)}"])

    def tools(self) -> list[Mapping[str, object]]:
        return [
            {"type": "function", "function": {"name": self._name(), "parameters": self.arguments()}}
            for _ in range(self._random.choice([0, 0, 1, 2]))
        ]


def spelled(text: str) -> str:
    """The text with its private characters replaced by spellings."""
    return text.translate(_TABLE)


def spelled_message(message: Message) -> Message:
    calls = tuple(ToolCall(spelled(call.name), respelled(call.arguments)) for call in message.tool_calls)
    return replace(message, content=spelled(message.content), tool_calls=calls)


def respelled(value: Mapping[str, object]) -> Mapping[str, object]:
    """The JSON object with the spellings in all its texts."""
    respelled: Mapping[str, object] = json.loads(spelled(json.dumps(value, ensure_ascii=False)))
    return respelled


def spelled_tools(tools: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    return list(map(respelled, tools))


def expected_ids(text: str, plain: Callable[[str], list[int]], special: Mapping[str, int]) -> list[int]:
    ids: list[int] = []
    start = 0
    for match in re.finditer("|".join(map(re.escape, special)), text):
        ids += plain(spelled(text[start : match.start()]))
        ids.append(special[match.group()])
        start = match.end()
    return ids + plain(spelled(text[start:]))


@cache
def conversations() -> list[tuple[list[Message], list[Mapping[str, object]]]]:
    generators = map(Generator, range(N_CONVERSATIONS))
    return [(generator.messages(), generator.tools()) for generator in generators]


@pytest.mark.parametrize("model", PUBLISHED)
def test_prompts_have_the_ids_of_the_published_template(model: str) -> None:
    template = published(PUBLISHED[model])
    format_ = prompt_format(template, vocabulary().special_tokens, model)
    is_deepseek = model.startswith("DeepSeek")
    for messages, tools in conversations():
        if model.startswith("Qwen2.5"):
            # This model does not think: a tag in a reply is text. Its vocabulary has no such token.
            messages = [replace(m, content=with_tags_as_text(m.content)) for m in messages]
        text = rendered(template, as_variables(messages, empty_is_none=is_deepseek), tools)
        expected = expected_ids(text, vocabulary().encode_text, vocabulary().special_tokens)
        if not any(character in SPELLINGS for character in text):
            assert vocabulary().whole.encode(text).ids == expected
        prompt = format_.encode(
            list(map(spelled_message, messages)),
            vocabulary(),
            spelled_tools(tools),
            opens_thinking=text.endswith("<think>\n"),
        )
        assert prompt.text == spelled(text)
        assert list(prompt.tokens) == expected


def with_tags_as_text(content: str) -> str:
    return content.replace("<think>", STAND_INS["<think>"]).replace("</think>", STAND_INS["</think>"])


def test_the_miniature_gets_the_ids_it_was_trained_on(loaded: LoadedModel) -> None:
    """The `tokenizers` library on the miniature's tokenizer.json, which asks for NFC as Qwen's does."""
    path = ROOT / "miniature" / "checkpoint" / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    whole = Tokenizer.from_str(json.dumps(description))
    plain = Tokenizer.from_str(json.dumps({**description, "added_tokens": []}))
    special = loaded.vocabulary.special_tokens
    format_ = prompt_format(MINIATURE, special, "miniature")
    for messages, tools in conversations():
        text = rendered(MINIATURE, as_variables(messages), tools)
        expected = expected_ids(text, lambda text: list(plain.encode(text).ids), special)
        if not any(character in SPELLINGS for character in text):
            assert whole.encode(text).ids == expected
        prompt = format_.encode(list(map(spelled_message, messages)), loaded.vocabulary, spelled_tools(tools))
        assert prompt.text == spelled(text)
        assert list(prompt.tokens) == expected
