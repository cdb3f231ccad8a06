"""The accuracy of a model in training: cases in, replies and the share of right ones out.

It uses the torch model; the figures of the README come from the project's own engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from miniature import make_tokenizer as shape
from miniature.cases import Conversation, boxed
from miniature.encoding import render_prompt
from miniature.model import Qwen2


@dataclass(frozen=True, slots=True)
class Sampling:
    """QwQ's sampling by default; temperature 0 takes the likeliest token."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 40


GREEDY = Sampling(temperature=0.0)


def choose(logits: Tensor, sampling: Sampling, source: torch.Generator) -> Tensor:
    """One token per row of `logits`: top_k, top_p, temperature, in llama.cpp's order."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(sampling.top_k)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    values = values.masked_fill(before >= sampling.top_p, -torch.inf) / sampling.temperature
    picked = torch.multinomial(values.softmax(-1), 1, generator=source)
    return tokens.gather(-1, picked).squeeze(-1)


@torch.inference_mode()
def generate(
    model: Qwen2, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, most: int = 400
) -> list[str]:
    """A reply per prompt, without its `<|im_end|>`; all prompts are decoded side by side."""
    device = model.lm_head.weight.device
    end = shape.added_tokens()["<|im_end|>"]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    width = max(map(len, encoded))
    # Padding is on the left, so all replies start in one column; the model depends on distances only.
    rows = [[end] * (width - len(ids)) + ids for ids in encoded]
    tokens = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    padding = torch.arange(width, device=device) < width - lengths[:, None]
    caches: list[list[Tensor]] = [[] for _ in model.model.layers]
    source = torch.Generator(device).manual_seed(0)
    written: list[Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while not done.all() and len(written) < min(most, shape.N_CTX - width):
        logits = model.lm_head(model(tokens, caches, padding)[:, -1])
        tokens = choose(logits, sampling, source)[:, None]
        done |= tokens[:, 0] == end
        written.append(tokens)
        padding = torch.cat((padding, torch.zeros_like(tokens, dtype=torch.bool)), dim=1)
    replies = torch.cat(written, dim=1).tolist()
    pieces = [ids[: ids.index(end)] if end in ids else ids for ids in replies]
    return tokenizer.decode_batch(pieces, skip_special_tokens=False)


def is_right(case: Conversation, reply: str) -> bool:
    """Whether the thinking ended and the answer has the result."""
    _, closed, answer = reply.partition("</think>")
    expected = boxed(case.answer)
    if expected is None:
        return bool(closed) and answer.strip() == case.answer
    return bool(closed) and boxed(answer) == expected


def accuracy(
    model: Qwen2, tokenizer: Tokenizer, cases: Sequence[Conversation], sampling: Sampling
) -> tuple[float, list[tuple[Conversation, str]]]:
    """The share of right answers, and the wrong ones as (case, reply)."""
    prompts = [render_prompt(case.messages) for case in cases]
    replies = generate(model, tokenizer, prompts, sampling)
    wrong = [pair for pair in zip(cases, replies, strict=True) if not is_right(*pair)]
    return 1 - len(wrong) / len(cases), wrong
