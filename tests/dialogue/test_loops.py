"""The loop guard: hand-made loops must end, text that merely repeats must pass."""

from __future__ import annotations

import base64
import pickle
import random
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from qwq_local.dialogue.loops import Loop, LoopGuard, LoopSettings

Tokenizer = Callable[[str], list[str]]
THINKING, ANSWER = LoopSettings.thinking(), LoopSettings.answer()
BOTH = pytest.mark.parametrize("settings", [THINKING, ANSWER], ids=["thinking", "answer"])


def words(text: str) -> list[str]:
    return re.findall(r"\s*\w+|\W", text)


def chars(text: str) -> list[str]:
    return list(text)


TOKENIZERS = pytest.mark.parametrize("tokenizer", [words, chars])


def watch(text: str, settings: LoopSettings, tokenizer: Tokenizer = words) -> tuple[Loop, str, int] | None:
    """The first loop found, the text before it, and the number of tokens so far."""
    guard, ids = LoopGuard(settings), dict[str, int]()
    pieces = tokenizer(text)
    for index, piece in enumerate(pieces):
        loop = guard.feed(ids.setdefault(piece, len(ids)), piece)
        if loop:
            return loop, "".join(pieces[: loop.start]), index + 1
    return None


def found(text: str, settings: LoopSettings, tokenizer: Tokenizer = words) -> tuple[Loop, str, int]:
    result = watch(text, settings, tokenizer)
    assert result is not None
    return result


def lines(template: str, count: int, first: int = 1) -> str:
    return "".join(template.format(n=n, square=n * n, odd=n % 2) + "\n" for n in range(first, first + count))


