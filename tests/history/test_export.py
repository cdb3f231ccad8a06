"""Conversations as files: complete in JSON; no text breaks the Markdown or the HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qwq_local.errors import HistoryError, UsageError
from qwq_local.events import CloseReason, FinishReason, TokenLogprob, TurnStats
from qwq_local.history.archive import Archive
from qwq_local.history.export import Format, exported, format_of, save_text, to_json
from qwq_local.history.records import (
    AnswerPart,
    ConversationRecord,
    ThinkingPart,
    TokenRun,
    ToolCallPart,
    ToolResultPart,
    TurnOrigin,
    TurnRecord,
    TurnState,
)
from qwq_local.history.search import TextKind

CONVERSATION = ConversationRecord(
    id=7,
    name="Adding",
    created_at=1_750_000_000.25,
    changed_at=1_750_000_100.0,
    model="QwQ-32B",
    profile="math",
    system="Be brief.",
    n_turns=1,
    first_question="What is 1+1?",
)


def a_turn(
    question: str = "What is 1+1?",
    thinking: str = "Hm.\n\nCount on fingers.\n\nTwo.",
    answer: str = "It is **2**.",
    number: int = 1,
    state: TurnState = TurnState.DONE,
) -> TurnRecord:
    return TurnRecord(
        id=number,
        conversation=7,
        parent=None,
        number=number,
        question=question,
        content=question,
        files=("notes_a.txt",),
        parts=(
            ThinkingPart(thinking, ("Count on fingers.",), TokenRun((3, 4))),
            AnswerPart(answer, TokenRun((5,))),
        ),
        prompt=(1, 2),
        state=state,
        reason=FinishReason.STOP,
        closed=CloseReason.MODEL,
        origin=TurnOrigin("QwQ-32B Q4_K_M", settings={"temperature": "0.6"}, seed=9),
        plan={"n_ctx": 4096},
        stats=TurnStats(thinking_tokens=2431),
        thinking_s=72.4,
        created_at=1_750_000_001.0,
    )


def test_markdown_reads_as_a_conversation() -> None:
    text = exported(Format.MARKDOWN, CONVERSATION, [a_turn(state=TurnState.STOPPED)])
    heading, facts, rest = text.split("\n\n", 2)
    assert heading == "# Adding"
    assert facts.startswith("QwQ-32B Q4\\_K\\_M · math · 2025-06-15 ")
    assert rest == (
        "<details>\n<summary>System prompt</summary>\n\nBe brief.\n\n</details>\n\n"
        "## 1\n\n> What is 1+1?\n\nFiles: notes\\_a.txt\n\n"
        "<details>\n<summary>thought 1 · 1m12s · 2,431 tok</summary>\n\n"
        "Hm.\n\n> **You:** Count on fingers.\n\nTwo.\n\n</details>\n\n"
        "It is **2**.\n\n*(stopped before its end)*\n"
    )


def test_json_has_all_but_the_token_ids() -> None:
    turn = a_turn()
    content = json.loads(to_json(CONVERSATION, [turn]))
    assert (content["format"], content["version"], content["name"]) == ("qwq-conversation", 1, "Adding")
    assert content["created_at"] == "2025-06-15T15:06:40.250+00:00"
    [kept] = content["turns"]
    assert (kept["question"], kept["thinking"], kept["answer"]) == (turn.question, turn.thinking, turn.answer)
    assert (kept["steered"], kept["files"]) == (["Count on fingers."], ["notes_a.txt"])
    assert kept["origin"]["seed"] == 9
    assert kept["origin"]["settings"] == {"temperature": "0.6"}
    assert (kept["reason"], kept["closed"], kept["state"]) == ("stop", "model", "done")
    assert (kept["n_generated"], kept["plan"]) == (3, {"n_ctx": 4096})
    assert not {"prompt", "generated"} & kept.keys()


WITH_TOOLS = replace(
    a_turn(),
    parts=(
        ThinkingPart("I need the time.", (), TokenRun((1, 2), (True, True))),
        ToolCallPart("clock", {"zone": "</details>", "digits": [1, 2.5, None]}, TokenRun((3,), (True,))),
        ToolResultPart("clock", "12:00 </details>", TokenRun((4, 5), (False, False))),
        ThinkingPart("Noon.", (), TokenRun((6,), (True,))),
        AnswerPart("It is noon.", TokenRun((7,), (True,), (TokenLogprob(7, -0.5, ((7, -0.5), (9, -1.25))),))),
    ),
)


def test_parts_of_every_kind_are_kept() -> None:
    with Archive.private() as archive:
        copy = archive.adopt(CONVERSATION, [WITH_TOOLS])
        [turn] = archive.path(copy)
        assert turn.parts == WITH_TOOLS.parts
        assert turn.generated == (1, 2, 3, 4, 5, 6, 7)
        assert (turn.thinking, turn.answer) == ("I need the time.Noon.", "It is noon.")
        assert [hit.part for hit in archive.search("time.Noon")] == [TextKind.THINKING]


def test_tool_calls_are_exported_in_their_place() -> None:
    [turn] = json.loads(to_json(CONVERSATION, [WITH_TOOLS]))["turns"]
    kinds = ["thinking", "tool_call", "tool_result", "thinking", "answer"]
    assert [part["kind"] for part in turn["parts"]] == kinds
    assert turn["parts"][1]["arguments"] == {"zone": "</details>", "digits": [1, 2.5, None]}
    assert [part["n_tokens"] for part in turn["parts"]] == [2, 1, 2, 1, 1]
    markdown = exported(Format.MARKDOWN, CONVERSATION, [WITH_TOOLS])
    for text in (
        MarkdownIt("commonmark").render(markdown),
        exported(Format.HTML, CONVERSATION, [WITH_TOOLS]),
    ):
        page = Page(text)
        assert (page.open, page.wrong) == ([], [])
        assert page.seen.count("details") == 5
        assert "called clock" in page.text("summary")
        assert "12:00 </details>" in page.text("details")


class Page(HTMLParser):
    """A page as a browser reads it: its text by element, and everything that could act or load."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))


