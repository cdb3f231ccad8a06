"""Frozen values that flow out of a turn; every front end reads these and nothing else.

A turn yields, in this order: Loading (the first time), Planned, Prefill (several), Thinking (many),
ThinkingClosed, Answer (many), and Finished last; a Notice may come anywhere. Texts are pieces: joined they
are the whole. A question that `wants_tokens` gets Prompted and Generated besides; one with a control may get
Steered among the Thinking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class CloseReason(StrEnum):
    """Why the thinking ended."""

    MODEL = "model"  # it wrote </think>
    BUDGET = "budget"  # it reached its token budget
    CONTEXT = "context"  # the window minus the answer reserve was reached
    LOOP = "loop"  # the loop guard cut it back
    ASKED = "asked"  # the person wanted the answer now


class FinishReason(StrEnum):
    """Why the turn ended."""

    STOP = "stop"  # the model ended its turn
    MAX_TOKENS = "max_tokens"  # the answer reached max_tokens
    CONTEXT = "context"  # the window is full
    LOOP = "loop"  # the loop guard ended the answer
    NO_ANSWER = "no_answer"  # the thinking ended and no answer came
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Loading:
    """Weights come into memory: `fraction` from 0 to 1 of the model called `model`."""

    model: str
    fraction: float


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """What one device is predicted to hold, and what of its memory may be used, in bytes."""

    name: str
    weights: int
    kv_cache: int
    compute: int
    usable: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """Who has the context, in tokens: together with `free` they are n_ctx.

    `prompt` is this question with what the template writes; `thinking_dropped` is counted beside the others.
    """

    system: int = 0
    files: int = 0
    history: int = 0
    prompt: int = 0
    free: int = 0
    thinking_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """What was decided before the first token: sizes in tokens, and `line`, the same for a person."""

    model: str
    n_ctx: int
    prompt_tokens: int
    thinking_budget: int
    answer_reserve: int
    yarn_factor: float
    kv_type: str
    n_gpu_layers: int
    seed: int
    yarn_origin: int = 0
    flash_attention: bool = True
    n_batch: int = 0
    n_ubatch: int = 0
    line: str = ""
    reductions: tuple[str, ...] = ()
    devices: tuple[DeviceBytes, ...] = ()
    ledger: Ledger = Ledger()


@dataclass(frozen=True, slots=True)
class Prompted:
    """The token ids of the prompt, all of them, before the prefill."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability, by the model's own softmax at temperature 1.

    `top` holds (token id, log-probability) of the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """Token ids that follow the prompt: from position `start` on they are `tokens`.

    Comes about four times a second and before Finished. A `start` before the end of what was reported means
    that the loop guard cut the rest. The first `thinking` ids of all are the thinking. `sampled` tells for
    each token whether the model sampled it or the program forced it; `logprobs`, if they were asked for, has
    None for each forced token.
    """

    start: int
    tokens: tuple[int, ...]
    thinking: int
    sampled: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Progress through the prompt: `done` of `total` tokens, `cached` of them taken from the KV cache."""

    done: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Thinking:
    """A piece of the thinking trace."""

    text: str


@dataclass(frozen=True, slots=True)
class Steered:
    """A sentence that the person put into the thinking; it is part of the trace, as any Thinking is."""

    text: str


@dataclass(frozen=True, slots=True)
class ThinkingClosed:
    """The thinking ended: why, its sampled tokens, and how long it took."""

    reason: CloseReason
    tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool as it stands in the history of an assistant message."""

    name: str
    arguments: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Notice:
    """One line that a person should read: what was done and why."""

    text: str


@dataclass(frozen=True, slots=True)
class TurnStats:
    """Tokens and seconds of one turn; prefill counts only the tokens that were computed.

    Of a turn that went on from another one `resumed_tokens` of thinking and answer are the earlier one's:
    here they were prefilled, after the prompt, but for `resumed_cached` of them.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    resumed_tokens: int = 0
    resumed_cached: int = 0

    @property
    def prefill_rate(self) -> float:
        """Computed prompt tokens per second, 0 when nothing was computed."""
        computed = self.prompt_tokens - self.cached_tokens + self.resumed_tokens - self.resumed_cached
        return computed / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_rate(self) -> float:
        """Sampled tokens per second, 0 before the first."""
        sampled = self.thinking_tokens + self.answer_tokens - self.resumed_tokens
        return sampled / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a turn: why, the figures, and the turn as it belongs in the history."""

    reason: FinishReason
    stats: TurnStats
    thinking: str
    answer: str


Event = (
    Loading
    | Planned
    | Prompted
    | Prefill
    | Thinking
    | Steered
    | Generated
    | ThinkingClosed
    | Answer
    | Notice
    | Finished
)