def vocabulary(count: int) -> list[str]:
    """Made-up words, all different and without digits."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return [syllables[n % 60] + syllables[n // 60 % 60] + syllables[(7 * n + 3) % 60] for n in range(count)]


def paragraph(n_tokens: int, seed: int = 0) -> str:
    """One paragraph of sentences, `n_tokens` word-level tokens long."""
    chosen = random.Random(seed).choices(vocabulary(400), k=n_tokens)
    for index in range(11, n_tokens - 1, 12):
        chosen[index] = "."
    chosen[-2:] = [".", "\n"]
    return "".join(word if word in ".\n" else " " + word for word in chosen)


PROSE = paragraph(400, seed=9)

# Text that repeats legitimately.

REFRAIN = (
    "Row, row, row your boat,\nGently down the stream,\n"
    "Merrily, merrily, merrily, merrily,\nLife is but a dream.\n\n"
)
HAIKU = "The old pond is still.\nA frog jumps into the pond.\nThe old pond is still.\n"
NAMES = vocabulary(320)
VERSES = [
    f"The {a} went over the {b} hill,\nand sang of the {c} by the {d} mill.\n\n"
    for a, b, c, d in zip(NAMES, NAMES[40:], NAMES[80:], NAMES[120:], strict=False)
]
DIVISION = "".join(
    f"Bring down the {n * 7 % 10}. How many times does 7 go into {n * 13 % 70}? "
    f"It goes {n * 13 % 70 // 7} times. Subtract and write the remainder below.\n"
    for n in range(30)
)
CASES = "".join(
    f"Case n = {n}: n^2 + n = {n * n + n}. This number is even, so the claim holds for this case too.\n"
    for n in range(1, 61)
)
LEGAL = "".join(
    f"{n}. The Licensee shall not {a} or {b} the {c}, except as provided in Section {n + 3}. "
    f"The Licensor may {d} the {c} at any time upon written notice to the Licensee.\n"
    for n, (a, b, c, d) in enumerate(zip(NAMES, NAMES[60:], NAMES[130:], NAMES[200:60:-1], strict=False), 1)
    if n <= 60
)
UNIT_TESTS = "".join(
    f"    def test_case_{n}(self) -> None:\n        result = compute(value={n})\n"
    f"        self.assertEqual(result.status, Status.READY)\n"
    f"        self.assertEqual(result.total, {n * 31})\n\n"
    for n in range(100)
)
API_DOCUMENTATION = "".join(
    f"def {verb}_{name}(self, namespace, body):\n    Creates the request that this method sends.\n"
    "    This method makes a synchronous HTTP request by default.\n"
    "    To make an asynchronous HTTP request, please pass a callback.\n"
    f"    :param str {name}: the {verb} of the {name}\n    :return: V1{name}\n"
    "    If the method is called asynchronously, returns the request thread.\n"
    f"    path = '/apis/{name}/{verb}'\n    {name} = {verb}(body, '{name}')\n\n"
    for verb, name in zip(NAMES[::2], NAMES[1::2], strict=False)
)
BOARDS = "".join(
    "Now apply the same rule to every row above and write down the next board:\n"
    + lines(f"| {{n}} | {{square}} | {round_} | . |", 12)
    + "That was one more step of the rule, and it changed the board again.\n"
    for round_ in range(30)
)
REPEATING = {
    "markdown table": "| n | square | odd |\n|---|---|---|\n" + lines("| {n} | {square} | {odd} |", 200),
    "table of equal rows": "| a | b | c |\n|---|---|---|\n" + "| 0 | 0 | 0 |\n" * 120,
    "table of sentences": lines("| {n} | The value in this row is {n}. It is fine. |", 300),
    "switch": lines('        case {n}: return "value number {n}";', 200),
    "unit tests": UNIT_TESTS,
    "fenced unit tests": f"```python\n{UNIT_TESTS * 2}```\n",
    "commented code": "```python\n"
    + lines("# The next line stores the value {n}.\nvalues[{n}] = {n}", 400)
    + "```\n",
    "array of numbers": ", ".join(str(n * 7919 % 1000) for n in range(600)),
    "imports": lines("from package.module{n} import ClassNumber{n}", 150),
    "html rows": lines("  <tr><td>Name of person {n}</td><td>{square}</td><td>active user</td></tr>", 200),
    "json objects": "[\n"
    + lines('  {{"id": {n}, "name": "user {n}", "role": "admin of the site"}},', 200)
    + "]",
    "equal json objects": '{"kind": "empty", "value": null},\n' * 15,
    "list": "".join(f"{n}. {name}\n" for n, name in enumerate(NAMES[:300], 1)),
    "list of one word": lines("{n}. foo", 300),
    "list of sentences": lines("{n}. Remember to water plant number {n}.", 300),
    "poem with a refrain": "".join(verse + REFRAIN for verse in VERSES[:6]),
    "refrain alone": REFRAIN * 6,
    "haiku": HAIKU,
    "counting in lines": lines("{n}", 500),
    "counting in a row": ", ".join(map(str, range(1, 501))),
    "letter trace": "".join(f"{n:02} {c} {int(c == 'r')}\n" for n, c in enumerate("strawberry" * 3, 1)),
    "long division": DIVISION,
    "cases": CASES,
    "legal text": LEGAL,
    "sentences between tables": BOARDS,
    "documentation of methods": API_DOCUMENTATION,
    "base64": base64.encodebytes(random.Random(1).randbytes(3000)).decode(),
    "hex dump": "".join(f"{n * 16:08x}  {random.Random(n).randbytes(16).hex(' ')}\n" for n in range(100)),
    "rule": f"{'=' * 200}\nResult\n{'-' * 200}\n",
    "spaces": f"a{' ' * 200}b",
    "ascii art": "".join(" " * (20 - n) + "*" * (2 * n + 1) + "\n" for n in range(20)),
    "zeros": "[" + "0, " * 200 + "0]",
    "decimal zeros": "[" + "0.0, " * 200 + "0.0]",
    "matrix of zeros": "0 0 0 0 0 0 0 0 0 0\n" * 20,
    "a draft written twice": paragraph(900) + "Let me write that down properly.\n" + paragraph(900),
    "prose": PROSE,
    "two answers checked": "Wait, let me check that again. So the answer is 12.\n" * 10 + PROSE,
}


@BOTH
@TOKENIZERS
@pytest.mark.parametrize("name", REPEATING)
def test_text_that_merely_repeats_passes(name: str, tokenizer: Tokenizer, settings: LoopSettings) -> None:
    assert watch(REPEATING[name], settings, tokenizer) is None


@BOTH
def test_suspicion_decays_while_new_text_comes(settings: LoopSettings) -> None:
    """Forty rounds of the same two sentences, each with a new sentence of the same length."""
    same = "Wait, let me check that again. So the answer is still 12. "
    news = re.findall(r"[^.]+\.", paragraph(2000, seed=3))
    assert watch("".join(same + fresh for fresh in news[:150]), settings) is None


# Loops.

INTRO = "We are asked for the number of ways to tile the board. First, count the corners.\n"
CYCLES = {
    "one word": ("the", " again"),
    "a symbol": ("So it is", "!"),
    "a phrase": ("and then", " the cat and the dog and"),
    "a sentence": ("", "No, that is not right. "),
    "two sentences": ("", "Wait, that is not right. Let me compute it again: 3 + 4 = 7.\n"),
    "numbers": ("Digits:", " 0, 1, 2, 3,"),
}


@BOTH
@pytest.mark.parametrize("name", CYCLES)
def test_an_exact_cycle_ends_with_one_occurrence_kept(name: str, settings: LoopSettings) -> None:
    lead, unit = CYCLES[name]
    loop, kept, seen = found(INTRO + lead + unit * 4000, settings)
    assert loop.kind == "cycle"
    assert loop.period == len(words(unit * 3)) - len(words(unit * 2))
    assert kept.rstrip() == (INTRO + lead + unit).rstrip()
    assert seen < (1_700 if settings == THINKING else 3_200)


@BOTH
@pytest.mark.parametrize("length", [40, 300, 1000])
def test_a_cycle_of_paragraphs_ends_within_a_few(length: int, settings: LoopSettings) -> None:
    unit = paragraph(length)
    _, kept, seen = found(PROSE + unit * 60, settings)
    assert kept.rstrip() == (PROSE + unit).rstrip()
    repeats = (seen - len(words(PROSE))) / length
    assert repeats <= max(settings.long_repeats, settings.short_tokens / length)


def test_a_paragraph_of_1000_tokens_ends_before_its_fourth_occurrence() -> None:
    assert watch(PROSE + paragraph(1000) * 3, THINKING)


def test_a_cycle_that_repeats_a_part_of_itself_is_cut_where_it_began() -> None:
    """The period is found late here, because its first words occur again within it."""
    part = " ".join(NAMES[:12]) + " "
    unit = part * 3 + " ".join(NAMES[12:60]) + ","
    loop, kept, _ = found(unit * 40, THINKING)
    assert loop.period == len(words(unit))
    assert kept == unit


def test_a_cycle_in_characters_is_cut_where_a_sentence_begins() -> None:
    unit = "Hmm, no. I will try it again. "
    _, kept, _ = found(INTRO + unit * 200, THINKING, chars)
    assert kept == INTRO + unit


def test_a_cycle_that_ends_like_the_text_before_it_is_cut_after_a_whole_sentence() -> None:
    """The full stop before the cycle equals its last token, so the match begins one token early."""
    _, kept, _ = found("It is wrong." + " No." * 2000, THINKING)
    assert kept == "It is wrong. No."


@BOTH
def test_a_cycle_in_fenced_code_must_be_longer(settings: LoopSettings) -> None:
    unit = "value = value + step\n"
    _, _, outside = found(unit * 5000, settings)
    _, kept, inside = found("```python\n" + unit * 5000, settings)
    assert inside > 1.9 * outside
    assert kept.rstrip() == ("```python\n" + unit).rstrip()


def variations(count: int, seed: int) -> str:
    """The output of a quantized model that is stuck: a few sentences in many wordings, for ever."""
    pick = random.Random(seed).choice
    check = ["Wait, let me double-check.", "Wait, let me double check that.", "Hmm, let me double check."]
    so = [
        "So the answer is 12.",
        "Hmm, so the answer is 12.",
        "So, the answer is again 12.",
        "Thus the answer is 12.",
    ]
    doubt = ["But is that really right?", "But wait, is that really right?", ""]
    return "".join(" ".join([pick(check), pick(so), pick(doubt)]) + " " for _ in range(count))


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_the_same_sentences_with_small_changes_end(seed: int, settings: LoopSettings) -> None:
    loop, kept, seen = found(PROSE + variations(600, seed), settings)
    assert loop.kind == "sentence"
    assert PROSE in kept
    assert len(kept) - len(PROSE) < 500
    assert seen - len(words(PROSE)) < (1_400 if settings == THINKING else 2_600)


COUNTS_UP = {
    "a trial": "Let me try x = {n}. That does not work.",
    "a check": "Wait, let me check {n} again.",
    "a line": "Let me now look at the number {n}",
    "mixed case": "LET ME TRY x = {n}. Then it FAILS, I see.\nLet me try X = {n}. Then it fails, I see.",
}


@pytest.mark.parametrize("name", COUNTS_UP)
def test_a_sentence_that_counts_up_ends_in_the_hundreds(name: str) -> None:
    template = COUNTS_UP[name]
    assert watch(INTRO + lines(template, 60), THINKING) is None
    loop, kept, _ = found(INTRO + lines(template, 700), THINKING)
    assert loop.kind == "sentence"
    assert template.split("{n}")[0] in kept
    assert kept.rstrip() in ((INTRO + lines(template, 1)).rstrip(), INTRO + template.format(n=1))


def test_counting_up_ends_in_the_answer_too() -> None:
    template = COUNTS_UP["a trial"]
    assert watch(lines(template, 200), ANSWER) is None
    assert watch(lines(template, 1000), ANSWER)


def test_a_loop_in_chinese_ends() -> None:
    text = "".join(f"等等，让我再检查一下第{n % 3}个。所以答案是十二。" for n in range(400))
    _, kept, seen = found(text, THINKING, chars)
    assert kept.count("所以答案是十二。") <= 3
    assert seen < 2_000


def test_a_long_cycle_with_one_number_that_changes_ends() -> None:
    """No cycle is exact here: every paragraph has a new number."""
    body = paragraph(300)
    loop, kept, seen = found(
        "".join(f"Attempt number {n} goes like this.\n{body}" for n in range(40)), THINKING
    )
    assert loop.kind == "sentence"
    assert kept.count(body.rstrip()) == 1
    assert seen < 4_000


# Cost.


def lines_run(action: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def feed(guard: LoopGuard, text: str) -> None:
    for piece in words(text):
        guard.feed(hash(piece) & 0xFFFF, piece)


def test_a_token_costs_the_same_after_many_thousands() -> None:
    guard = LoopGuard()
    early = lines_run(lambda: feed(guard, paragraph(3000, seed=1)))
    for seed in range(2, 12):
        feed(guard, paragraph(3000, seed=seed))
    late = lines_run(lambda: feed(guard, paragraph(3000, seed=12)))
    assert late < 1.5 * early
    assert late < 200 * 3000


def test_memory_does_not_grow_with_the_text() -> None:
    guard = LoopGuard()
    sizes = []
    for seed in range(6):
        feed(guard, paragraph(20_000, seed=seed))
        sizes.append(len(pickle.dumps(guard)))
    assert max(sizes) < 1.2 * sizes[1]


def test_reset_forgets_the_loop_and_counts_from_zero() -> None:
    guard = LoopGuard()
    feed(guard, "again " * 300)
    guard.reset()
    loops = [guard.feed(7, " again") for _ in range(THINKING.min_tokens)]
    assert loops[:-1] == [None] * (THINKING.min_tokens - 1)
    assert loops[-1] == Loop(1, 1, "cycle")


@pytest.mark.parametrize(
    ("period", "has_letters", "in_code", "expected"),
    [
        (1, True, False, 640),
        (1, False, False, 1500),
        (1, True, True, 1280),
        (100, True, False, 800),
        (1000, True, False, 3000),
    ],
)
def test_the_shortest_cycle_depends_on_its_kind(
    period: int, has_letters: bool, in_code: bool, expected: int
) -> None:
    assert THINKING.required_tokens(period, has_letters, in_code) == expected