HOSTILE = "</details></div><script>alert(1)</script><!-- <img src=http://x/y onerror=z> \x00\x1b[2J"


def test_html_is_one_page_without_anything_that_acts_or_loads() -> None:
    links, table = "![x](http://a/b.png) [y](javascript:z)", "|a|b|\n|-|-|\n|1|2|"
    answer = f"{links} $\\frac{{a_1}}{{b_2}} \\\\ c$ | {HOSTILE}\n\n{table}"
    page = Page(exported(Format.HTML, CONVERSATION, [a_turn(HOSTILE, HOSTILE, answer), a_turn(number=2)]))
    assert (page.open, page.wrong) == ([], [])
    assert page.seen.count("details") == 3
    assert page.seen.count("table") == 1
    assert not {"script", "img", "link", "iframe"} & set(page.seen)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert [value for name, value in page.attributes if name == "href"] == ["http://a/b.png"]
    visible = HOSTILE.replace("\x00", "").replace("\x1b", "")
    assert page.text("body").count(visible) == 3
    assert "$\\frac{a_1}{b_2} \\\\ c$" in page.text("body")
    assert page.text("mark") == "Count on fingers."
    assert "prefers-color-scheme: dark" in page.text("style")


FRAGMENTS = (
    "```",
    "~~~",
    "````",
    "```py",
    "    code",
    "\t",
    "- ",
    "1. ",
    "> ",
    "# head",
    "---",
    "===",
    "a|b\n-|-",
    "</details>",
    "<details>",
    "<!--",
    "-->",
    "<script>",
    "<pre>",
    "<?x",
    "<![CDATA[",
    "<b",
    "</",
    "<x-y z>",
    "`",
    "``",
    "\\",
    "`<b>`",
    "\n",
    "\n\n",
    "  ",
    "word",
    "</summary>",
    "&lt;",
    "[a]: b",
    "*",
    "_",
    "$x<y$",
)
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@settings(max_examples=120)
@given(questions=st.lists(texts, min_size=2, max_size=2), thinking=texts, answer=texts)
def test_nothing_in_a_text_can_break_the_markdown_around_it(
    questions: Sequence[str], thinking: str, answer: str
) -> None:
    """The oracle is a Markdown parser that passes HTML through, and then an HTML parser."""
    thought = f"first {thinking}"
    turns = [a_turn(question, thought, answer, number) for number, question in enumerate(questions, 1)]
    page = Page(MarkdownIt("commonmark").render(exported(Format.MARKDOWN, CONVERSATION, turns)))
    assert (page.open, page.wrong) == ([], [])
    assert page.seen.count("details") == 3
    assert page.text("h2").startswith("1")
    assert page.text("summary").count("thought") == 2
    assert not {"script", "pre", "x-y"} & set(page.seen) - {"pre"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("```py\nx < y", "```py\nx < y\n```"),
        ("~~~~\n```", "~~~~\n```\n~~~~"),
        ("a `<b>` <b> c<2", "a `<b>` &lt;b> c<2"),
        ("- item\n  ```\n  <b>\n  ```\nend", "- item\n  ```\n  <b>\n  ```\nend"),
        ("\\` <i> `", "\\` &lt;i> `"),
        ("`</details>\n- `", "`&lt;/details>\n- `"),
        ("`</b>\n- `\n\n```\n<b>\n```", "`&lt;/b>\n- `\n\n```\n<b>\n```"),
        ("a ` b\n- c `\nd ` <b> ` e", "a ` b\n- c `\nd ` &lt;b> ` e"),
    ],
)
def test_code_stays_as_it_is_and_is_closed(text: str, shown: str) -> None:
    assert f"\n\n{shown}\n" in exported(Format.MARKDOWN, CONVERSATION, [a_turn(answer=text)])


@pytest.mark.parametrize("name", ["a", "a.txt", "md", ".md/x", ""])
def test_a_file_name_without_a_known_suffix_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.md, \.json or \.html"):
        format_of(name)


def test_the_suffix_selects_the_format() -> None:
    assert [format_of(name) for name in ("a.md", "b.x.JSON", "c/d.html", "e.htm")] == [
        "md",
        "json",
        "html",
        "html",
    ]


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "talk.md"
    save_text(path, "one\n")
    with pytest.raises(HistoryError, match=r"is there already; nothing was written\. Choose another name"):
        save_text(path, "two\n")
    assert path.read_text() == "one\n"
    save_text(path, "three\n", replaces=True)
    assert path.read_text() == "three\n"
    assert os.listdir(tmp_path) == ["talk.md"]  # noqa: PTH208


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match=r"cannot be written: No such file or directory"):
        save_text(tmp_path / "nowhere" / "talk.md", "text")
