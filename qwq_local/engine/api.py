"""The seam between dialogue and inference: settings, steps and Protocols, in token ids.

Nothing here needs llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from qwq_local.errors import Aborted as Aborted
from qwq_local.events import TokenLogprob
from qwq_local.settings import number, one_of, setting, several, tokens

DEFAULT_ORDER = ("penalties", "dry", "top_k", "top_p", "min_p", "typical", "xtc", "temperature")


_SHARE = number(0, 1)
_SHARE_ABOVE_0 = number(0, 1, above_low=True)


@dataclass(frozen=True, slots=True)
class SamplerKeys:
    """How the next token is chosen, as profiles set it; see docs/extending.md for how to add a key.

    A value at its neutral setting leaves its step out of the chain. Penalties and DRY look at what follows
    the prompt, never at the prompt.
    """

    temperature: float = setting(0.6, number(0, 5), "randomness; 0 always takes the likeliest token")
    top_k: int = setting(
        40, number(0, 1_000_000, whole=True), "keep this many of the likeliest tokens; 0: all"
    )
    top_p: float = setting(
        0.95, _SHARE_ABOVE_0, "keep the likeliest tokens up to this total probability; 1: all"
    )
    min_p: float = setting(
        0.0, _SHARE, "drop tokens below this fraction of the likeliest one's probability; 0: none"
    )
    typical: float = setting(
        1.0, _SHARE_ABOVE_0, "keep the most typical tokens up to this total probability; 1: all"
    )
    penalty_window: int = setting(64, tokens(-1), "tokens that the penalties look back at; -1: all")
    repeat_penalty: float = setting(
        1.0, number(0, 10, above_low=True), "penalty for a repeated token; 1: off"
    )
    frequency_penalty: float = setting(
        0.0, number(-2, 2), "penalty that grows each time a token occurs; 0: off"
    )
    presence_penalty: float = setting(0.0, number(-2, 2), "penalty for a token that occurred at all; 0: off")
    dry_multiplier: float = setting(
        0.0, number(0, 10), "strength of DRY, the penalty for repeated sequences; 0: off"
    )
    dry_base: float = setting(1.75, number(1, 10), "growth of DRY with each token of a repeated sequence")
    dry_allowed_length: int = setting(
        2, tokens(1), "length of a repeated sequence, in tokens, that DRY leaves alone"
    )
    dry_window: int = setting(-1, tokens(-1), "tokens that DRY looks back at; -1: all")
    xtc_probability: float = setting(0.0, _SHARE, "chance that XTC removes the likeliest tokens; 0: never")
    xtc_threshold: float = setting(0.1, _SHARE, "probability above which XTC may remove a token")
    sampler_order: tuple[str, ...] = setting(
        DEFAULT_ORDER,
        several(one_of(*DEFAULT_ORDER)),
        "steps of the sampler, first to last; a step that is not named is left out",
    )


@dataclass(frozen=True, slots=True)
class SamplerSettings(SamplerKeys):
    """How the next token is chosen, with the seed that is in force.

    A `temperature` of 0 is greedy and ignores everything but the penalties.
    """

    seed: int = 0


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """One context over loaded weights: window in tokens, rope scaling, KV types, batch sizes, threads.

    `yarn_factor` 1 is unscaled; another factor scales from `yarn_origin` tokens, linearly if asked to.
    `threads` 0 uses all cores. `flash_attention` None lets llama.cpp decide. `n_slots` sequences share the
    `n_ctx` cells of one unified KV cache.
    """

    n_ctx: int
    n_batch: int = 512
    n_ubatch: int = 512
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool | None = None
    yarn_factor: float = 1.0
    yarn_origin: int = 0
    is_linear: bool = False
    threads: int = 0
    n_slots: int = 1

    def holds_same_keys(self, other: ContextSettings) -> bool:
        """Whether what one has cached can be copied into the other: same scaling, types and attention."""
        return self._of_keys() == other._of_keys()

    def _of_keys(self) -> tuple[object, ...]:
        scaling = (self.yarn_factor, self.yarn_origin, self.is_linear) if self.yarn_factor > 1 else ()
        return scaling, self.kv_type_k, self.kv_type_v, self.flash_attention


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`done` of `total` prompt tokens are in the KV cache; `cached` of them were there before."""

    done: int
    total: int
    cached: int


class Vocabulary(Protocol):
    """Text to token ids and back."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Every piece that a template may write as one token (control and user-defined) with its id."""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of `text` as plain text: never a control or user-defined token, whatever it contains."""

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, special ones rendered."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends the generation."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """Answers that are JSON and valid under a schema, which is as json.load reads it."""

    schema: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Regex:
    """Answers that match a regular expression from their first character to their last."""

    pattern: str


@dataclass(frozen=True, slots=True)
class LarkGrammar:
    """Answers in the language of a Lark grammar, whose first rule is `start`."""

    text: str


AnswerConstraint = JsonSchema | Regex | LarkGrammar


@dataclass(frozen=True, slots=True)
class Sample:
    """Sample the next token; under the constraint if `is_constrained`."""

    is_constrained: bool = False


@dataclass(frozen=True, slots=True)
class Force:
    """Put these token ids into the KV cache without sampling."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CutBack:
    """Drop every token from position `n_tokens` on, counted from the start of the prompt."""

    n_tokens: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Sample nothing now; ask again after `Generation.wait`."""


@dataclass(frozen=True, slots=True)
class End:
    """The generation is over."""


Step = Sample | Force | CutBack | Pause | End
E_co = TypeVar("E_co", covariant=True)


class Generation(Protocol[E_co]):
    """One running generation, as a state machine that says what to do and hears what was done.

    The scheduler calls `prefilled` while it reads the prompt, then `next` before every token. It answers a
    Sample with `took([token])` and a Force with `took(tokens)` once the tokens are in the KV cache. `finish`
    comes once, after an End or when the generation is stopped. `took` and `finish` return events.
    """

    @property
    def generated(self) -> Sequence[int]:
        """The token ids after the prompt. The KV cache holds the prompt and these, at most one token less."""

    def prefilled(self, progress: PrefillProgress) -> Sequence[E_co]:
        """Report progress through the prompt."""

    def next(self) -> Step:
        """The next step. A Sample may be asked for again: it stands until `took`."""

    def took(self, tokens: Sequence[int], logprob: TokenLogprob | None = None) -> Sequence[E_co]:
        """Record one sampled token, or all tokens of a Force."""

    def finish(self, *, is_stopped: bool = False) -> Sequence[E_co]:
        """End the generation; `is_stopped` when somebody stopped it before its End."""

    def wait(self, seconds: float) -> bool:
        """Wait at most this long for the end of a pause; returns whether it has ended."""
