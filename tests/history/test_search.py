"""Words of any characters are found in questions, thoughts and answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwq_local.events import Finished, FinishReason, TurnStats
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnStart
from qwq_local.history.search import EXCERPT_CHARS, TextKind, excerpt, words_of

TEXTS = (
    ("什么是量子纠缠?", "我们讨论量子纠缠的问题。" * 20, "Two particles share a state."),
    ("What is 2+2?", 'The user wants "2+2" OR more: a*b, 100%, snake_case, C:\\dir.', "It is 4."),
    ("Größe und Äpfel?", "Ölöfen sind groß. Москва — столица.", "ÄPFEL wachsen."),
    ("Emoji 👩‍🚀?", "It's O'Reilly; DROP TABLE turns; --", "NEAR(a b) AND NOT {x}:^y"),
)


def ask(archive: Archive, conversation: int, parent: int | None, texts: tuple[str, str, str]) -> int:
    question, thinking, answer = texts
    recorder = archive.begin_turn(TurnStart(conversation, parent, question, question))
    recorder.feed(Finished(FinishReason.STOP, TurnStats(), thinking, answer))
    return recorder.turn_id


def filled(archive: Archive) -> Archive:
    conversation = archive.begin("miniature", "default", "")
    parent: int | None = None
    for texts in TEXTS:
        parent = ask(archive, conversation, parent, texts)
    return archive


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive.open(tmp_path / "history.sqlite3") as archive:
        yield filled(archive)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("量子纠缠", [(1, "question"), (1, "thinking")]),
        ("量子", [(1, "question"), (1, "thinking")]),
        ("纠", [(1, "question"), (1, "thinking")]),
        ("讨论 量子纠缠", [(1, "thinking")]),
        ("share 量子", [(1, "question")]),  # the answer has one, question and thinking the other
        ("SHARE", [(1, "answer")]),
        ("particle", [(1, "answer")]),
        ("äpfel", [(3, "question"), (3, "answer")]),
        ("ö", [(3, "question"), (3, "thinking")]),
        ("МОСКВА", [(3, "thinking")]),
        ("МО", [(3, "thinking")]),
        ("2+2", [(2, "question"), (2, "thinking")]),
        ('"2+2"', [(2, "thinking")]),
        ("OR", [(4, "thinking"), (2, "thinking"), (1, "thinking")][1:2]),
        ("a*b", [(2, "thinking")]),
        ("100%", [(2, "thinking")]),
        ("%", [(2, "thinking")]),
        ("_", [(2, "thinking")]),
        ("snake_case", [(2, "thinking")]),
        ("snakeXcase", []),
        ("\\", [(2, "thinking")]),
        ("O'Reilly;", [(4, "thinking")]),
        ("NEAR(a b) AND NOT", [(4, "answer")]),
        ("{x}:^y", [(4, "answer")]),
        ("👩‍🚀", [(4, "question")]),
        ("nowhere", []),
        ("4 nowhere", []),
        ("", []),
        ("  \t ", []),
    ],
)
def test_every_word_is_searched_literally(archive: Archive, words: str, found: list[tuple[int, str]]) -> None:
    hits = [(hit.turn, hit.part.value) for hit in archive.search(words)]
    assert sorted(hits, key=lambda hit: -hit[0]) == hits  # the newest turns first
    assert [hit for hit in hits if words != "OR" or hit[0] == 2] == found


def test_a_search_can_be_limited_to_thoughts(archive: Archive) -> None:
    assert [hit.part for hit in archive.search("量子纠缠", kind=TextKind.THINKING)] == [TextKind.THINKING]
    assert archive.search("share", kind=TextKind.THINKING) == []
    assert [hit.part for hit in archive.search("纠", kind=TextKind.QUESTION)] == [TextKind.QUESTION]


def test_a_search_returns_at_most_the_limit(archive: Archive) -> None:
    assert len(archive.search("e", limit=100)) > 3
    assert len(archive.search("e", limit=3)) == 3
    assert archive.search("e", limit=0) == []


def test_undone_and_regenerated_turns_are_found_with_their_place(archive: Archive) -> None:
    again = ask(archive, 1, 1, ("What is 2+2?", "Count on fingers.", "Four fingers."))
    hits = archive.search("2+2")
    assert [(hit.turn, hit.number, hit.part) for hit in hits] == [
        (again, 2, "question"),
        (2, 2, "thinking"),  # its question is the same
    ]


def test_removed_turns_are_not_found(archive: Archive) -> None:
    other = archive.fork(1, 2)
    assert {hit.conversation.id for hit in archive.search("量子纠缠")} == {1, other}
    archive.remove(1)
    assert {hit.conversation.id for hit in archive.search("量子纠缠")} == {other}
    archive.remove(other)
    assert archive.search("量子纠缠") == archive.search("子") == []


@pytest.fixture(scope="module")
def kept_archive() -> Iterator[Archive]:
    with Archive.private() as archive:
        yield filled(archive)


QUERIES = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=" \"*()^:{}+-ANDORNEAT%_\\'量子纠缠\0\ud800", max_size=20),
    st.builds(
        lambda text, start, length: text[start : start + length],
        st.sampled_from([part for texts in TEXTS for part in texts]),
        st.integers(0, 60),
        st.integers(0, 30),
    ),
)


@settings(max_examples=150)
@given(query=QUERIES)
def test_no_typed_text_is_an_operator_and_every_match_is_found(kept_archive: Archive, query: str) -> None:
    """The oracle is Python: every turn that has all the words, and no other."""
    words = [word.casefold() for word in query.replace("\0", " ").split()]
    expected = {
        number
        for number, texts in enumerate(TEXTS, 1)
        if words and all(any(word in part.casefold() for part in texts) for word in words)
    }
    assert {hit.turn for hit in kept_archive.search(query)} == expected


def test_words_are_bounded() -> None:
    assert words_of("a b a") == ["a", "b"]
    assert len(words_of(" ".join(map(str, range(1000))))) == 16
    assert words_of("x" * 10_000) == ["x" * 200]


@given(text=st.text(max_size=400), word=st.text(min_size=1, max_size=8))
def test_an_excerpt_is_one_short_printable_line(text: str, word: str) -> None:
    line = excerpt(text, [word])
    assert len(line) <= EXCERPT_CHARS
    assert line.isprintable()


def test_an_excerpt_shows_the_word_in_its_surroundings() -> None:
    line = excerpt("before " * 100 + "needle\nin\ta  haystack " + "after " * 100, ["haystack", "needle"])
    assert "needle in a haystack after" in line
    assert (line[0], line[-1]) == ("…", "…")
    assert excerpt("the needle", ["needle"]) == "the needle"


def test_changed_turns_are_found_as_they_are_now(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite3"
    with Archive.open(path) as archive:
        filled(archive)
        archive.resume_turn(2).feed(Finished(FinishReason.STOP, TurnStats(), "Anders.", "Vier."))
        archive.remove(archive.fork(1, 2))
        archive.fork(1, 2)
        archive.resume_turn(3).close()
        assert [hit.turn for hit in archive.search("Anders.")] == [8, 2]
        assert archive.search("snake_case") == []
