"""Two texts of one turn compared: where they part, and what counts as the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwq_local.dialogue.difference import Texts, common_length, first_difference

texts = st.text("ab", max_size=60)


@given(texts, texts, texts)
def test_two_texts_have_in_common_what_both_were_made_to_begin_with(
    start: str, first: str, second: str
) -> None:
    assert common_length(f"{start}<{first}", f"{start}>{second}") == len(start)
    assert common_length(start, start + first) == common_length(start + first, start) == len(start)


@given(texts, texts)
def test_a_turn_is_identical_to_itself(thinking: str, answer: str) -> None:
    assert first_difference(Texts(thinking, answer), Texts(thinking, answer)) is None


def test_the_first_place_is_told_with_what_stands_around_it() -> None:
    recorded = Texts("x" * 100 + "one" + "y" * 100, "answer")
    found = first_difference(recorded, Texts("x" * 100 + "two" + "y" * 100, "other"))

    assert found is not None
    assert (found.part, found.position) == ("thinking", 100)
    assert found.recorded == "x" * 40 + "one" + "y" * 37
    assert found.rerun == "x" * 40 + "two" + "y" * 37


def test_answers_are_compared_when_the_thinking_is_the_same() -> None:
    found = first_difference(Texts("same", "yes"), Texts("same", "yes, it is"))

    assert found is not None
    assert (found.part, found.position) == ("answer", 3)


def test_a_turn_that_was_stopped_is_compared_as_far_as_it_goes() -> None:
    whole = Texts("I think so.", "Yes.")
    for stopped in (Texts("", ""), Texts("I th", ""), Texts("I think so.", ""), Texts("I think so.", "Ye")):
        cut = Texts(stopped.thinking, stopped.answer, is_whole=False)
        assert first_difference(cut, whole) is None
        assert (first_difference(stopped, whole) is None) == (stopped == whole)

    assert first_difference(Texts("I tink", "", is_whole=False), whole) is not None
    assert first_difference(Texts("I think", "Yes", is_whole=False), whole) is not None
    assert first_difference(Texts("I think so.", "No", is_whole=False), whole) is not None
