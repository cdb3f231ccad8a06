"""QwQ's chat template as a GGUF carries it, made to write the same prompt whatever was changed in it.

Messages come in; the prompt's text goes out, in parts that tell the template's writing from foreign text,
with a notice for each correction. Knows no tokens.

A template is corrected by what it does. The thinking is cut from the history before it sees any;
`enable_thinking` is always set; the opening of the assistant's turn is read off what it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwq_local.dialogue.conversation import Message, Role, answer_of, check_json
from qwq_local.dialogue.foreign import ForeignTexts, Part
from qwq_local.dialogue.sandbox import Sandbox
from qwq_local.errors import TemplateError, UsageError

OPENING = "<|im_start|>assistant\n"
THINKING = "<think>\n"
BUDGET_FACTOR, BUDGET_BASE = 8, 1 << 20
_TAIL = re.compile(r"<\|im_start\|>assistant\s*(?P<thinking><think>\s*(?P<closed></think>\s*)?)?\Z")
_EMPTY_THINKING = re.compile(re.escape(OPENING) + r"<think>\s*</think>\s*")
_SYSTEM_TURN = re.compile(r"\A<\|im_start\|>system\n([^\ufdd0]*?)<\|im_end\|>\n?")
_KEPT = "qwq-local-asks-whether-this-is-kept"

BUILT_IN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content }}
    {%- endif %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, ' }}
    {{- '"arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
"""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The prompt in parts, and one line for each correction."""

    parts: tuple[Part, ...]
    notices: tuple[str, ...]


class ChatTemplate:
    """A chat template by its text, None or blank for the built-in one. Raises TemplateError."""

    def __init__(self, source: str | None) -> None:
        self._built_in = source is None or not source.strip()
        text = BUILT_IN if source is None or self._built_in else source
        self._sandbox = Sandbox(text)
        self._tests_enable_thinking = "enable_thinking" in text
        self._probed: str | None = None

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = ()) -> Rendered:
        """The prompt for the next reply, which opens with the thinking.

        Raises TemplateError when the template fails or is not one of QwQ's, UsageError for tools that are
        not JSON.
        """
        for tool in tools:
            if not isinstance(tool, Mapping):
                raise UsageError(f"A tool is a {type(tool).__name__}. Give its definition as an object.")
            check_json(tool, "a tool's definition")
        cut = tuple(_without_thinking(message) for message in messages)
        texts = ForeignTexts(BUDGET_BASE + BUDGET_FACTOR * sum(len(message.content) for message in cut))
        # The contents come first, so that a message and its content have the same number.
        contents = [texts.give(message.content) for message in cut]
        numbers = _numbers(cut)
        variables = {
            "messages": [
                _variables(message, content, texts) for message, content in zip(cut, contents, strict=True)
            ],
            "tools": [texts.give_json(tool) for tool in tools] or None,
            **_SETTINGS,
        }
        text = self._sandbox.render(variables, len(texts))
        has_system = bool(tools) or any(message.role is Role.SYSTEM for message in cut)
        text, notices = correct(text, has_system=has_system)
        notices = [*self._source_notices(messages, cut), *notices]
        present = texts.roots_in(text)
        notices += [
            f"The chat template leaves out message {position + 1}, the {cut[position].role}'s."
            for position, number in numbers.items()
            if number not in present
        ]
        return Rendered(texts.split(text), tuple(notices))

    def _source_notices(self, messages: Sequence[Message], cut: Sequence[Message]) -> list[str]:
        """What was different before the template wrote anything, so that its text does not show it."""
        if self._built_in:
            return ["The model's file holds no chat template; QwQ's turns are written by the built-in one."]
        if self._probed is None:
            self._probed = self._probe()
        notices = []
        if self._tests_enable_thinking and _closes_thinking(self._probed):
            notices.append("The chat template closes the thinking unless enable_thinking is set; it was set.")
        if tuple(messages) != tuple(cut) and _KEPT in self._probed:
            notices.append("The chat template keeps earlier thinking in the history; it was taken out.")
        return notices

    def _probe(self) -> str:
        """What the template writes of a small history with thinking when nothing is set for it."""
        turns = (("user", "a"), ("assistant", f"<think>\n{_KEPT}\n</think>\n\nb"), ("user", "c"))
        variables = {
            "messages": [{"role": role, "content": content} for role, content in turns],
            **{name: value for name, value in _SETTINGS.items() if name != "enable_thinking"},
        }
        try:
            return self._sandbox.render(variables, len(turns))
        except TemplateError:
            return ""


_SETTINGS: dict[str, object] = {
    "add_generation_prompt": True,
    "enable_thinking": True,
    "bos_token": "",
    "eos_token": "<|im_end|>",
}


def _without_thinking(message: Message) -> Message:
    if message.role is not Role.ASSISTANT:
        return message
    answer = answer_of(message.content)
    return message if answer == message.content else replace(message, content=answer)


def _numbers(messages: Sequence[Message]) -> dict[int, int]:
    """The number of each message's content among the foreign texts; empty contents have none."""
    filled = [position for position, message in enumerate(messages) if message.content]
    return {position: number for number, position in enumerate(filled)}


def _variables(message: Message, content: str, texts: ForeignTexts) -> dict[str, object]:
    """The message as transformers hands it to a template."""
    variables: dict[str, object] = {"role": message.role.value, "content": content}
    if message.name is not None:
        variables["name"] = texts.give(message.name)
    if message.tool_calls:
        variables["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": texts.give(call.name),
                    "arguments": texts.give_json(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return variables


def _closes_thinking(text: str) -> bool:
    tail = _TAIL.search(text)
    return tail is not None and tail["closed"] is not None


def correct(text: str, *, has_system: bool) -> tuple[str, list[str]]:
    """The rendered text as QwQ's own template would end it, and a notice for each thing that differed.

    Foreign text is in place holders here, so that none of it can be taken for the template's writing.
    """
    notices: list[str] = []
    system = None if has_system else _SYSTEM_TURN.match(text)
    if system is not None:
        text = text[system.end() :]
        shown = " ".join(system[1].split())[:80]
        notices.append(f"The chat template adds a system prompt, which QwQ has not; left out: {shown!r}.")
    text, tail_notice = _corrected_tail(text)
    notices += [tail_notice] if tail_notice else []
    text, n_empty = _EMPTY_THINKING.subn(OPENING, text)
    if n_empty:
        notices.append("The chat template puts empty thinking into the history; it was taken out.")
    return text, notices


def _corrected_tail(text: str) -> tuple[str, str | None]:
    """The text with its end as `<|im_start|>assistant`, newline, `<think>`, newline."""
    if text.endswith(OPENING + THINKING):
        return text, None
    tail = _TAIL.search(text)
    if tail is None:
        if not text.rstrip().endswith("<|im_end|>"):
            raise TemplateError(
                "The chat template does not end with <|im_start|>assistant: it is not one of QwQ's. "
                "Use another GGUF."
            )
        ended = text.rstrip() + "\n" + OPENING + THINKING
        return ended, "The chat template does not open the assistant's turn; it was opened."
    notice = "The chat template leaves <think> out of the assistant's turn; it was added."
    if tail["closed"]:
        notice = "The chat template closes the thinking at once; it was opened again."
    elif tail["thinking"]:
        notice = "The chat template does not end with <think> and a newline; it was put right."
    return text[: tail.start()] + OPENING + THINKING, notice
