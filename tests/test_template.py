"""Messages, and the chat template: what it is corrected to, and what a hostile one is kept from."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_local.dialogue.conversation import (
    Attachment,
    Message,
    Role,
    answer_of,
    check_conversation,
    check_json,
    user_message,
)
from qwq_local.dialogue.foreign import ForeignText, ForeignTexts
from qwq_local.dialogue.template import OPENING, THINKING, ChatTemplate
from qwq_local.errors import TemplateError, UsageError
from qwq_local.events import ToolCall
from tests.chat_templates import REFERENCE, REPACKAGED

TAIL = "{{ '<|im_start|>assistant\n<think>\n' }}"
QUESTION = Message(Role.USER, "How many?")
CALL = Message(Role.ASSISTANT, "", (ToolCall("add", {"a": 1, "b": 'say "2"'}),))
THOUGHT = Message(Role.ASSISTANT, "<think>\nold thoughts\n</think>\n\nThree.")


def rendered(source: str | None, *messages: Message, tools: Any = ()) -> str:
    parts = ChatTemplate(source).render(messages, tools).parts
    return "".join(part.text for part in parts)


def loop(statement: str, start: str = "'aaaaaaaa'") -> str:
    head = "{% set ns = namespace(s=" + start + ") %}{% for i in range(60) %}"
    return head + statement + "{% endfor %}{{ ns.s }}"


HOSTILE = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "empty nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "loops without a call": "{% set r = range(9999) %}{% for i in r %}{% for j in r %}"
    "{% for k in 'abcdefgh' %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(9999) if range(9999)|sort|length == 0 %}{% endfor %}",
    "a repeated string": "{{ 'a' * 10**10 }}",
    "a repeated list": "{{ [0] * 10**10 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "an integer read from text": "{{ ('f' * 1000000)|int(base=16) // 3 }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "many wide formats": "{{ ('%(a)999d' * 90000) % {'a': 1} }}",
    "a width argument": "{{ '%*d' % (1000000000, 1) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "the center method": "{{ 'a'.center(10**9) }}",
    "the format method": "{{ '{:>1000000000}'.format('x') }}",
    "bytes": "{{ 'a'.encode().zfill(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "join": "{{ ('a' * 100000).join(['b'] * 10000) }}",
    "the join filter": "{{ range(9999)|join('a' * 100000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace in a message": "{{ messages[0].content|replace('', 'b' * 1000000) }}",
    "doubling by +": loop("{% set ns.s = ns.s + ns.s %}"),
    "doubling by ~": loop("{% set ns.s = ns.s ~ ns.s %}"),
    "doubling a message": loop("{% set ns.s = ns.s ~ ns.s %}", "messages[0].content"),
    "doubling by a block": loop("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "a list that shares": loop("{% set ns.s = [ns.s, ns.s] %}"),
    "arguments that share": "{% macro m() %}{% set ns.s = varargs %}{% endmacro %}"
    + loop("{{ m(ns.s, ns.s) }}"),
    "static text in loops": "{% for i in range(9999) %}{% set s %}{% for j in range(9999) %}"
    + "x" * 10_000
    + "{% endfor %}{% endset %}{% endfor %}",
    "a namespace written out": loop("{% set ns.s = namespace(a=ns.s, b=ns.s) %}"),
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "map": "{% for i in range(9999) %}{% set a = range(9999)|map('string')|list %}{% endfor %}",
    "slices": loop("{% set ns.s = ns.s[0:] + ns.s[0:] %}"),
    "copies of a message": "{% for i in range(9999) %}{% set a = messages[0].content|upper %}{% endfor %}",
    "escapes": "{{ messages[0].content" + "|tojson" * 30 + " }}",
    "wide JSON": "{{ [1]|tojson(indent=10**9) }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "placeholder text": "{{ lipsum(n=10**8) }}",
    "an outer file": "{% include '/etc/passwd' %}",
    "deep parentheses": "{{ " + "(" * 30_000 + ")" * 30_000 + " }}",
    "a long chain": "{{ 1" + "+1" * 30_000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long source": "x" * 1_000_000,
    "no template": "{% for %}",
    "another kind of template": "{{ '<bos>' ~ messages[0].content }}",
    "a template that refuses": "{{ raise_exception('not\nso') }}",
    "a sliced message": "{{ ('>' ~ messages[0].content)[:3] }}" + TAIL,
    "a forged number": "{{ '\\ufdd0' ~ '9' * 5000 ~ '\\ufdd1' }}" + TAIL,
    "a forged place": "{{ '\\ufdd0' ~ 999 ~ '\\ufdd1' }}" + TAIL,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_with_an_error_soon_and_in_little_memory(source: str) -> None:
    """The bounds leave room for a slow machine: one second of clock, about 100 MB of strings."""
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render([Message(Role.USER, "x " * 100_000)])
    assert time.monotonic() - started < 4
    assert "\n" not in str(caught.value)
    assert "\ufdd0" not in str(caught.value)


@pytest.mark.parametrize("name", ["a repeated string", "doubling by ~", "join", "static text in loops"])
def test_what_a_hostile_template_makes_is_refused_before_it_is_made(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(HOSTILE[name]).render([QUESTION])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize(
    "expression",
    [
        "messages.__class__",
        "messages[0].content._text",
        "raise_exception.__globals__",
        "messages.append",
        "namespace.__init__",
    ],
)
def test_a_template_sees_nothing_of_python(expression: str) -> None:
    source = "{{ '[' ~ (" + expression + " is defined) ~ ']' }}" + TAIL
    assert rendered(source, QUESTION).startswith("[False]")


def test_a_template_may_use_what_chat_templates_use() -> None:
    source = (
        "{%- set ns = namespace(found=false, names=[]) -%}"
        "{%- for message in messages[::-1] if not ns.found -%}"
        "{%- if message.role == 'user' and message.content is string -%}{%- set ns.found = true -%}"
        "{%- endif -%}"
        "{%- if loop.index0 > 5 -%}{%- break -%}{%- endif -%}"
        "{%- set ns.names = ns.names + [message.role|upper] -%}"
        "{%- endfor -%}"
        "{%- macro show(text, sep='-') -%}{{ sep ~ text ~ sep }}{%- endmacro -%}"
        "{{- show(ns.names|join(',')) ~ (1 + 2 * 3) ~ ('%s!' % 'a') ~ 'x'.replace('x', 'y') -}}"
        "{{- [1, 'b', none, true, {'c': 1.5}] | tojson -}}{{- messages|map(attribute='role')|list|length -}}"
        "{{- {'k': 'v'}.items()|list|string -}}{{- strftime_now('%d %b %Y')|length -}}" + TAIL
    )
    assert rendered(source, QUESTION) == (
        "-USER-7a!y[1, \"b\", null, true, {\"c\": 1.5}]1[('k', 'v')]11" + OPENING + THINKING
    )


def test_what_a_template_asks_of_a_message_it_asks_of_its_text() -> None:
    source = (
        "{%- set text = messages[0].content -%}"
        "{{- [text|length, text.startswith('  a'), 'b' in text, text == '  a,b\n'] -}}"
        "{{- '<' ~ text|trim ~ '>' ~ text.strip().split(',')[-1] ~ text[2:3]|upper ~ text|tojson -}}"
        "{{- {text: 1}['  a,b\n'] -}}{%- for letter in text|trim -%}({{ letter }}){%- endfor -%}"
        "{{- {'k': text} -}}"
    )
    expected = "[6, True, True, True]<a,b>bA\"  a,b\\n\"1(a)(,)(b){'k': '  a,b\\n'}"
    assert rendered(source + TAIL, Message(Role.USER, "  a,b\n")) == expected + OPENING + THINKING


@given(st.text(), st.sampled_from(["strip", "lower", "upper", "title", "split", "splitlines", "swapcase"]))
def test_a_foreign_text_answers_like_the_text_it_stands_for(text: str, method: str) -> None:
    texts = ForeignTexts(budget=1 << 30)
    made = getattr(texts.give(text), method)()
    pieces = made if isinstance(made, list) else [made]
    shown = ["".join(part.text for part in texts.split(str(piece))) for piece in pieces]
    expected = getattr(text, method)()
    assert shown == (expected if isinstance(expected, list) else [expected])


def test_a_foreign_text_is_found_in_a_mapping_by_its_text() -> None:
    key = next(iter(cast("dict[str, object]", ForeignTexts(1000).give_json({"name": 1}))))
    assert isinstance(key, ForeignText)
    mapping: dict[str, int] = {key: 1}
    assert mapping["name"] == 1


HISTORY = (QUESTION, THOUGHT, Message(Role.USER, "Are you sure?"))


@pytest.mark.parametrize("name", REPACKAGED)
def test_a_repackaged_template_reaches_the_same_prompt_and_says_what_was_corrected(name: str) -> None:
    reference = ChatTemplate(REFERENCE).render(HISTORY)
    repackaged = ChatTemplate(REPACKAGED[name]).render(HISTORY)
    assert "".join(part.text for part in repackaged.parts) == "".join(part.text for part in reference.parts)
    assert reference.notices == ()
    assert len(repackaged.notices) == 1
    assert "\n" not in repackaged.notices[0]


@pytest.mark.parametrize("source", [REFERENCE, None, *REPACKAGED.values()])
def test_every_prompt_ends_inside_the_thinking(source: str | None) -> None:
    assert rendered(source, QUESTION).endswith(f"<|im_end|>\n{OPENING}{THINKING}")


def test_a_history_without_thinking_brings_no_notice_about_it() -> None:
    assert ChatTemplate(REPACKAGED["keeps earlier thinking"]).render([QUESTION]).notices == ()


def test_a_file_without_a_template_gets_the_built_in_one_with_a_notice() -> None:
    for source in (None, "", " \n"):
        result = ChatTemplate(source).render([Message(Role.SYSTEM, "Be brief."), QUESTION])
        assert "".join(part.text for part in result.parts) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n"
        )
        assert "built-in" in result.notices[0]


def test_the_built_in_template_writes_what_the_reference_writes() -> None:
    messages = (Message(Role.SYSTEM, "s"), *HISTORY, CALL, Message(Role.TOOL, "3"), Message(Role.TOOL, "4"))
    built_in, reference = rendered(None, *messages), rendered(REFERENCE, *messages)
    # QwQ writes no newline between the role and a call that has no text before it.
    assert built_in == reference.replace("assistant\n\n<tool_call>", "assistant\n<tool_call>")


@pytest.mark.parametrize("source", [REFERENCE, None])
def test_tools_calls_and_merged_results_are_rendered(source: str | None) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": 'a "sum"\n'}}]
    messages = (QUESTION, CALL, Message(Role.TOOL, "3"), Message(Role.TOOL, "4"), Message(Role.USER, "ok?"))
    text = rendered(source, *messages, tools=tools)
    assert (
        '\n{"type": "function", "function": {"name": "add", "description": "a \\"sum\\"\\n"}}\n</tools>'
        in text
    )
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "say \\"2\\""}}\n</tool_call>' in text
    responses = "\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>"
    assert "<|im_start|>user" + responses in text


def test_a_template_that_leaves_a_message_out_is_told_on() -> None:
    source = "{{ messages[-1].content }}" + TAIL
    result = ChatTemplate(source).render([Message(Role.SYSTEM, "Be brief."), QUESTION])
    assert result.notices == ("The chat template leaves out message 1, the system's.",)


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


def test_files_come_first_and_the_question_last() -> None:
    message = user_message([Attachment("a.txt", "one"), Attachment("b.md", "two\n")], "piped\n", "Which?\n")
    assert message == Message(Role.USER, "```a.txt\none\n```\n\n```b.md\ntwo\n```\n\npiped\n\nWhich?")


def test_a_fence_is_longer_than_any_run_of_backticks_in_the_file() -> None:
    content = user_message([Attachment("a.md", "```\ncode\n`````\n")], "", "").content
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
    first = user_message([Attachment(name, "t")], "", "q").content.split("\n")[0]
    assert first == "```" + shown


def test_nothing_to_ask_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="nothing to ask"):
        user_message([], " \n", "")


@pytest.mark.parametrize("arguments", ['{"a": 1}', ["a"], None, {"a": object()}, {1: 2}, {"a": "\ud800"}])
def test_arguments_that_are_not_a_json_object_are_refused(arguments: Any) -> None:
    with pytest.raises(UsageError):
        Message(Role.ASSISTANT, "", (ToolCall("add", arguments),))


def test_messages_that_make_no_conversation_are_refused() -> None:
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


def test_json_that_nests_without_end_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(UsageError, match="nesting"):
        check_json(value, "a tool")
    with pytest.raises(UsageError, match="as an object"):
        ChatTemplate(None).render([QUESTION], cast(Any, ["add"]))
