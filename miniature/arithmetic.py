"""Comparing decimals, adding and subtracting, sorting: one function for each task.

Every thinking first writes the numbers in columns of equal width, then works through them digit by
digit in numbered rows.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from miniature import phrases
from miniature.cases import Conversation, Message, Setting, vary

DECIMALS = 4
PLACES = "abcdef"
SORTED_DIGITS = 3


def pick_decimals(rng: Random, setting: Setting) -> tuple[str, str]:
    """Two decimals of up to two and up to four digits, often alike in their first digits."""
    while True:
        whole = rng.randint(0, rng.choice((9, 99)))
        n_decimals = setting.at_most(1, DECIMALS)
        texts = []
        shared = "".join(rng.choices("0123456789", k=rng.randint(0, n_decimals - 1)))
        for _ in range(2):
            if rng.random() < 0.15:
                whole = rng.randint(0, 99)
            start = shared if rng.random() < 0.6 else ""
            n_more = rng.randint(0, n_decimals - len(start))
            digits = start + "".join(rng.choices("0123456789", k=n_more))
            texts.append(f"{whole}.{digits}" if digits else str(whole))
        if setting.accepts(" ".join(texts)):
            return texts[0], texts[1]


def digit_rows(columns: list[str]) -> tuple[list[str], str]:
    """Rows of digits from the left down to the first difference, and its sign (`=` for none)."""
    rows, sign = [], "="
    for place, (left, right) in enumerate(zip(*columns, strict=True), 1):
        sign = "=" if left == right else "<" if left < right else ">"
        rows.append(f"{place} {left} {right} {sign}")
        if sign != "=":
            break
    return rows, sign


def compare(a: str, b: str, how: str) -> tuple[str, str, str]:
    """Thinking, answer, and the number that is `how` (the first where both are equal)."""
    columns = [f"{float(text):0{DECIMALS + 3}.{DECIMALS}f}" for text in (a, b)]
    rows, sign = digit_rows([column.replace(".", "") for column in columns])
    thinking = "\n".join([f"I want the {how} of {a} and {b}.", *columns, *rows])
    if sign == "=":
        return thinking, f"{a} and {b} are equal: \\boxed{{{a}}}", a
    picked, rest = (a, b) if (sign == ">") == (how == "larger") else (b, a)
    return thinking, f"{picked} is {how} than {rest}: \\boxed{{{picked}}}", picked


def compare_decimals(rng: Random, setting: Setting) -> Conversation:
    """Say which of two decimals is larger or smaller; sometimes as a second turn."""
    messages: list[Message] = []
    how, word = "", ""
    while True:
        follows = bool(messages) and rng.random() < 0.6
        if not follows:
            how = "larger" if rng.random() < 0.55 else "smaller"
            word = rng.choice(phrases.LARGER if how == "larger" else phrases.SMALLER)
        form = rng.choice(phrases.COMPARE_FOLLOW_UPS if follows else phrases.COMPARE_QUESTIONS)
        a, b = pick_decimals(rng, setting)
        messages.append(Message("user", vary(rng, form.format(how=word, a=a, b=b))))
        thinking, answer, picked = compare(a, b, how)
        if len(messages) > 1 or rng.random() < 0.8:
            return Conversation("compare", tuple(messages), thinking, answer, picked)
        messages.append(Message("assistant", answer))


def pick_terms(rng: Random, setting: Setting) -> tuple[int, int]:
    """Two numbers of up to five digits each."""
    most = setting.at_most(1, 5)
    while True:
        a, b = (rng.randrange(10 ** rng.randint(1, most)) for _ in range(2))
        if setting.accepts(f"{a} {b}"):
            return a, b


def place_rows(first: dict[str, int], second: dict[str, int], sign: str) -> list[str]:
    """Per digit from the right: both digits combined, carry, then with it; the result so far.

    The carry of a difference is a borrow: `2-5=17` is 7 with one borrowed. There `first` is the larger.
    """
    rows, carry, result = [], 0, ""
    for (place, left), (other_place, right) in zip(first.items(), second.items(), strict=True):
        # The model learns two small tables, digits and then the carry, sooner than one table of both.
        plain = combine(left, right, sign)
        total = combine(left, right + carry, sign)
        result = f"{total[1]}{result}"
        rows.append(f"{place}{left}{sign}{other_place}{right}={plain}{sign}{carry}={total} {result}")
        carry = int(total[0])
    return rows


def digits_by_place(number: int, places: str) -> dict[str, int]:
    """The digits of `number` from the right, each under the letter of its place."""
    return {place: number // 10**power % 10 for power, place in enumerate(places)}


def first_difference(first: dict[str, int], second: dict[str, int]) -> tuple[str, str]:
    """Digits compared from the left down to the first difference, and its sign (`=` for none)."""
    text, sign = "", "="
    for place, left in reversed(first.items()):
        right = second[place.upper()]
        sign = "=" if left == right else "<" if left < right else ">"
        text += f"{place}{left}{place.upper()}{right}{sign}"
        if sign != "=":
            break
    return text, sign


def calculate(a: int, b: int, sign: str) -> str:
    """Thinking: both numbers as digits that carry the letter of their place, then row by row.

    A row finds its digits by the letters, small for `a` and capital for `b`.
    """
    first, second = digits_by_place(a, PLACES), digits_by_place(b, PLACES.upper())
    rows = [f"I compute {a} {sign} {b}."]
    rows += [
        "".join(f"{place}{digit}" for place, digit in reversed(each.items())) for each in (first, second)
    ]
    if sign == "-":
        compared, found = first_difference(first, second)
        rows.append(compared)
        if found == "<":
            first, second = second, first
    return "\n".join(rows + place_rows(first, second, sign))


def combine(left: int, right: int, sign: str) -> str:
    """Carry and digit of a sum, or borrow and digit of a difference."""
    if sign == "+":
        return f"{left + right:02}"
    return f"{int(left < right)}{(left - right) % 10}"


def add_or_subtract(rng: Random, setting: Setting) -> Conversation:
    """Add or subtract two whole numbers; a difference may be negative."""
    a, b = pick_terms(rng, setting)
    sign = rng.choice("+-")
    questions = phrases.ADD_QUESTIONS if sign == "+" else phrases.SUBTRACT_QUESTIONS
    result = str(a + b if sign == "+" else a - b)
    messages = (Message("user", vary(rng, rng.choice(questions).format(a=a, b=b))),)
    answer = f"{a} {sign} {b} = \\boxed{{{result}}}"
    return Conversation("add", messages, calculate(a, b, sign), answer, result)


def sort_thinking(numbers: list[int], direction: str) -> str:
    """Per row: the letter of the list before, the number removed from it, and the remaining list.

    Each number has two letters: that of its list, and a capital letter of its own that stays.
    """
    sign, pick = ("<", min) if direction == "up" else (">", max)
    left = {name: f"{number:0{SORTED_DIGITS}}" for name, number in zip("ABCDEF", numbers, strict=False)}
    rows = [" ".join([f"I sort {sign}", *(f"a{name}{number}" for name, number in left.items())])]
    for letter, following in pairwise("abcdefg"[: len(numbers) + 1]):
        taken = pick(left, key=left.__getitem__)
        rows.append(f"{letter} {sign} {left.pop(taken)}{taken}:")
        rows[-1] += "".join(f" {following}{name}{number}" for name, number in left.items())
    return "\n".join(rows)


def sort_numbers(rng: Random, setting: Setting) -> Conversation:
    """Sort up to six numbers below a thousand, upwards or downwards."""
    while True:
        length = rng.randint(2, setting.at_most(3, 6))
        most = 10 ** rng.choice((1, 2, 2, 3, 3))
        numbers = [rng.randrange(rng.choice((most, most, 10, 1000))) for _ in range(length)]
        if setting.accepts(str(numbers)):
            break
    direction = "down" if rng.random() < 0.3 else "up"
    endings = phrases.SORTED_UP if direction == "up" else phrases.SORTED_DOWN
    text = rng.choice((", ", ", ", " ")).join(map(str, numbers))
    if rng.random() < 0.15:
        text = f"[{text}]"
    question = rng.choice(phrases.SORT_QUESTIONS).format(list=text + rng.choice(endings))
    in_order = ", ".join(map(str, sorted(numbers, reverse=direction == "down")))
    answer = f"In order: \\boxed{{{in_order}}}"
    messages = (Message("user", vary(rng, question)),)
    return Conversation("sort", messages, sort_thinking(numbers, direction), answer, in_order)
