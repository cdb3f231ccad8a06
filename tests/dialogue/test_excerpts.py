"""Cutting a text into parts: properties over any text, hostile ones, and the characters of Unicode.

The oracle for characters is wcwidth's segmentation, which follows UAX #29.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wcwidth import iter_graphemes

from qwq_local.dialogue.conversation import Attachment
from qwq_local.dialogue.excerpts import Measure, Sources, TextPart, cut, is_inside

FAMILY = "👩‍👩‍👧‍👦"
PIECES = (
    "word ",
    "Satz. ",
    "line\n",
    "\n\n",
    "\n \t\n",
    " ",
    "a",
    "字",
    "。」",
    "漢字かな",
    "é",
    "e\u0301",
    FAMILY,
    "🏳️‍🌈",
    "👍🏽",
    "🇩🇪",
    "🇫",
    "각",
    "\u1100\u1161\u11a8",
    "क्षि",
    "\r\n",
    "\u200d",
    "\u0600",
    "...",
)
texts = st.one_of(st.text(max_size=400), st.lists(st.sampled_from(PIECES), max_size=200).map("".join))


def n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def uneven(text: str) -> int:
    """A measure that is not additive: a run costs little, and any text costs at least one."""
    return 1 + sum(a != b for a, b in pairwise(text)) if text else 0


measures = st.sampled_from([len, n_bytes, uneven])


def check(text: str, limit: int, overlap: int, measure: Measure) -> list[TextPart]:
    parts = cut(text, limit, overlap, measure)
    if not text:
        assert parts == []
        return parts
    assert (parts[0].start, parts[-1].end) == (0, len(text))
    for part in parts:
        assert part.size == measure(text[part.start : part.end]) <= limit
    for before, after in pairwise(parts):
        assert before.start < after.start <= before.end < after.end
        assert measure(text[after.start : before.end]) <= overlap
    return parts


@given(texts, st.integers(40, 200), st.integers(0, 20), measures)
def test_parts_cover_the_text_in_order_within_limit_and_overlap(
    text: str, limit: int, overlap: int, measure: Measure
) -> None:
    check(text, limit, overlap, measure)


@given(texts)
def test_no_part_begins_or_ends_inside_a_character(text: str) -> None:
    borders, at = {0}, 0
    for character in iter_graphemes(text):
        at += len(character)
        borders.add(at)
    allowed = {at for at in range(len(text) + 1) if not is_inside(text, at)}

    assert allowed <= borders


@given(st.lists(st.sampled_from(PIECES), max_size=200).map("".join), st.integers(0, 20))
def test_parts_end_between_characters(text: str, overlap: int) -> None:
    """A character larger than the limit must be cut; these all fit."""
    for part in check(text, 120, overlap, n_bytes):
        assert not is_inside(text, part.start)
        assert not is_inside(text, part.end)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("One line\n\n" * 20, "\n\n"),
        ("One line.\n" * 20, "\n"),
        ("One sentence. " * 20, ". "),
        ("一句话。" * 40, "。"),
        ("word " * 40, " "),
    ],
)
def test_the_strongest_boundary_is_used(text: str, ends: str) -> None:
    parts = check(text, 64, 16, len)

    assert len(parts) > 2
    assert all(text[: part.end].endswith(ends) for part in parts)
    assert all(text[: part.start].endswith(ends) for part in parts[1:])


def test_a_paragraph_is_cut_where_it_is_longer_than_half_a_part() -> None:
    text = "short\n\n" + "word " * 100
    first, *_ = check(text, 100, 0, len)

    assert 90 <= first.end <= 100


def test_parts_are_as_large_as_allowed() -> None:
    text = "".join(f"Paragraph {i} says little.\n\n" for i in range(1000))
    parts = check(text, 2000, 100, len)

    assert all(part.size > 2000 - 2 * 30 for part in parts[:-1])


@pytest.mark.parametrize("character", [" \u0301", "e" + "\u0301" * 30, FAMILY, "🇩🇪", "\r\n", " \u200d"])
def test_a_character_stays_whole_where_there_is_no_other_boundary(character: str) -> None:
    parts = check(f"ab{character}" * 100, 200, 100, n_bytes)

    assert len(parts) > 2
    assert not [part for part in parts if is_inside(f"ab{character}" * 100, part.start)]
    assert not [part for part in parts if is_inside(f"ab{character}" * 100, part.end)]


def test_a_character_larger_than_the_overlap_is_not_shared_in_pieces() -> None:
    text = ("e" + "\u0301" * 50) * 50

    assert not [part for part in check(text, 300, 70, n_bytes) if is_inside(text, part.start)]


HOSTILE = {
    "one line of 5 MB": "All in one line; " * (5 << 16),
    "no spaces": "x" * (5 << 20),
    "only newlines": "\n" * (5 << 20),
    "dots": "." * (5 << 20),
    "blanks": " " * (5 << 20),
    "CJK": "漢字仮名交じり文" * (5 << 15),
    "families": FAMILY * (5 << 14),
    "flags": "🇩🇪" * (5 << 16),
    "accents without end": "e" + "\u0301" * (5 << 19),
    "lines of blanks": ("\n" + " " * 999) * 5000,
    "quotes after a dot": ("." + '"' * 9999) * 500,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_cut_in_linear_work(name: str) -> None:
    """Work is counted: the measured text is at most a few times the whole text."""
    text, measured = HOSTILE[name], 0

    def measure(piece: str) -> int:
        nonlocal measured
        measured += len(piece)
        return len(piece)

    parts = check(text, 100_000, 500, measure)
    measured = 0
    cut(text, 100_000, 500, measure)

    assert len(parts) < 2.2 * len(text) / 100_000 + 1
    assert measured < 3.5 * len(text)


def test_a_text_that_gets_denser_is_still_cut_to_size() -> None:
    text = "a" * 50_000 + "".join(chr(0x4E00 + i % 5000) for i in range(50_000))

    check(text, 3000, 300, uneven)


def test_the_overlap_is_measured_in_uneven_text() -> None:
    dense = "".join(chr(0x4E00 + i) for i in range(56))

    check(("a" * 200 + dense) * 100, 150, 40, uneven)


@given(
    st.lists(st.text("ab \n", min_size=1, max_size=80), min_size=1, max_size=5), st.text("x \n", max_size=80)
)
def test_excerpts_have_all_text_of_every_file(contents: list[str], stdin_text: str) -> None:
    files = [Attachment(f"f{i}", text) for i, text in enumerate(contents)]
    sources = Sources(files, stdin_text)
    excerpts = list(sources.excerpts(cut(sources.text, 40, 0, len)))
    found = [each for excerpt in excerpts for each in excerpt.attachments]

    for file in files:
        bodies = "".join(each.text for each in found if each.name.partition(",")[0] == file.name)
        assert "".join(bodies.split()) == "".join(file.text.split())
    assert "".join("".join(e.stdin_text for e in excerpts).split()) == "".join(stdin_text.split())
    assert all(excerpt.length for excerpt in excerpts)


def test_a_limit_that_no_character_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        cut("字", 2, 0, n_bytes)
    with pytest.raises(ValueError, match="limit of 10"):
        cut("text", 10, 6, len)
    assert cut("", 10, 0, len) == []
