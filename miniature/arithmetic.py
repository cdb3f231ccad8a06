"""Comparing decimals, adding and subtracting, sorting: one function for each task.

Every thinking first writes the numbers in columns of equal width, then works through them digit by
digit in numbered rows.
"""

from __future__ import annotations

from random import Random

from miniature import phrases
from miniature.cases import Conversation, Message, Setting, vary

DECIMALS = 4
DIGITS = 6


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
            how = "larger" if rng.random() < 0.75 else "smaller"
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


def add_rows(a: int, b: int) -> list[str]:
    """Per digit from the right: its number, both digits, carry, their sum, the result so far."""
    rows, carry, result = [], 0, ""
    for place in range(DIGITS):
        left, right = a // 10**place % 10, b // 10**place % 10
        total = left + right + carry
        result = f"{total % 10}{result}"
        rows.append(f"{place + 1} {left} {right} {carry} {total:02} {result}")
        carry = total // 10
    return rows


def subtract_rows(a: int, b: int) -> list[str]:
    """Per digit from the right: its number, both digits, borrow, new borrow and digit, result."""
    rows, borrow, result = [], 0, ""
    for place in range(DIGITS):
        left, right = a // 10**place % 10, b // 10**place % 10
        digit = left - right - borrow
        result = f"{digit % 10}{result}"
        rows.append(f"{place + 1} {left} {right} {borrow} {int(digit < 0)}{digit % 10} {result}")
        borrow = int(digit < 0)
    return rows


def add_or_subtract(rng: Random, setting: Setting) -> Conversation:
    """Add or subtract two whole numbers; a difference may be negative."""
    a, b = pick_terms(rng, setting)
    columns = [f"{number:0{DIGITS}}" for number in (a, b)]
    if rng.random() < 0.5:
        question, sign, result = rng.choice(phrases.ADD_QUESTIONS), "+", a + b
        rows = [*columns, *add_rows(a, b)]
    else:
        question, sign, result = rng.choice(phrases.SUBTRACT_QUESTIONS), "-", a - b
        larger_first = sorted(columns, reverse=True)
        rows = [*columns, *digit_rows(columns)[0], *larger_first]
        rows += subtract_rows(max(a, b), min(a, b))
    thinking = "\n".join([f"I compute {a} {sign} {b}.", *rows])
    messages = (Message("user", vary(rng, question.format(a=a, b=b))),)
    answer = f"{a} {sign} {b} = \\boxed{{{result}}}"
    return Conversation("add", messages, thinking, answer, str(result))


def sort_thinking(numbers: list[int], direction: str) -> str:
    """Per row: its number, the number taken, and those that are left."""
    rows = [f"I sort {direction}: " + " ".join(f"{number:02}" for number in numbers)]
    left = list(numbers)
    for place in range(1, len(numbers) + 1):
        taken = min(left) if direction == "up" else max(left)
        left.remove(taken)
        rows.append(" ".join([f"{place} {taken:02} :", *(f"{number:02}" for number in left)]))
    return "\n".join(rows)


def sort_numbers(rng: Random, setting: Setting) -> Conversation:
    """Sort up to six numbers below a hundred, upwards or downwards."""
    while True:
        length = rng.randint(2, setting.at_most(3, 6))
        numbers = [rng.randrange(rng.choice((10, 100, 100))) for _ in range(length)]
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
