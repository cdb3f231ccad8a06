"""Pass keys past the native window: texts of a given length in tokens, and the loss by position.

The losses are read from llama.cpp's logits directly, because the engine keeps
those of the last token only; the context's settings are the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from llama_cpp import LLAMA_ROPE_SCALING_TYPE_NONE, LLAMA_ROPE_SCALING_TYPE_YARN, Llama

from miniature.cases import Conversation, Setting
from miniature.make_tokenizer import N_CTX
from miniature.tasks import pass_key_in

LEAST_TOKENS, MOST_TOKENS = 1500, 2000
# Tokens of filler text per character.
DENSITY = 0.83
CASES_A_STEP = 12
STEP = 125


def past_the_window(rng: Random) -> Iterator[Conversation]:
    """Unseen pass keys in texts of about 1,500 to 2,000 tokens, question and reply included."""
    while True:
        n_tokens = rng.randint(LEAST_TOKENS, MOST_TOKENS - 150)
        yield pass_key_in(rng, round(n_tokens / DENSITY), Setting(held_out=True))


def losses_by_position(path: Path, factor: float) -> dict[str, float]:
    """Mean loss of a pass key's digits by the position (in steps of STEP) at which they are written.

    In nats a token: the digits in the thinking, after the text and "I look for ...". `factor` 1 is no YaRN.
    """
    model = open_model(path, factor)
    rng = Random(1)
    losses: dict[str, float] = {}
    for start in range(STEP, MOST_TOKENS, STEP):
        found: list[float] = []
        while len(found) < CASES_A_STEP:
            n_tokens = rng.randint(start, start + STEP)
            case = pass_key_in(rng, round((n_tokens - 50) / DENSITY), Setting(held_out=True))
            tokens, n_digits = up_to_key(model, case)
            if start <= len(tokens) - n_digits < start + STEP:
                found.append(digit_loss(model, tokens, n_digits))
        losses[str(start + STEP // 2)] = round(float(np.mean(found)), 4)
    model.close()
    return losses


def open_model(path: Path, factor: float) -> Llama:
    """The GGUF in a context past the window, with the engine's YaRN settings."""
    scaling = LLAMA_ROPE_SCALING_TYPE_YARN if factor > 1 else LLAMA_ROPE_SCALING_TYPE_NONE
    return Llama(
        str(path),
        n_ctx=2 * N_CTX,
        n_batch=2 * N_CTX,
        n_ubatch=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        rope_scaling_type=scaling,
        rope_freq_scale=1 / factor,
        yarn_orig_ctx=N_CTX,
        verbose=False,
    )


def up_to_key(model: Llama, case: Conversation) -> tuple[list[int], int]:
    """The tokens of question and thinking up to the key's last digit, and the number of its digits."""
    start, _, _ = case.thinking.rpartition(f"{case.result}.")
    text = f"<|im_start|>user\n{case.messages[0].content}<|im_end|>\n<|im_start|>assistant\n<think>\n{start}"
    before = model.tokenize(text.encode(), add_bos=False, special=True)
    digits = model.tokenize(case.result.encode(), add_bos=False)
    return before + digits, len(digits)


def digit_loss(model: Llama, tokens: list[int], n_digits: int) -> float:
    """Mean cross-entropy of the last `n_digits` tokens, in nats."""
    model.reset()
    model.eval(tokens)
    logits = model.scores[len(tokens) - n_digits - 1 : len(tokens) - 1].astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    log_sums = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
    return float(np.mean(log_sums - logits[np.arange(n_digits), tokens[-n_digits:]]))
