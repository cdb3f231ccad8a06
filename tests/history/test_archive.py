"""Conversations and their turns: a tree with a head; names, copies, removal."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_local.errors import HistoryError
from qwq_local.events import Answer, Finished, FinishReason, Generated, Prompted, Thinking, TurnStats
from qwq_local.history.archive import Archive
from qwq_local.history.labels import clean_name, squeezed
from qwq_local.history.records import TurnOrigin, TurnStart, TurnState
from qwq_local.history.rows import packed_tokens, storable, unpacked_tokens
from qwq_local.terminal.sanitizer import cell_width


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def archive(path: Path) -> Iterator[Archive]:
    with Archive.open(path, clock=itertools.count(1000.0).__next__) as archive:
        yield archive


def ask(archive: Archive, conversation: int, parent: int | None, question: str) -> int:
    """Add a turn that has ended; returns its id."""
    origin = TurnOrigin("miniature", profile="math", settings={"seed": "7"})
    start = TurnStart(conversation, parent, question, f"{question} Please.", (), origin)
    recorder = archive.begin_turn(start)
    recorder.feed(Prompted((1, 2, 3)))
    recorder.feed(Generated(0, (4, 5), 1))
    recorder.feed(Finished(FinishReason.STOP, TurnStats(3, 0, 1, 1), f"On {question}", f"To {question}"))
    return recorder.turn_id


def talk(archive: Archive, *questions: str, name: str = "") -> int:
    """Add a conversation with these questions; returns its id."""
    conversation = archive.begin("miniature", "default", "Be brief.", name)
    parent = None
    for question in questions:
        parent = ask(archive, conversation, parent, question)
    return conversation


def questions(archive: Archive, conversation: int) -> list[str]:
    return [turn.question for turn in archive.path(conversation)]


def test_the_archive_keeps_what_was_recorded(path: Path) -> None:
    with Archive.open(path, clock=itertools.count(1000.0).__next__) as archive:
        conversation = talk(archive, "Why?\n\n  Really?", name="A talk")
    with Archive.open(path) as archive:
        record = archive.conversation(conversation)
        assert (record.name, record.model, record.system) == ("A talk", "miniature", "Be brief.")
        assert (record.created_at, record.changed_at, record.n_turns) == (1000.0, 1003.0, 1)
        assert (record.first_question, record.forked_from) == ("Why? Really?", None)
        [turn] = archive.path(conversation)
        assert (turn.question, turn.content) == ("Why?\n\n  Really?", "Why?\n\n  Really? Please.")
        assert (turn.thinking, turn.answer) == ("On Why?\n\n  Really?", "To Why?\n\n  Really?")
        assert (turn.prompt, turn.generated, turn.number) == ((1, 2, 3), (4, 5), 1)
        assert (turn.state, turn.created_at) == (TurnState.DONE, 1001.0)
        assert turn.origin is not None
        assert (turn.origin.profile, turn.origin.settings) == ("math", {"seed": "7"})
        [without] = archive.path(conversation, with_tokens=False)
        assert (without.prompt, without.generated, without.answer) == ((), (), turn.answer)


def test_the_last_changed_conversation_is_the_first_of_the_list(archive: Archive) -> None:
    assert archive.latest() is None
    first, second = talk(archive, "One?"), talk(archive, "Two?")
    empty = talk(archive)
    assert [record.id for record in archive.conversations()] == [empty, second, first]
    ask(archive, first, None, "Again?")
    assert [record.id for record in archive.conversations(2)] == [first, empty]
    latest = archive.latest()
    assert latest is not None
    assert (latest.id, latest.first_question) == (first, "Again?")
    assert (archive.conversation(empty).n_turns, archive.conversation(empty).first_question) == (0, "")


def test_regenerated_and_undone_turns_stay_beside_the_path(archive: Archive) -> None:
    conversation = talk(archive, "A?", "B?", "C?")
    a, b, c = (turn.id for turn in archive.path(conversation))
    again = ask(archive, conversation, a, "B again?")
    assert questions(archive, conversation) == ["A?", "B again?"]
    assert archive.turn(again).number == 2
    archive.set_head(conversation, c)
    assert questions(archive, conversation) == ["A?", "B?", "C?"]
    archive.set_head(conversation, None)
    assert questions(archive, conversation) == []
    assert archive.turn(b).answer == "To B?"
    ask(archive, conversation, None, "Other?")
    record = archive.conversation(conversation)
    assert (record.n_turns, record.first_question) == (1, "Other?")


def test_a_turn_belongs_to_its_conversation(archive: Archive) -> None:
    one, other = talk(archive, "A?"), talk(archive, "B?")
    [turn] = archive.path(other)
    with pytest.raises(HistoryError, match=f"turn {turn.id} is not one of conversation {one}"):
        archive.set_head(one, turn.id)
    with pytest.raises(HistoryError, match=f"turn {turn.id} is not one of conversation {one}"):
        ask(archive, one, turn.id, "C?")
    with pytest.raises(HistoryError, match="no conversation 99"):
        ask(archive, 99, None, "C?")
    with pytest.raises(HistoryError, match="no turn 99"):
        archive.turn(99)
    assert questions(archive, one) == ["A?"]


def test_a_fork_is_an_independent_copy(archive: Archive) -> None:
    source = talk(archive, "A?", "B?", "C?", name="Source")
    fork = archive.fork(source, 2)
    record = archive.conversation(fork)
    assert (record.name, record.forked_from, record.n_turns, record.system) == ("", source, 2, "Be brief.")
    ask(archive, fork, archive.path(fork)[-1].id, "D?")
    assert questions(archive, fork) == ["A?", "B?", "D?"]
    assert questions(archive, source) == ["A?", "B?", "C?"]
    archive.remove(source)
    first = archive.path(fork)[0]
    assert (first.thinking, first.prompt, first.generated) == ("On A?", (1, 2, 3), (4, 5))
    assert (first.stats, first.number, first.parent) == (TurnStats(3, 0, 1, 1), 1, None)
    assert questions(archive, archive.fork(fork, 0)) == []
    with pytest.raises(HistoryError, match="has 3 turns, not 4"):
        archive.fork(fork, 4)


def test_a_running_turn_is_copied_as_it_is(archive: Archive) -> None:
    conversation = archive.begin("miniature", "default", "")
    recorder = archive.begin_turn(TurnStart(conversation, None, "Why?", "Why?"))
    recorder.feed(Thinking("Half a"))
    fork = archive.fork(conversation, 1)
    recorder.feed(Answer("Whole."))
    assert [(turn.state, turn.thinking) for turn in archive.path(fork)] == [(TurnState.STOPPED, "Half a")]


def test_a_conversation_is_found_by_name_number_or_the_beginning_of_a_name(archive: Archive) -> None:
    unnamed, apple = talk(archive, "Apfel?"), talk(archive, name="Apple pie")
    again, chinese = talk(archive, name="apple pie"), talk(archive, name="量子纠缠 for all")
    assert archive.find("Apple pie").id == apple
    assert archive.find("apple pie").id == again
    assert archive.find(" 量子 ").id == chinese
    assert archive.find("量子纠缠 FOR").id == chinese
    assert archive.find(str(unnamed)).id == unnamed
    with pytest.raises(HistoryError, match=r"'app' begins 2 names: .*\(\d\), .*\. Write more of it"):
        archive.find("app")
    for nothing in ("Apfel", "99", "", "\x1b[2J", "9" * 30, "-1", "²"):
        with pytest.raises(HistoryError, match="there is no conversation"):
            archive.find(nothing)


def test_names_are_one_short_line_and_unique(archive: Archive) -> None:
    one, other = talk(archive), talk(archive)
    assert archive.rename(one, "  A\tname\nwith\x1b[31m colour  ") == "A name with colour"
    assert archive.find("A name with").id == one
    with pytest.raises(HistoryError, match=f"'A name with colour' is the name of conversation {one}"):
        archive.rename(other, "A name with colour")
    with pytest.raises(HistoryError, match="12 would be taken for a conversation's number"):
        archive.rename(one, "12")
    with pytest.raises(HistoryError, match="needs a letter"):
        archive.begin("miniature", "default", "", " \x00 ")
    assert archive.rename(one, "A name with colour") == "A name with colour"
    assert archive.rename(one, "") == ""
    assert archive.rename(other, "A name with colour") != ""
    with pytest.raises(HistoryError, match="no conversation 99"):
        archive.rename(99, "Ninety-nine")
    archive.set_system(one, "Be long.")
    assert archive.conversation(one).system == "Be long."


@given(text=st.text(max_size=300))
def test_a_name_fits_a_line_of_a_terminal(text: str) -> None:
    name = clean_name(text)
    assert cell_width(name) <= 100
    assert name == "" or (name.isprintable() and name == " ".join(name.split()))
    assert clean_name(name) == name


@given(text=st.text(max_size=300), limit=st.integers(2, 60))
def test_a_cut_line_is_marked_and_no_longer_than_allowed(text: str, limit: int) -> None:
    line = squeezed(text, limit)
    whole = squeezed(text, 10_000)
    assert len(line) <= limit
    assert whole == " ".join(whole.split())
    assert whole == "" or whole.isprintable()
    assert line == whole or (line.endswith("…") and whole.startswith(line[:-1]))


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_token_ids_take_four_bytes_each_least_significant_first(tokens: list[int]) -> None:
    packed = packed_tokens(tokens)
    assert packed == b"".join(token.to_bytes(4, "little") for token in tokens)
    assert unpacked_tokens(packed) == tuple(tokens)
    assert unpacked_tokens(packed + b"\x01\x02") == tuple(tokens)


def test_any_text_is_kept(archive: Archive) -> None:
    text = "nul \0, half a character \ud83d, \x1b[31m, \U0010ffff, 'quotes' \"too\""
    conversation = archive.begin(text, text, text, text)
    origin = TurnOrigin(text, profile=text, settings={text: text})
    recorder = archive.begin_turn(TurnStart(conversation, None, text, text, (text,), origin))
    recorder.feed(Thinking(text))
    recorder.feed(Finished(FinishReason.STOP, TurnStats(), text, text))
    [turn] = archive.path(conversation)
    kept = storable(text)
    assert kept == text.replace("\ud83d", "\ufffd")
    assert (turn.question, turn.thinking, turn.answer, turn.files) == (kept, kept, kept, (kept,))
    assert turn.origin is not None
    assert turn.origin.settings == {kept: kept}
    assert archive.conversation(conversation).system == kept


def test_removing_is_all_or_nothing_and_leaves_no_trace_in_the_file(path: Path) -> None:
    secret = "Donaudampfschifffahrtsgesellschaft"
    with Archive.open(path) as archive:
        kept, removed = talk(archive, "Keep me?"), talk(archive, *[f"{secret} {n}?" for n in range(200)])
        with pytest.raises(HistoryError, match="no conversation 99"):
            archive.remove(removed, 99)
        assert archive.conversation(removed).n_turns == 200
        assert secret.encode() in path.read_bytes() + path.with_name(f"{path.name}-wal").read_bytes()
        before = path.stat().st_size
        archive.remove(removed)
        assert [record.id for record in archive.conversations()] == [kept]
        assert path.stat().st_size < before / 2
        left = path.read_bytes() + path.with_name(f"{path.name}-wal").read_bytes()
        assert secret.encode() not in left
        assert secret[:9].encode() not in left
        assert b"Keep me?" in left


def test_a_long_conversation_is_read_and_removed_like_any_other(archive: Archive) -> None:
    conversation = archive.begin("miniature", "default", "")
    source = talk(archive, "A?")
    turns = archive.path(source) * 2500
    long = archive.adopt(archive.conversation(source), turns)
    assert (archive.conversation(long).n_turns, archive.path(long)[-1].number) == (2500, 2500)
    archive.remove(long)
    assert [record.id for record in archive.conversations()] == [source, conversation]


def test_threads_share_an_archive(archive: Archive) -> None:
    conversation = archive.begin("miniature", "default", "")
    recorder = archive.begin_turn(TurnStart(conversation, None, "Why?", "Why?"))
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(200):
                turn = archive.turn(recorder.turn_id)
                assert turn.thinking == "x" * len(turn.thinking)
                archive.search("why")
        except BaseException as failure:
            failures.append(failure)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(5000):
        recorder.feed(Thinking("x"))
    for reader in readers:
        reader.join()
    recorder.close()
    assert failures == []
    assert archive.turn(recorder.turn_id).thinking == "x" * 5000


def test_a_child_process_that_ends_does_not_release_a_turn(path: Path) -> None:
    """An editor, for example: it must not inherit the lock that marks this process's turns."""
    with Archive.open(path) as archive, Archive.open(path) as other:
        conversation = archive.begin("miniature", "default", "")
        recorder = archive.begin_turn(TurnStart(conversation, None, "Why?", "Why?"))
        subprocess.run([sys.executable, "-c", ""], check=True, close_fds=False)
        assert other.lost() == []
        recorder.close()
        assert archive.turn(recorder.turn_id).state is TurnState.STOPPED
