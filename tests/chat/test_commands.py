"""Commands of a chat for settings, context, thoughts and files: output, effect and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwq_local.backend.api import ReplyRequest
from qwq_local.chat.commands.output import code_blocks
from qwq_local.chat.commands.registry import COMMANDS, parse
from qwq_local.chat.events import ChatStatus, Copy, Page, ThinkView, ViewChanged
from qwq_local.errors import DoesNotFit, ModelNotFound
from qwq_local.events import Event, Finished, FinishReason, Steered, Thinking, TurnStats
from qwq_local.history.archive import Archive
from tests.queued_backend import PlanningBackend, QueuedBackend, Talking, errors, planned, said, says, talking


@pytest.fixture
def archive() -> Iterator[Archive]:
    with Archive.private() as opened:
        yield opened


@pytest.fixture
def talk(archive: Archive, tmp_path: Path) -> Talking:
    return talking(archive, tmp_path)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("/help", ("help", "")),
        ("/Help  me ", ("help", "me ")),
        ("/retry-from 3", ("retry-from", "3")),
        ("/system two\nlines", ("system", "two\nlines")),
        ("/system\ntext", ("system", "text")),
        ("/etc/hosts is what?", None),
        ("//comment", None),
        ("/* c */", None),
        ("/", None),
        (" /help", None),
        ("1/2", None),
    ],
)
def test_a_line_is_a_command_when_a_word_follows_the_slash(
    line: str, command: tuple[str, str] | None
) -> None:
    assert parse(line) == command


@pytest.mark.parametrize(
    ("line", "nearest"),
    [("/contnue", "/continue"), ("/regenerate", "/regen"), ("/cont", "/continue"), ("/quti", "/quit")],
)
def test_an_unknown_command_names_the_nearest(talk: Talking, line: str, nearest: str) -> None:
    (complaint,) = errors(talk.submit(line))
    assert complaint.startswith(f"there is no command {line}. Did you mean {nearest}?")


def test_a_command_like_no_other_points_to_the_list(talk: Talking) -> None:
    assert "/help lists the commands." in errors(talk.submit("/xyzzy"))[0]


def test_help_lists_every_command_and_explains_each(talk: Talking) -> None:
    lines = talk.lines("/help")
    for command in COMMANDS:
        assert any(line.startswith(command.usage) for line in lines)
        details = talk.lines(f"/help {command.name}")
        assert details[0] == command.usage
        assert details == talk.lines(f"/help /{command.name}")
    keys = talk.lines("/help keys")
    assert {line.split("  ")[0] for line in keys} > {"Ctrl-T", "Ctrl-G", "Ctrl-S", "Ctrl-C", "Ctrl-D"}
    assert max(map(len, lines + keys)) <= 80
    assert "no command" in errors(talk.submit("/help nothing"))[0]


def test_set_lists_shows_sets_and_resets(talk: Talking) -> None:
    assert talk.lines("/set") == ["nothing is set: everything is as profile chat has it."]
    assert talk.lines("/set temperature") == [
        "temperature 0.6 · bundled models/miniature.toml",
        "randomness; 0 always takes the likeliest token",
        "allowed: a number from 0 to 5",
    ]
    assert talk.lines("/set temperature 0.3") == ["temperature 0.3 · set here"]
    assert talk.backend.profile.temperature == 0.3
    talk.submit("/set yarn=off")
    assert talk.lines("/set") == ["temperature 0.3 (profile: 0.6)", "yarn off (profile: auto)"]
    assert talk.lines("/set temperature default") == ["temperature 0.6 · bundled models/miniature.toml"]
    assert talk.backend.profile.temperature == 0.6
    assert talk.backend.profile.yarn == 1.0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/set temperatrue 1", 'there is no key "temperatrue". Did you mean temperature?'),
        ("/set temp 1", 'there is no key "temp". Did you mean temperature?'),
        ("/set temperature hot", 'temperature is "hot", allowed: a number from 0 to 5.'),
        ("/set temperature 5", "too hot."),
        ("/set yarn 3", "yarn is 3, allowed: off, auto or one of 1,2,4 "),
        ("/seed -1", 'seed is "-1", allowed: a whole number from 0 to 4,294,967,294 or random.'),
        ("/profile nothing", 'there is no task profile "nothing".'),
    ],
)
def test_a_refused_setting_changes_nothing(talk: Talking, line: str, complaint: str) -> None:
    talk.submit("/set temperature 1")
    before = talk.backend.profile
    (said_line,) = errors(talk.submit(line))
    assert said_line.startswith(complaint)
    assert talk.backend.profile == before
    assert talk.lines("/set") == ["temperature 1 (profile: 0.6)"]


def test_seed_and_system_are_keys_too(talk: Talking) -> None:
    assert talk.lines("/seed 11") == ["seed 11 · set here"]
    assert talk.lines("/seed random") == ["seed random · set here"]
    assert talk.lines("/system") == ["there is no system prompt."]
    assert talk.lines("/system Answer in verse.") == [
        "from the next question on the system prompt has 3 tokens."
    ]
    assert talk.lines("/system") == ['system prompt: "Answer in verse."']
    assert talk.lines("/system none") == ["from the next question on there is no system prompt any more."]


def test_another_profile_keeps_the_users_settings(talk: Talking) -> None:
    talk.submit("/set temperature 0.2")
    lines = talk.lines("/profile math")
    assert lines[0].startswith("profile math: ")
    assert lines[1] == "still set: temperature 0.2"
    assert talk.backend.profile.temperature == 0.2
    talk.submit("Why?", says())
    assert "boxed" in talk.backend.questions[-1].messages[-1].content, "the suffix of the new profile"


def test_another_model_continues_the_conversation(talk: Talking) -> None:
    talk.submit("One?", says("a", "1"))
    events = talk.submit("/model other")
    assert said(events) == [
        "queued answers from now on; it is loaded with the next question.",
        "context 1,000",
    ]
    assert events[-1] == ChatStatus("other", 0, 2, 1.0, "not kept")
    assert talk.backends[0].is_closed
    talk.submit("Two?", says())
    assert len(talk.backends[1].questions[0].messages) == 3


def test_a_missing_model_leaves_the_old_one_in_use(archive: Archive, tmp_path: Path) -> None:
    def make(model: str) -> PlanningBackend:
        if model == "nowhere":
            raise ModelNotFound("no model 'nowhere' on this machine.")
        return PlanningBackend()

    talk = talking(archive, tmp_path, make)
    assert errors(talk.submit("/model nowhere")) == ["no model 'nowhere' on this machine."]
    assert not talk.backend.is_closed
    assert len(talk.backends) == 1


def test_after_a_model_that_does_not_fit_the_old_one_comes_back(archive: Archive, tmp_path: Path) -> None:
    def make(model: str) -> PlanningBackend:
        return PlanningBackend(refuses=DoesNotFit("needs 40 GiB.") if model == "large" else None)

    talk = talking(archive, tmp_path, make)
    talk.submit("One?", says("a", "1"))
    assert errors(talk.submit("/model large")) == ["needs 40 GiB."]
    assert [backend.is_closed for backend in talk.backends] == [True, True, False]
    assert talk.lines("/model")[0] == "model miniature"
    talk.submit("Two?", says())
    assert len(talk.backend.questions[0].messages) == 3


def test_context_shows_its_use_as_a_bar_and_in_tokens(talk: Talking, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("word " * 198)
    talk.submit("/system " + "word " * 100)
    talk.submit("word " * 97, says("t " * 50, "a b c"))
    talk.submit("/file f.txt")
    lines = talk.lines("/context")
    assert lines[0] == "█" * 6 + "▓" * 12 + "▒" * 6 + "·" * 36
    assert lines[1:] == [
        "█ system   100",
        "▓ files    200",
        "▒ history  100",
        "░ prompt     0",
        "· free     600 of 1,000 tokens",
        "50 tokens of earlier thinking are spared: they are not sent again.",
    ]
    talk.submit("/system " + "word " * 1000)
    assert talk.lines("/context")[-1] == "the next question takes YaRN 2."


def test_drop_leaves_out_the_oldest_turns_only_when_asked_to(talk: Talking, archive: Archive) -> None:
    for number in "123":
        talk.submit(f"{number}?", says(answer=number))
    assert talk.lines("/drop")[0].startswith(
        "left out of what the model sees while this chat runs: thought 1, 2"
    )
    assert "thoughts 2-3, 4 tokens" in talk.lines("/drop 7")[0]
    assert errors(talk.submit("/drop")) == ["there is no turn to leave out."]
    talk.submit("4?", says())
    assert len(talk.backend.questions[-1].messages) == 1
    assert talk.lines("/drop none") == ["the model sees the whole conversation again."]
    talk.submit("5?", says())
    assert len(talk.backend.questions[-1].messages) == 9
    assert len(archive.path(1)) == 5
    assert "give how many" in errors(talk.submit("/drop some"))[0]


def test_plan_and_stats_show_the_plan_and_the_figures(talk: Talking) -> None:
    plan = talk.lines("/plan")
    assert plan[0] == "context 1,000"
    assert plan[-1].startswith("context 1,000 tok: system 0 + files 0")
    assert errors(talk.submit("/stats")) == ["nothing was asked yet."]
    talk.submit("/seed 3")
    talk.submit("One?", says("a b c", "d e"))
    lines = talk.lines("/stats")
    assert lines[0] == "thought 1 · seed 3 · ended: stop"
    assert "thinking 3 + answer 2 tok" in lines[1]


def steered(backend: QueuedBackend, question: ReplyRequest) -> Iterator[Event]:
    yield from planned(backend, question)
    yield Thinking("First this.")
    yield Steered("\n\nNow that.\n\n")
    yield Thinking("So be it.")
    stats = TurnStats(thinking_tokens=2431)
    yield Finished(FinishReason.STOP, stats, "First this.\n\nNow that.\n\nSo be it.", "Done.")


def test_a_thought_opens_by_its_number_with_the_users_sentences_marked(talk: Talking) -> None:
    talk.submit("One?", steered)
    talk.submit("Two?", says("Second.", "2"))
    (page,) = talk.submit("/think 1")
    assert isinstance(page, Page)
    assert page.text == "First this.\n\nNow that.\n\nSo be it."
    assert page.steered == ("\n\nNow that.\n\n",)
    assert page.title.startswith("thought 1 · ")
    assert page.title.endswith(" · 2,431 tok")
    for line in ("/think", "/think last", "/think 2"):
        assert talk.submit(line) == [Page("thought 2 · 1m12s · 1 tok", "Second.")]
    assert errors(talk.submit("/think 3")) == [
        "/think 3: give a number from 1 to 2, last, grep WORDS, or one of off, excerpt, tail, full."
    ]


def test_think_sets_how_thinking_is_shown(talk: Talking) -> None:
    assert talk.submit("/think full")[0] == ViewChanged(ThinkView.FULL)
    assert errors(talk.submit("/think last")) == ["there is no thought in this conversation yet."]


def test_think_grep_finds_thoughts_of_all_conversations(talk: Talking) -> None:
    talk.submit("One?", says("The prime is seventeen here.", "17"))
    talk.submit("/name primes")
    talk.submit("/clear")
    talk.submit("质数是什么?", says("质数是只能被一和自身整除的数。", "seventeen"))
    lines = talk.lines("/think grep seventeen")
    assert lines[0] == "1 primes · thought 1: The prime is seventeen here."
    assert lines[1] == "/resume ID opens a conversation, /think N then its thought."
    assert talk.lines("/think grep 自身整除")[0].startswith("this one · thought 1: ")
    assert talk.lines("/think grep 17") == ["no thought has '17', but questions or answers do: /history 17"]
    assert talk.lines("/history 17")[0] == "1 primes · answer 1: 17"
    assert talk.lines("/think grep nothing") == ["nothing has 'nothing'."]
    assert errors(talk.submit("/think grep")) == ["/think grep WORDS: give the words to look for."]
    assert talk.lines("/history")[0].endswith("质数是什么? · 1 turn · this one")
    talk.submit("/undo")
    undone, where = talk.lines("/think grep 自身整除")
    assert undone.startswith("this one · thought 1 (undone or answered anew): ")
    assert "show ID --all" in where


ANSWER = """Here:

