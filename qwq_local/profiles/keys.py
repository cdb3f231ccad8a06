"""What a profile may say: its keys, and the Profile that comes of them.

Each key is declared once, as a field of `Profile` or of engine.api.SamplerKeys, with its default, what it
accepts and what it means. Profile files, environment variables, `--set`, `/set` and docs/keys.md follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches

from qwq_local.engine.api import SamplerKeys, SamplerSettings
from qwq_local.errors import ProfileError
from qwq_local.planning.shape import KV_TYPES
from qwq_local.settings import (
    Rule,
    file_table,
    free_text,
    number,
    one_of,
    quoted,
    setting,
    several,
    switch,
    tokens,
)

MAX_SEED = 0xFFFFFFFE  # llama.cpp reads 0xFFFFFFFF as "draw one"
EXCERPT_CHARS = 60
_FILES = "file name of each quantization type in the repository"


@dataclass(frozen=True, slots=True)
class Profile(SamplerKeys):
    """Everything that can be set about a run. Every field but `is_window_known` is a key of the same name.

    Windows and budgets are in tokens. None means: let the program choose. `is_window_known` is False when
    the window is QwQ-32B's because no profile names that of this model.
    """

    # The model: where its files are, what window it was trained with.
    description: str = setting("", free_text(), "what the profile is for")
    repo: str = setting(
        "",
        free_text(r"[\w.-]+/[\w.-]+", "owner/name of a repository on the hub"),
        "repository that qwq pull takes the model from",
    )
    files: Mapping[str, str] = field(default_factory=dict, metadata={"rule": file_table(), "meaning": _FILES})
    native_window: int = setting(32_768, tokens(64), "window that the model was trained with")
    yarn_origin: int = setting(32_768, tokens(64), "window that YaRN scales from")
    yarn_factors: tuple[float, ...] = setting(
        (1.0,), several(number(1, 64)), "YaRN factors that the model was tried with"
    )
    max_thinking_budget: int = setting(0, tokens(0), "largest thinking budget that a task may set; 0: any")
    max_answer_reserve: int = setting(0, tokens(0), "largest answer reserve that a task may set; 0: any")

    # The context: see engine.api.ContextSettings.
    seed: int | None = setting(
        None,
        number(0, MAX_SEED, whole=True, words={"random": None}),
        "seed of the sampler; random: a new one each time",
    )
    n_ctx: int | None = setting(
        None, tokens(64, auto=None), "context in tokens; auto: as much as prompt and budgets need"
    )
    yarn: float | None = setting(
        None,
        number(1, 64, words={"off": 1.0, "auto": None}),
        "factor that stretches the window; auto: when prompt and budgets need more than the native window",
    )
    kv_type: str | None = setting(
        None, one_of(*KV_TYPES, auto=True), "type of the KV cache; auto: f16, or what the memory allows"
    )
    flash_attention: bool | None = setting(
        None, switch(auto=True), "flash attention; auto: wherever the device has it"
    )
    n_batch: int = setting(512, number(1, 65_536, whole=True), "prompt tokens that are submitted at once")
    n_ubatch: int = setting(512, number(1, 65_536, whole=True), "prompt tokens that are computed at once")
    prefill_gap: float = setting(
        0.25, number(0.01, 60), "most seconds of a step that reads a prompt beside running replies"
    )
    prefill_chunk: int = setting(
        0, number(0, 65_536, whole=True), "prompt tokens in such a step; 0: as prefill_gap allows"
    )
    threads: int = setting(0, number(0, 1024, whole=True), "CPU threads; 0: the physical cores")
    n_gpu_layers: int | None = setting(
        None,
        number(-1, 10_000, whole=True, words={"auto": None}),
        "layers on the GPU; -1: all; auto: as many as the memory allows",
    )
    memory_reserve: int = setting(
        512, number(0, 1 << 20, whole=True), "MiB of each device that a plan leaves free"
    )
    use_mmap: bool = setting(True, switch(), "map the model file into memory instead of reading it")
    kv_store: float | None = setting(
        None,
        number(0, 1 << 20, words={"off": 0.0, "auto": None}),
        "GiB of disk for the KV cache of earlier prompts; auto: a tenth of the free space",
    )
    kv_store_min_tokens: int = setting(1024, tokens(1), "shortest prompt whose KV cache is kept on disk")

    logprobs: int | None = setting(
        None,
        number(0, 100, whole=True, words={"off": None}),
        "report the log-probability of each token, and of this many likeliest ones; off: none",
    )

    # Budgets and the prompt.
    thinking_budget: int = setting(16_384, tokens(0), "most tokens of thinking")
    answer_reserve: int = setting(4_096, tokens(1), "tokens of the context that stay free for the answer")
    max_tokens: int = setting(0, tokens(0), "most tokens of the answer; 0: as many as the context holds")
    system: str = setting("", free_text(), "system prompt; empty: none")
    question_suffix: str = setting("", free_text(), "text after each question, on its own line")
    loop_guard: bool = setting(True, switch(), "end endless repetition")

    is_window_known: bool = True

    def sampler_settings(self, seed: int) -> SamplerSettings:
        """The sampler of this profile, with the seed that was drawn or given for this run."""
        return SamplerSettings(**{key: getattr(self, key) for key in SAMPLER_KEYS}, seed=seed)


SAMPLER_KEYS = tuple(each.name for each in fields(SamplerKeys))
RULES: Mapping[str, Rule] = {each.name: each.metadata["rule"] for each in fields(Profile) if each.metadata}
MEANINGS: Mapping[str, str] = {
    each.name: each.metadata["meaning"] for each in fields(Profile) if each.metadata
}
RECORDED_KEYS = (
    *SAMPLER_KEYS,
    "thinking_budget",
    "answer_reserve",
    "max_tokens",
    "loop_guard",
    "n_batch",
    "n_ubatch",
    "flash_attention",
    "threads",
)
"""What decides which tokens come, besides the plan: sampler, budgets, and how they are computed."""


def accepted(key: str, value: object, source: str, *, is_text: bool = False) -> object:
    """The value of a key in the field's type, from what TOML holds.

    With `is_text` the value is that of a variable or a flag. Raises ProfileError naming `source` and the key.
    """
    if key not in RULES:
        near = nearest(key, RULES)
        hint = f"Did you mean {near}?" if near else "Keys stand at the top level of the file."
        shown = quoted(key[:EXCERPT_CHARS])
        raise ProfileError(
            f"{source}: there is no key {shown}. {hint} `qwq profiles show chat` lists them all."
        )
    rule = RULES[key]
    try:
        return rule.accept(rule.read(str(value)) if is_text else value)
    except ValueError as error:
        raise ProfileError(f"{source}: {key} is {excerpt(value)}, allowed: {rule.allowed}.") from error


def nearest(name: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `names` that `name` probably means: one that begins with it, or one that is like it."""
    known = list(names)
    starting = [each for each in known if len(name) > 1 and each.startswith(name)]
    return next(iter(starting or get_close_matches(name, known, n=1, cutoff=likeness)), None)


def excerpt(value: object) -> str:
    """The start of a refused value, fit for an error message."""
    if isinstance(value, str):
        return quoted(value[:EXCERPT_CHARS])
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python refuses to spell integers of thousands of digits
        return "a huge number"
    return text[:EXCERPT_CHARS]
