"""A conversation line by line: entries, output streams, stopping."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from qwq_local.chat.events import (
    Asking,
    ChatEvent,
    Completion,
    Copy,
    Edit,
    Leave,
    Page,
    Recalled,
    Said,
    ThinkView,
    ViewChanged,
)
from qwq_local.events import (
    Answer,
    CloseReason,
    Finished,
    FinishReason,
    Notice,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.terminal.output import Output
from qwq_local.terminal.plain_chat import PlainChat, read_entry

CLOSED = ThinkingClosed(CloseReason.MODEL, 2, 1.0)


@dataclass
class ScriptedTalk:
    """Answers each line with its scripted events, and records the lines."""

    script: dict[str, Sequence[ChatEvent]]
    first: Sequence[ChatEvent] = ()
    asked: list[str] = field(default_factory=list)
    stops: int = 0
    is_closed: bool = False

    def start(self) -> Iterator[ChatEvent]:
        yield from self.first

    def submit(self, line: str) -> Iterator[ChatEvent]:
        self.asked.append(line)
        yield from self.script.get(line, answered(f"you said {line}"))

    def stop(self) -> None:
        self.stops += 1

    def answer_now(self) -> None: ...

    def steer(self, text: str) -> None: ...

    def pause(self) -> None: ...

    def go_on(self) -> None: ...

    def complete(self, before_cursor: str) -> Sequence[Completion]:
        return ()

    def close(self) -> None:
        self.is_closed = True


def answered(text: str) -> list[ChatEvent]:
    finished = Finished(FinishReason.STOP, TurnStats(), "hm", text)
    return [Asking("?", 1), Thinking("hm\n"), CLOSED, Answer(text), finished]


@dataclass
class Ran:
    out: str
    err: str
    is_fine: bool


def chat(talk: ScriptedTalk, typed: str, view: ThinkView | None = None, *, is_terminal: bool = False) -> Ran:
    source, out, err = io.StringIO(typed), io.StringIO(), io.StringIO()

    def read_line(_prompt: str) -> str | None:
        line = source.readline()
        return line.removesuffix("\n") if line else None

    to, about = (Output(stream, is_terminal=is_terminal, is_dumb=True) for stream in (out, err))
    is_fine = PlainChat(talk, read_line, to, about, lambda: 0.0, view).run()
    return Ran(out.getvalue(), err.getvalue(), is_fine)


def test_each_line_is_a_question_and_only_answers_reach_stdout() -> None:
    talk = ScriptedTalk({}, first=[Said(("welcome",))])
    assert chat(talk, "one\n\n  \ntwo") == Ran("you said one\nyou said two\n", "welcome\n", True)
    assert (talk.asked, talk.is_closed) == (["one", "two"], True)


def test_the_thinking_is_shown_when_asked_for_and_until_it_is_not() -> None:
    talk = ScriptedTalk({"/think off": [ViewChanged(ThinkView.OFF)]})
    ran = chat(talk, "one\n/think off\ntwo\n", ThinkView.FULL)
    assert ran.out == "you said one\nyou said two\n"
    assert ran.err.count("hm\n") == 1
    assert "▸ thought 1 · 1s · 2 tok\n" in ran.err


def test_other_output_goes_to_stderr_without_control_sequences() -> None:
    events: list[ChatEvent] = [
        Said(("a\x1b[31mb",)),
        Page("thought 1", "x\ny"),
        Recalled("q?", 1, 3, 1.0, "an\nswer"),
    ]
    ran = chat(ScriptedTalk({"/x": events}), "/x\n")
    assert ran == Ran("", "ab\nthought 1\nx\ny\n>>> q?\n▸ thought 1\nan\nswer\n", True)


@pytest.mark.parametrize("event", [Said(("no",), is_error=True), Copy("x", "answer")])
def test_a_failed_line_is_remembered(event: ChatEvent) -> None:
    assert not chat(ScriptedTalk({"/x": [event]}), "/x\nfine\n").is_fine


def test_without_an_editor_the_text_returns_unchanged() -> None:
    talk = ScriptedTalk({"/edit": [Edit("old")], "": []})
    assert not chat(talk, "/edit\nnext\n").is_fine
    assert talk.asked == ["/edit", "", "next"]


def test_a_stopped_turn_says_how_to_continue() -> None:
    stopped: list[ChatEvent] = [Answer("half"), Finished(FinishReason.INTERRUPTED, TurnStats(), "", "half")]
    ran = chat(ScriptedTalk({"x": stopped}), "x\n")
    assert (ran.out, ran.err) == ("half\n", "■ stopped · /continue goes on\n")


def test_leaving_reads_no_further() -> None:
    talk = ScriptedTalk({"/exit": [Leave()]})
    assert chat(talk, "/exit\nnever\n").is_fine
    assert talk.asked == ["/exit"]


@pytest.mark.parametrize(
    ("typed", "entries"),
    [
        ("a\nb\n", ["a", "b"]),
        ('"""\na\n\nb\n"""\nc\n', ["a\n\nb", "c"]),
        ('"""a\nb"""\n', ["a\nb"]),
        ('"""a"""\nb\n', ["a", "b"]),
        ('"""\nnever closed\n', ["never closed"]),
        ('x """\n', ['x """']),
    ],
)
def test_three_quotes_make_one_entry_of_many_lines(typed: str, entries: list[str]) -> None:
    lines = iter(typed.splitlines())

    def read_line(_prompt: str) -> str | None:
        return next(lines, None)

    assert list(iter(lambda: read_entry(read_line), None)) == entries


def test_ctrl_c_stops_the_turn_first_and_ends_it_when_repeated() -> None:
    """The turn calls the signal handler's function, as a signal would."""
    talk = ScriptedTalk({})

    def events() -> Iterator[ChatEvent]:
        shown.interrupt()
        assert talk.stops == 1
        yield Notice("stopping")
        with pytest.raises(KeyboardInterrupt):
            shown.interrupt()
        yield Leave()

    class Stoppable(ScriptedTalk):
        def submit(self, line: str) -> Iterator[ChatEvent]:
            return events()

    talk = Stoppable({})
    err = Output(io.StringIO())
    shown = PlainChat(talk, lambda _: "go", Output(io.StringIO()), err, lambda: 0.0, None)
    assert shown.run()
    assert talk.stops == 1


def test_ctrl_c_at_the_prompt_leaves_the_second_time_on_a_terminal_and_at_once_in_a_pipe() -> None:
    def interrupted(_prompt: str) -> str | None:
        raise KeyboardInterrupt

    for is_terminal, said in ((True, "\nCtrl-C again leaves.\n\n"), (False, "")):
        err = io.StringIO()
        talk = ScriptedTalk({})
        about = Output(err, is_terminal=is_terminal, is_dumb=True)
        with pytest.raises(KeyboardInterrupt):
            PlainChat(talk, interrupted, Output(io.StringIO()), about, lambda: 0.0, None).run()
        assert (err.getvalue(), talk.is_closed) == (said, True)
