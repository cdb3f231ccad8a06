"""Conversations to token ids, and token ids to batches of equal width.

The prompt is the rendered chat template, the reply is the text that the model must write after it.
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from miniature.cases import Conversation, Message, Setting
from miniature.make_tokenizer import N_CTX
from miniature.tasks import sample

WIDTHS = (*range(64, 256, 32), *range(256, 512, 64), *range(512, 1025, 128))
IGNORED = -100


def render_prompt(messages: tuple[Message, ...]) -> str:
    """`messages` rendered by the chat template, up to where the thinking begins."""
    turns = (f"<|im_start|>{each.role}\n{each.content}<|im_end|>\n" for each in messages)
    return "".join(turns) + "<|im_start|>assistant\n<think>\n"


def render_reply(conversation: Conversation) -> str:
    """Thinking, its end, and the answer, as the model writes them."""
    return f"{conversation.thinking}\n</think>\n\n{conversation.answer}<|im_end|>"


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the reply."""
    prompt, reply = tokenizer.encode_batch(
        [render_prompt(conversation.messages), render_reply(conversation)], add_special_tokens=False
    )
    return prompt.ids, reply.ids


class Batches:
    """An endless supply of (tokens, targets), each of about `batch_tokens` tokens.

    Cases of similar length share a batch, so little is padding. Targets are IGNORED on the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, rng: Random, batch_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.batch_tokens = batch_tokens
        self.waiting: dict[int, list[tuple[list[int], list[int]]]] = {}

    def draw(self, shares: dict[str, float], difficulty: float) -> tuple[Tensor, Tensor]:
        """The next batch: cases drawn by `shares`, up to `difficulty`, until one width is full."""
        while True:
            # Half of the cases have the current difficulty, the others are spread below it.
            ease = 1.0 if self.rng.random() < 0.5 else self.rng.random()
            case = sample(self.rng, shares, Setting(difficulty * ease))
            prompt, reply = encode(self.tokenizer, case)
            length = len(prompt) + len(reply) - 1
            width = next((each for each in WIDTHS if length <= each), None)
            if width is None:
                continue
            row = self.waiting.setdefault(width, [])
            row.append((prompt, reply))
            if len(row) >= self.batch_tokens // width:
                return stack(self.waiting.pop(width), width)


def stack(cases: list[tuple[list[int], list[int]]], width: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (case, width), shifted by one, padded on the right."""
    tokens = np.zeros((len(cases), width), dtype=np.int64)
    targets = np.full((len(cases), width), IGNORED, dtype=np.int64)
    for place, (prompt, reply) in enumerate(cases):
        ids = prompt + reply
        tokens[place, : len(ids) - 1] = ids[:-1]
        targets[place, len(prompt) - 1 : len(ids) - 1] = reply
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def unseen(
    tokenizer: Tokenizer, rng: Random, shares: dict[str, float], n_cases: int, most: int = N_CTX
) -> list[Conversation]:
    """`n_cases` cases at full difficulty, of at most `most` tokens, that training never draws."""
    cases: list[Conversation] = []
    while len(cases) < n_cases:
        case = sample(rng, shares, Setting(held_out=True))
        if sum(map(len, encode(tokenizer, case))) <= most:
            cases.append(case)
    return cases