```python
print("one")
```

- and in a list

  ~~~~
  two ```
  ~~~~

Not `this`.
"""


def test_copy_takes_the_answer_the_thought_or_a_code_block(talk: Talking) -> None:
    talk.submit("Code?", says("Hm.", ANSWER))
    assert talk.submit("/copy") == [Copy(ANSWER, "answer 1")]
    assert talk.submit("/copy thought") == [Copy("Hm.", "thought 1")]
    assert talk.submit("/copy code") == [Copy("two ```\n", "code block 2 of answer 1")]
    assert talk.submit("/copy code 1") == [Copy('print("one")\n', "code block 1 of answer 1")]
    assert errors(talk.submit("/copy code 3")) == ["/copy code 3: answer 1 has 2, give 1 to 2."]
    assert errors(talk.submit("/copy all")) == ["/copy all: give answer, thought, or code and a number."]
    talk.submit("More?", says("Hm.", "no code"))
    assert errors(talk.submit("/copy code")) == ["answer 2 has no code block."]


def test_a_code_block_that_was_cut_counts_too() -> None:
    assert code_blocks("```\na\n```\n\n```c\nint") == ["a\n", "int"]


def test_save_writes_the_format_of_the_suffix_and_overwrites_nothing(talk: Talking, tmp_path: Path) -> None:
    talk.submit("One?", says("Because.", "Yes."))
    assert talk.lines("/save chat.json") == [f"saved 1 turn to {tmp_path / 'chat.json'}"]
    assert json.loads((tmp_path / "chat.json").read_text())["turns"][0]["thinking"] == "Because."
    talk.submit("Two?", says("", "No."))
    assert talk.lines("/save") == [f"saved 2 turns to {tmp_path / 'chat.json'}"], "its own file, again"
    for name, begins in (("chat.md", "#"), ("chat.html", "<!")):
        talk.submit(f"/save {name}")
        assert (tmp_path / name).read_text().lower().startswith(begins)
    talk.submit("/clear")
    talk.submit("Three?", says("", "So."))
    assert errors(talk.submit("/save chat.md")) == ["chat.md is there already: /save chat.md ! replaces it."]
    (tmp_path / "mine.md").write_text("precious")
    assert errors(talk.submit("/save mine.md")) == ["mine.md is there already: /save mine.md ! replaces it."]
    assert (tmp_path / "mine.md").read_text() == "precious"
    talk.submit("/save mine.md !")
    assert "So." in (tmp_path / "mine.md").read_text()
    talk.submit("/save my chat.md")
    assert (tmp_path / "my chat.md").is_file()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/save", "/save FILE: give a name that ends in .md, .json or .html."),
        ("/save chat.txt", "'chat.txt': end the name in .md, .json or .html, to say what to write."),
        ("/save chat.md", "there is nothing to save yet: nothing was asked."),
    ],
)
def test_a_refused_save_says_why(talk: Talking, line: str, complaint: str) -> None:
    assert errors(talk.submit(line)) == [complaint]


def test_a_missing_folder_is_an_error_of_one_line(talk: Talking) -> None:
    talk.submit("One?", says())
    assert "cannot be written" in errors(talk.submit("/save no/where/chat.md"))[0]


def test_a_conversation_without_a_question_has_nothing_to_copy_or_undo(talk: Talking) -> None:
    for line in ("/copy", "/undo", "/edit", "/regen", "/continue", "/retry-from 1", "/fork 1"):
        (complaint,) = errors(talk.submit(line))
        assert complaint.startswith(("there is no thought", "nothing was asked")), line
