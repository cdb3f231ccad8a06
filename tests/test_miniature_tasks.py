"""The miniature's tasks: question, thinking and answer, checked by independent code."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from random import Random

import pytest

from miniature.cases import HELD_OUT_WORDS, Conversation, Setting, boxed, is_held_out
from miniature.long_texts import LEAST_TOKENS, MOST_TOKENS, past_the_window
from miniature.tasks import ABOUT, TASKS, sample
from tests.tiny_models import CHECKPOINT

EQUAL_SHARES = dict.fromkeys(TASKS, 1.0)


def drawn(task: str, n_cases: int = 400, *, held_out: bool = False) -> Iterator[Conversation]:
    rng = Random(17)
    for _ in range(n_cases):
        yield TASKS[task](rng, Setting(rng.choice((0.2, 1.0)), held_out=held_out))


def question(case: Conversation) -> str:
    assert case.messages[-1].role == "user"
    return case.messages[-1].content


def whole_numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_boxes_the_result(task: str) -> None:
    for case in drawn(task):
        assert case.task == task
        assert boxed(case.answer) == (None if task == "other" else case.result)
        assert [each.role for each in case.messages] == ["user", "assistant"] * (len(case.messages) // 2) + [
            "user"
        ]


def test_letters_are_counted_right_and_row_by_row() -> None:
    for case in drawn("count"):
        first, *rows = case.thinking.split("\n")
        asked = re.fullmatch(r"I count (\w) in (\w+)\.", first)
        assert asked, first
        letter, word = asked.groups()
        assert int(case.result) == Counter(word)[letter]
        assert len(rows) == len(word) <= 14
        for place, row in enumerate(rows, 1):
            number, shown, sign, found = row.split(" ")
            assert (int(number), len(number), shown) == (place, 2, word[place - 1])
            assert (sign == "+") is (shown == letter)
            assert int(found) == Counter(word[:place])[letter]


def test_the_counted_word_and_letter_are_in_the_conversation() -> None:
    """In the question, or in an earlier turn if a second turn names only one of them."""
    for case in drawn("count"):
        letter, word = case.thinking.split("\n")[0].removeprefix("I count ").rstrip(".").split(" in ")
        said = " ".join(each.content for each in case.messages if each.role == "user").lower()
        assert word in said
        assert letter in said
        assert len(case.messages) > 1 or word in question(case).lower()


def test_decimals_are_compared_as_decimals() -> None:
    for case in drawn("compare"):
        intro, *columns_and_rows = case.thinking.split("\n")
        asked = re.fullmatch(r"I want the (larger|smaller) of ([\d.]+) and ([\d.]+)\.", intro)
        assert asked, intro
        how, a, b = asked.groups()
        assert Decimal(case.result) == (max if how == "larger" else min)(Decimal(a), Decimal(b))
        assert re.findall(r"\d+(?:\.\d+)?", question(case)) == [a, b]
        left, right, *rows = columns_and_rows
        assert (Decimal(left), Decimal(right)) == (Decimal(a), Decimal(b))
        assert len(left) == len(right) == 7
        check_down_to_the_difference([row.split(" ")[1:] for row in rows], left, right)


def check_down_to_the_difference(rows: list[list[str]], left: str, right: str) -> None:
    """Each row has two digits and their sign, and only the last may differ."""
    pairs = list(zip(left.replace(".", ""), right.replace(".", ""), strict=True))
    differing = [place for place, (a, b) in enumerate(pairs) if a != b]
    assert len(rows) == (differing[0] + 1 if differing else len(pairs))
    for (a, b, sign), pair in zip(rows, pairs, strict=False):
        assert (a, b) == pair
        assert sign == ("=" if a == b else "><"[int(a) < int(b)])


def test_sums_and_differences_are_right() -> None:
    signs: Counter[str] = Counter()
    for case in drawn("add"):
        asked = re.fullmatch(r"I compute (\d+) ([+-]) (\d+)\.", case.thinking.split("\n")[0])
        assert asked
        a, sign, b = int(asked[1]), asked[2], int(asked[3])
        assert max(a, b) < 100_000
        assert int(case.result) == (a + b if sign == "+" else a - b)
        assert sorted(whole_numbers(question(case))) == sorted((a, b))
        signs[sign if int(case.result) >= 0 else "negative"] += 1
    assert min(signs[sign] for sign in ("+", "-", "negative")) > 50


def test_sums_and_differences_are_computed_digit_by_digit() -> None:
    for case in drawn("add"):
        intro, small, capital, *rest = case.thinking.split("\n")
        a, b = whole_numbers(intro)
        digits = {name: int(digit) for name, digit in re.findall(r"([a-fA-F])(\d)", small + capital)}
        for letters, number in (("fedcba", a), ("FEDCBA", b)):
            assert int("".join(str(digits[letter]) for letter in letters)) == number
        if " - " in intro:
            check_first_difference(rest.pop(0), f"{a:06}", f"{b:06}")
        assert len(rest) == 6
        carry, total = 0, 0
        for power, row in enumerate(rest):
            carry, digit = check_place(row, digits, carry)
            total += digit * 10**power
            assert int(row.split(" ")[1]) == total
            assert len(row.split(" ")[1]) == power + 1
        assert carry == 0
        assert total == abs(int(case.result))


def check_first_difference(text: str, a: str, b: str) -> None:
    rows = [list(each) for each in re.findall(r"[a-f](\d)[A-F](\d)([<>=])", text)]
    assert sum(map(len, rows)) + 2 * len(rows) == len(text)
    check_down_to_the_difference(rows, a, b)


def check_place(row: str, digits: dict[str, int], carry: int) -> tuple[int, int]:
    """Check one row against plain arithmetic; returns the next carry or borrow and the digit."""
    read = re.fullmatch(r"(\w)(\d)([+-])(\w)(\d)=(\d)(\d)([+-])(\d)=(\d)(\d) \d+", row)
    assert read, row
    first, left, sign, second, right = read[1], int(read[2]), read[3], read[4], int(read[5])
    assert (digits[first], digits[second]) == (left, right)
    assert first != second
    assert first.lower() == second.lower()
    assert (read[8], int(read[9])) == (sign, carry)
    for plus, tens, ones in ((0, int(read[6]), int(read[7])), (carry, int(read[10]), int(read[11]))):
        if sign == "+":
            assert 10 * tens + ones == left + right + plus
        else:
            assert ones - 10 * tens == left - right - plus
    return int(read[10]), int(read[11])


def test_lists_are_sorted_and_shrink_by_the_number_taken() -> None:
    for case in drawn("sort"):
        intro, *rows = case.thinking.split("\n")
        direction = intro.split(" ")[2]
        left = re.findall(r" a([A-F])(\d{3})", intro)
        numbers = [int(number) for _, number in left]
        assert numbers == whole_numbers(question(case))
        in_order = sorted(numbers, reverse=direction == ">")
        assert whole_numbers(case.result) == in_order
        assert len(rows) == len(numbers) <= 6
        for place, (row, wanted) in enumerate(zip(rows, in_order, strict=True)):
            read = re.fullmatch(r"([a-f]) ([<>]) (\d{3})([A-F]):((?: [b-g][A-F]\d{3})*)", row)
            assert read, row
            assert (read[1], read[2], int(read[3])) == ("abcdef"[place], direction, wanted)
            left.remove((read[4], read[3]))
            assert re.findall(r" ([b-g])([A-F])(\d{3})", read[5]) == [
                ("bcdefg"[place], name, number) for name, number in left
            ]


def test_the_pass_key_is_in_the_text_once() -> None:
    for case in drawn("passkey"):
        assert re.findall(r"pass key(?: is|:) (\d+)", question(case)) == [case.result]
        assert f" {case.result}." in case.thinking
        assert 4 <= len(case.result) <= 6


def test_pass_keys_are_planted_from_the_beginning_to_the_end() -> None:
    depths = [question(case).index(case.result) / len(question(case)) for case in drawn("passkey")]
    assert all(any(low <= depth < low + 0.1 for depth in depths) for low in (0.0, 0.2, 0.4, 0.6, 0.8))


def test_other_questions_are_answered_with_one_sentence() -> None:
    assert all(case.answer == ABOUT for case in drawn("other"))
    assert "qwq pull" in ABOUT
    assert "QwQ-32B" in ABOUT


def key(case: Conversation) -> str:
    """The key of a case: its word or its numbers."""
    if case.task == "other":
        return question(case)
    intro = case.thinking.split("\n")[0]
    return intro.split(" in ")[1] if case.task == "count" else " ".join(re.findall(r"[\d.]+\d|\d", intro))


@pytest.mark.parametrize("task", TASKS)
def test_training_draws_no_held_out_case(task: str) -> None:
    """Neither in the question nor in an earlier turn."""
    seen = {key(case) for case in drawn(task, 3000)}
    held_out = {key(case) for case in drawn(task, 300, held_out=True)}
    assert len(held_out) > 100
    assert seen & held_out == set()


def test_the_words_of_the_demonstrations_are_held_out() -> None:
    assert {"strawberry", "raspberry"} <= set(HELD_OUT_WORDS)
    assert all(map(is_held_out, HELD_OUT_WORDS))
    for case in drawn("count", 3000):
        assert not any(word in each.content.lower() for each in case.messages for word in HELD_OUT_WORDS)


def test_cases_of_all_tasks_come_with_earlier_turns_and_system_prompts_too() -> None:
    rng = Random(3)
    drawn_cases = [sample(rng, EQUAL_SHARES, Setting()) for _ in range(600)]
    for task in TASKS:
        of_task = [case for case in drawn_cases if case.task == task]
        assert any(case.messages[0].role == "system" for case in of_task)
        assert any(len(case.messages) > 2 for case in of_task)


def test_texts_past_the_window_have_the_promised_length() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    cases = past_the_window(Random(1))
    lengths = [len(tokenizer.encode(question(next(cases))).ids) for _ in range(30)]
    assert min(lengths) >= LEAST_TOKENS - 60
    assert max(lengths) <= MOST_TOKENS


def test_the_checkpoint_is_small_and_has_the_stated_shape(tmp_path: Path) -> None:
    from miniature import make_tokenizer as shape

    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert sum(each.stat().st_size for each in CHECKPOINT.iterdir()) < 12e6
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (8, 256, 640)
    shape.write_configuration(tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (CHECKPOINT / name).read_text(), name
