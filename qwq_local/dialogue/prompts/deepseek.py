"""The prompt format of DeepSeek-R1 and its distillations: <｜User｜>, <｜Assistant｜>, no newlines.

The source is the chat template of DeepSeek-R1-Distill-Qwen-32B. The format has no place for tool
definitions; calls and results have tokens of their own. Only the first call and the first result of a
conversation open their list, as the template has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwq_local.dialogue.conversation import Message, Role, split_reply
from qwq_local.dialogue.prompts.segments import Control, Segment, Tools, json_text
from qwq_local.dialogue.thinking import CLOSE, OPEN

_BEGIN, _END = Control("<｜begin▁of▁sentence｜>"), Control("<｜end▁of▁sentence｜>")
_USER, _ASSISTANT = Control("<｜User｜>"), Control("<｜Assistant｜>")
_CALLS, _CALLS_END = Control("<｜tool▁calls▁begin｜>"), Control("<｜tool▁calls▁end｜>")
_CALL, _CALL_END = Control("<｜tool▁call▁begin｜>"), Control("<｜tool▁call▁end｜>")
_NAME = Control("<｜tool▁sep｜>")
_OUTPUTS, _OUTPUTS_END = Control("<｜tool▁outputs▁begin｜>"), Control("<｜tool▁outputs▁end｜>")
_OUTPUT, _OUTPUT_END = Control("<｜tool▁output▁begin｜>"), Control("<｜tool▁output▁end｜>")
_USER_TURN = re.compile(rf"{_USER.text}'\s*\+\s*message\['content'\]\s*\}}\}}")
# Later templates of DeepSeek keep more state, and write other prompts.
_STATE = re.compile(
    r"namespace\(is_first=false,\s*is_tool=false,\s*is_output_first=true,\s*system_prompt=''\)"
)


@dataclass(frozen=True, slots=True)
class DeepSeek:
    """DeepSeek-R1's format."""

    thinks: bool = True
    keeps_thinking: bool = False
    takes_tools: bool = False
    controls: tuple[str, ...] = (_BEGIN.text, _END.text, _USER.text, _ASSISTANT.text)
    notices: tuple[str, ...] = ()

    def segments(self, messages: Sequence[Message], tools: Tools) -> Iterator[Segment]:
        """The prompt up to the assistant's turn. After a tool result, the turn goes on from that result."""
        yield _BEGIN
        yield next((m.content for m in reversed(messages) if m.role is Role.SYSTEM), "")
        is_first_call = is_first_output = True
        follows_output = False
        for message in messages:
            if message.role is Role.USER:
                yield from (_USER, message.content)
                follows_output = False
            elif message.role is Role.TOOL:
                yield _OUTPUTS if is_first_output else "\n"
                yield from (_OUTPUT, message.content, _OUTPUT_END)
                is_first_output, follows_output = False, True
            elif message.role is Role.ASSISTANT:
                if message.tool_calls:
                    yield from _calls(message, is_first=is_first_call)
                    is_first_call = follows_output = False
                if message.content or not message.tool_calls:
                    yield from _reply(message.content, follows_output=follows_output)
                    follows_output = False
        yield _OUTPUTS_END if follows_output else _ASSISTANT


def _calls(message: Message, *, is_first: bool) -> Iterator[Segment]:
    for call in message.tool_calls:
        yield from (_ASSISTANT, _CALLS) if is_first else ("\n",)
        is_first = False
        yield from (_CALL, "function", _NAME)
        yield f"{call.name}\n```json\n{json_text(call.arguments)}\n```"
        yield _CALL_END
    yield from (_CALLS_END, _END)


def _reply(content: str, *, follows_output: bool) -> Iterator[Segment]:
    reply = split_reply(content)
    if not follows_output:
        yield from (_ASSISTANT, reply.answer, _END)
        return
    # The template cuts no thinking here.
    yield _OUTPUTS_END
    if reply.thinking is not None:
        yield from (Control(OPEN), reply.thinking, Control(CLOSE))
    yield from (reply.answer, _END)


def match_deepseek(template: str) -> DeepSeek | None:
    """The format if a chat template is DeepSeek-R1's, else None."""
    return DeepSeek() if _USER_TURN.search(template) and _STATE.search(template) else None
