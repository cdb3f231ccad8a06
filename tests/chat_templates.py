"""QwQ-like chat templates for tests: one of our own writing, and what repackagers make of it.

Each variant is the reference with one stretch of it replaced; all of them must lead to the same prompt.
"""

from __future__ import annotations

_HISTORY = "(message.content or '').split('</think>')[-1].lstrip('\\n')"
_OPENING = "{{- '<|im_start|>assistant\\n<think>\\n' }}"
_SYSTEM = "{%- if messages[0].role == 'system' and not tools %}"

REFERENCE = (
    """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Functions, one on each line:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\nCall one so:\\n<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>' }}
    {{- '<|im_end|>\\n' }}
{%- endif %}
"""
    + _SYSTEM
    + """
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = """
    + _HISTORY
    + """ %}
        {{- '<|im_start|>assistant\\n' }}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    """
    + _OPENING
    + """
{%- endif %}
"""
)


def _with(old: str, new: str) -> str:
    if REFERENCE.count(old) != 1:
        raise ValueError(f"the reference does not hold {old!r} once")
    return REFERENCE.replace(old, new)


_CLOSED = "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"
REPACKAGED = {
    "leaves <think> out": _with(_OPENING, "{{- '<|im_start|>assistant\\n' }}"),
    "leaves the newline out": _with(_OPENING, "{{- '<|im_start|>assistant\\n<think>' }}"),
    "opens no turn": _with(_OPENING, ""),
    "closes unless enable_thinking": _with(
        _OPENING,
        "{%- if enable_thinking is defined and enable_thinking %}"
        + _OPENING
        + "{%- else %}{{- '"
        + _CLOSED
        + "' }}{%- endif %}",
    ),
    "closes always": _with(_OPENING, "{{- '" + _CLOSED + "' }}"),
    "keeps earlier thinking": _with(_HISTORY, "message.content"),
    "puts empty thinking into the history": _with(_HISTORY, "'<think>\\n\\n</think>\\n\\n' + " + _HISTORY),
    "adds a system prompt": _with(
        _SYSTEM,
        "{%- if not tools and messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}\n" + _SYSTEM,
    ),
}
