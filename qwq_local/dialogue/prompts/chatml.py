"""ChatML as QwQ and Qwen write it: <|im_start|>, a role, a newline, the content, <|im_end|>.

Tools stand in the system turn, calls in the assistant's, and results in a user turn. Models differ in their
default system prompt, in how they write tools, and in what they keep of earlier replies. The source of each
is the chat template that the model was published with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby

from qwq_local.dialogue.conversation import Message, Role, answer_of, split_reply
from qwq_local.dialogue.prompts.segments import Control, Segment, Tools, fixed, json_text

_START, _END = Control("<|im_start|>"), Control("<|im_end|>")
_MARK = re.compile(r"<\|\w+\|>")
_KNOWN_MARKS = {_START.text, _END.text, "<|endoftext|>"}
_OPENS_THINKING = re.compile(r"<\|im_start\|>assistant(?:\\n|\n)<think>(?!(?:\\n|\n)*</think>)")
# Text between the two tokens in one literal, which no quote ends before a plus or a brace.
_DEFAULT_SYSTEM = re.compile(
    r"<\|im_start\|>system(?:\\n|\n)((?:(?!<\||['\"]\s*[+~}]).)+)<\|im_end\|>", re.DOTALL
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolText:
    """What a model's template writes around the tool definitions, after the system prompt.

    `mark` is how the template spells the beginning of it, and no other template. `always_parted`: the blank
    line before it is there without a system prompt too. `name_as_json`: a call writes its name as JSON.
    """

    mark: str
    before: str
    after: str
    always_parted: bool = False
    name_as_json: bool = False


_QWEN3_TOOLS = ToolText(
    mark="# Tools\\n\\nYou may call one or more functions to assist with the user query.",
    before=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
    ),
    after=(
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
        '"arguments": <args-json-object>}\n</tool_call>'
    ),
)
_QWQ_TOOLS = replace(_QWEN3_TOOLS, mark=f"\\n\\n{_QWEN3_TOOLS.mark}", always_parted=True)
_MINIATURE_TOOLS = ToolText(
    mark="These functions can be called. Each line is one of them, as JSON:",
    before="These functions can be called. Each line is one of them, as JSON:\n<tools>",
    after=(
        "\n</tools>\nTo call a function, write its name and an object of arguments:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    ),
    name_as_json=True,
)


class Earlier(Enum):
    """How earlier replies are written."""

    ANSWER = auto()  # QwQ: without their thinking
    STRIPPED_ANSWER = auto()  # the miniature: likewise, and without white space before the answer
    RECENT_THINKING = auto()  # Qwen3: the thinking stays in what follows the last question
    WHOLE = auto()  # Qwen2.5: as they are


@dataclass(frozen=True, slots=True)
class ChatML:
    """A model's kind of ChatML; `notices` say where it is not what the chat template asks for.

    `thinks`: the model was trained to think before it answers.
    """

    default_system: str = ""
    earlier: Earlier = Earlier.ANSWER
    tool_text: ToolText | None = _QWQ_TOOLS
    notices: tuple[str, ...] = ()
    controls: tuple[str, ...] = (_START.text, _END.text)
    thinks: bool = True

    @property
    def keeps_thinking(self) -> bool:
        """Whether earlier thinking is in the prompt, all or some of it."""
        return self.earlier in (Earlier.WHOLE, Earlier.RECENT_THINKING)

    @property
    def takes_tools(self) -> bool:
        """Whether its prompts can hold tool definitions."""
        return self.tool_text is not None

    def segments(self, messages: Sequence[Message], tools: Tools) -> Iterator[Segment]:
        """The prompt, up to the opening of the assistant's turn."""
        yield from self._system_turn(messages[0], tools)
        last_question = max(
            (at for at, message in enumerate(messages) if message.role is Role.USER), default=len(messages)
        )
        turns = list(enumerate(messages))[messages[0].role is Role.SYSTEM :]
        for is_result, group in groupby(turns, key=lambda turn: turn[1].role is Role.TOOL):
            if is_result:
                yield from self._results(message for _, message in group)
                continue
            for at, message in group:
                if message.role is Role.ASSISTANT:
                    yield from self._reply(message, is_recent=at > last_question)
                else:
                    yield from self._turn(message.role, message.content)
        yield from (_START, "assistant\n")

    def _turn(self, role: str, content: str) -> Iterator[Segment]:
        yield from (_START, f"{role}\n", content, _END, "\n")

    def _system_turn(self, first: Message, tools: Tools) -> Iterator[Segment]:
        has_system = first.role is Role.SYSTEM
        system = first.content if has_system else self.default_system
        if not tools or self.tool_text is None:
            if has_system or system:
                yield from self._turn(Role.SYSTEM, system)
            return
        yield from (_START, "system\n", system)
        if has_system or self.tool_text.always_parted:
            yield "\n\n"
        yield from fixed(self.tool_text.before)
        for tool in tools:
            yield f"\n{json_text(tool)}"
        yield from fixed(self.tool_text.after)
        yield from (_END, "\n")

    def _reply(self, message: Message, *, is_recent: bool) -> Iterator[Segment]:
        yield from (_START, "assistant")
        content = self._kept_reply(message)
        before_call = "\n"
        match self.earlier:
            case Earlier.RECENT_THINKING:
                yield "\n"
                thinking = (split_reply(message.content).thinking or "").strip("\n")
                if is_recent and thinking:
                    yield from (Control("<think>"), f"\n{thinking}\n", Control("</think>"), "\n\n")
                yield content
                before_call = "\n" if content else ""
            case Earlier.STRIPPED_ANSWER:
                yield f"\n{content}" if content else ""
            case _:
                yield f"\n{content}" if message.content or not message.tool_calls else ""
        as_json = self.tool_text is not None and self.tool_text.name_as_json
        for call in message.tool_calls:
            name = json_text(call.name) if as_json else f'"{call.name}"'
            yield from (before_call, Control("<tool_call>"))
            yield f'\n{{"name": {name}, "arguments": {json_text(call.arguments)}}}\n'
            yield Control("</tool_call>")
            before_call = "\n"
        yield from (_END, "\n")

    def _kept_reply(self, message: Message) -> str:
        """What stays of an earlier reply besides recent thinking."""
        if self.earlier is Earlier.WHOLE:
            return message.content
        if self.earlier is Earlier.STRIPPED_ANSWER:
            return answer_of(message.content).lstrip()
        if self.earlier is Earlier.RECENT_THINKING and split_reply(message.content).thinking is None:
            return message.content
        return answer_of(message.content)

    def _results(self, messages: Iterable[Message]) -> Iterator[Segment]:
        yield from (_START, "user")
        for message in messages:
            yield from ("\n", Control("<tool_response>"))
            yield f"\n{message.content}\n"
            yield Control("</tool_response>")
        yield from (_END, "\n")


