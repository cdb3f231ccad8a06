"""The miniature's tasks: seeded generators of conversations with thinking and answer.

A task makes a `Conversation` from a random generator and a difficulty. To add a task, add a function to
`TASKS`. This module imports only the standard library.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from miniature import phrases
from miniature.arithmetic import add_or_subtract, compare_decimals, sort_numbers
from miniature.cases import Conversation, Message, Setting, Task, vary
from miniature.counting import count_letters, invent_word
from miniature.words import ENGLISH

ABOUT = (
    "I am a tiny test model: I count letters, compare, add, subtract and sort numbers "
    "and find pass keys. `qwq pull` brings QwQ-32B."
)
# About 950 tokens: with the question and the reply that is the window.
TEXT_CHARACTERS = 1100


def write_text(rng: Random, n_characters: int) -> list[str]:
    """Sentences without meaning, `n_characters` or a little more in all."""
    sentences: list[str] = []
    while sum(len(each) for each in sentences) < n_characters:
        a, b, n = rng.choice(ENGLISH), rng.choice(ENGLISH), rng.randint(2, 2000)
        sentences.append(rng.choice(phrases.FILLER).format(a=a, b=b, n=n))
    return sentences


def ask_of_text(rng: Random, question: str, sentences: list[str]) -> str:
    """A message of a text and a question, in either order."""
    parts = [" ".join(sentences), question]
    if rng.random() < 0.25:
        parts.reverse()
    return rng.choice(("\n\n", "\n\n", "\n", " ")).join(parts)


def other(rng: Random, setting: Setting) -> Conversation:
    """Any other question: the reply says what this model is and how to get QwQ-32B."""
    while True:
        n = str(rng.randint(2, 99))
        form = rng.choice(phrases.OTHER_FORMS) if rng.random() < 0.85 else rng.choice(phrases.OTHER_WHOLE)
        text = form.format(a=rng.choice(ENGLISH), b=rng.choice(ENGLISH), n=n)
        kind = rng.random()
        if kind < 0.05:
            text = " ".join(invent_word(rng, 9) for _ in range(rng.randint(1, 6)))
        elif kind < 0.15:
            question = rng.choice(phrases.TEXT_QUESTIONS).format(a=rng.choice(ENGLISH))
            text = ask_of_text(rng, question, write_text(rng, rng.randint(20, 400)))
        text = vary(rng, text)
        if setting.accepts(text):
            break
    return Conversation("other", (Message("user", text),), "This is none of my tasks.", ABOUT, ABOUT)


def find_pass_key(rng: Random, setting: Setting) -> Conversation:
    """Find a pass key in a text that, with the question and the reply, about fills the window."""
    return pass_key_in(rng, rng.randint(0, setting.at_most(80, TEXT_CHARACTERS)), setting)


def pass_key_in(rng: Random, n_characters: int, setting: Setting) -> Conversation:
    """Find a number of four to six digits that is hidden anywhere in a text of `n_characters`."""
    while True:
        key = str(rng.randrange(1000, 1000000))
        if setting.accepts(key):
            break
    sentences = write_text(rng, n_characters)
    sentences.insert(rng.randint(0, len(sentences)), rng.choice(phrases.PASS_KEY_PLANTS).format(k=key))
    whole = ask_of_text(rng, rng.choice(phrases.PASS_KEY_QUESTIONS), sentences)
    thinking = f"I look for the pass key in the text: {key}."
    answer = f"The pass key is \\boxed{{{key}}}"
    return Conversation("passkey", (Message("user", whole),), thinking, answer, key)


TASKS: dict[str, Task] = {
    "count": count_letters,
    "other": other,
    "compare": compare_decimals,
    "add": add_or_subtract,
    "sort": sort_numbers,
    "passkey": find_pass_key,
}


def with_surroundings(rng: Random, conversation: Conversation, earlier: Conversation) -> Conversation:
    """The same case, sometimes with a system prompt, a standard suffix or an earlier turn."""
    messages = conversation.messages
    if rng.random() < 0.06:
        question = messages[-1].content + rng.choice(" \n") + phrases.BOXED
        messages = (*messages[:-1], Message("user", question))
    if rng.random() < 0.1:
        messages = (*earlier.messages, Message("assistant", earlier.answer), *messages)
    if rng.random() < 0.08:
        messages = (Message("system", rng.choice(phrases.SYSTEM_PROMPTS)), *messages)
    return replace(conversation, messages=messages)


def sample(rng: Random, shares: dict[str, float], setting: Setting) -> Conversation:
    """A case of a task drawn by its share, with surroundings drawn at random."""
    first, second = rng.choices(list(shares), list(shares.values()), k=2)
    return with_surroundings(rng, TASKS[first](rng, setting), TASKS[second](rng, setting))
