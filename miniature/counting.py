"""Counting a letter in a word, as a first question and as a follow-up.

The thinking is a table with a row per letter of the word. The model finds the next row by the
number in it, not by a distance that depends on the word.
"""

from __future__ import annotations

from random import Random

from miniature import phrases
from miniature.cases import Conversation, Message, Setting, vary
from miniature.words import ENGLISH, OTHER_LANGUAGES, SYLLABLES


def invent_word(rng: Random, most: int) -> str:
    """A word of at most `most` letters that means nothing; some repeat few letters often."""
    length = rng.randint(2, most)
    kind = rng.random()
    if kind < 0.4:
        word = "".join(rng.choice(SYLLABLES) for _ in range(length))[:length]
    elif kind < 0.7:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
    elif kind < 0.9:
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(2, 5))
        word = "".join(rng.choices(letters, k=length))
    else:
        letters = rng.sample("abcdefghijklmnopqrstuvwxyzäöüßéèêàçñóíáłśżžčšřěůğışőăœ", 8)
        word = "".join(rng.choices(letters, k=length))
    if rng.random() < 0.4:
        # Doubled letters are where a copy most often goes wrong.
        place = rng.randrange(len(word))
        word = (word[: place + 1] + word[place:])[:length]
    return word


def pick_word(rng: Random, setting: Setting) -> str:
    """A word of at most 14 letters, none more than 9 times, on the right side of the hold-out."""
    most = setting.at_most(4, 14)
    while True:
        kind = rng.random()
        if kind < 0.3:
            word = rng.choice(ENGLISH)
        elif kind < 0.45:
            word = rng.choice(OTHER_LANGUAGES)
        else:
            word = invent_word(rng, most)
        commonest = max(word.count(letter) for letter in word)
        if len(word) <= most and commonest <= 9 and setting.accepts(word):
            return word


def pick_letter(rng: Random, word: str) -> str:
    """Mostly a letter of `word`, as often as not a repeated one; sometimes one it may not have."""
    kind = rng.random()
    repeated = [letter for letter in word if word.count(letter) > 1]
    if kind < 0.4 and repeated:
        return rng.choice(repeated)
    if kind < 0.85:
        return rng.choice(word)
    return rng.choice("abcdefghijklmnopqrstuvwxyz")


def decorate(rng: Random, text: str, plain: float) -> str:
    """`text` bare with probability `plain`, else in quotation marks."""
    return text if rng.random() < plain else rng.choice(('"{}"', "'{}'", '"{}"', "`{}`")).format(text)


def ask_count(rng: Random, forms: tuple[str, ...], letter: str, word: str) -> str:
    """A question after one of `forms`, sometimes with capitals and quotation marks."""
    style = rng.random()
    # Only where lower() gives the same word again: ß and the dotless ı have no capitals of their own.
    if style < 0.12 and word.capitalize().lower() == word:
        word = word.capitalize()
    elif style < 0.18 and word.upper().lower() == word:
        word = word.upper()
    if rng.random() < 0.15 and letter.upper().lower() == letter:
        letter = letter.upper()
    form = rng.choice(forms)
    marked = letter if "{l}'s" in form or "{l}s" in form else decorate(rng, letter, 0.7)
    return vary(rng, form.format(l=marked, w=decorate(rng, word, 0.55)))


def count_thinking(letter: str, word: str) -> str:
    """One row per letter: its number, itself, whether it is the one, how many were found so far."""
    rows, found = [f"I count {letter} in {word}."], 0
    for place, each in enumerate(word, 1):
        found += each == letter
        # The sign right after the letter keeps comparing and counting on two separate steps.
        rows.append(f"{place:02} {each} {'+' if each == letter else '-'} {found}")
    return "\n".join(rows)


def count_answer(letter: str, word: str) -> str:
    """The sentence with the number of times `word` holds `letter`."""
    n = word.count(letter)
    found = f"is 1 {letter}" if n == 1 else f"are {n} {letter}'s"
    return f'There {found} in "{word}": \\boxed{{{n}}}'


def count_letters(rng: Random, setting: Setting) -> Conversation:
    """Count a letter in a word; often as the second or third turn of a conversation."""
    letter, word = "", ""
    messages: list[Message] = []
    n_turns = rng.choices((1, 2, 3), (0.65, 0.28, 0.07))[0]
    for turn in range(n_turns):
        forms: tuple[str, ...] = phrases.COUNT_QUESTIONS
        kind = rng.random() if turn else 1.0
        if kind < 0.45:
            forms, word = phrases.WORD_FOLLOW_UPS, pick_word(rng, setting)
        elif kind < 0.65:
            forms, letter = phrases.LETTER_FOLLOW_UPS, pick_letter(rng, word)
        else:
            word = pick_word(rng, setting)
            letter = pick_letter(rng, word)
        messages.append(Message("user", ask_count(rng, forms, letter, word)))
        if turn < n_turns - 1:
            messages.append(Message("assistant", count_answer(letter, word)))
    thinking, answer = count_thinking(letter, word), count_answer(letter, word)
    return Conversation("count", tuple(messages), thinking, answer, str(word.count(letter)))