def match_chatml(template: str, name: str) -> ChatML | None:
    """The format that a chat template describes, or None if it is not ChatML as QwQ and Qwen write it.

    Some packages of QwQ leave `<think>` out, close the thinking, or add a system prompt. A model that is
    called QwQ gets QwQ's own format, with a notice for each such difference.
    """
    if not {_START.text, _END.text} <= set(_MARK.findall(template)) <= _KNOWN_MARKS:
        return None
    is_qwq = "qwq" in name.lower()
    known = (_MINIATURE_TOOLS, _QWQ_TOOLS, _QWEN3_TOOLS)
    tool_text = next((text for text in known if text.mark in template), None)
    if tool_text is None and not is_qwq and "tools" in template:
        return None
    found = _DEFAULT_SYSTEM.search(template)
    default_system = _ESCAPE.sub(lambda m: "\n" if m[1] == "n" else m[1], found[1]) if found else ""
    if tool_text is _MINIATURE_TOOLS:
        earlier = Earlier.STRIPPED_ANSWER
    elif "last_query_index" in template and not is_qwq:
        earlier = Earlier.RECENT_THINKING
    else:
        earlier = Earlier.ANSWER if is_qwq or "</think>" in template else Earlier.WHOLE
    opens_thinking = _OPENS_THINKING.search(template) is not None
    if not is_qwq:
        thinks = opens_thinking or earlier is not Earlier.WHOLE
        return ChatML(default_system, earlier, tool_text, thinks=thinks)
    notices = []
    if not opens_thinking:
        notices.append("The chat template does not open the thinking with <think>; it was opened.")
    elif "enable_thinking" in template:
        notices.append("The chat template closes the thinking unless enable_thinking is set; it was set.")
    if default_system:
        shown = " ".join(default_system.split())[:80]
        notices.append(f"The chat template adds a system prompt, which QwQ has not; left out: {shown!r}.")
    return ChatML(earlier=earlier, tool_text=tool_text or _QWQ_TOOLS, notices=tuple(notices))
