"""What a profile may say: its keys, the type and range of each, and the value that comes of them.

`Profile` is the result, one field per key; `RULES` holds what each key accepts. Values come in from TOML
(`accepted`) or as the text of a flag or an environment variable (`accepted_text`). Knows no layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from qwq_local.engine.api import DEFAULT_ORDER, SamplerSettings
from qwq_local.errors import ProfileError
from qwq_local.planning.shape import KV_TYPES
from qwq_local.profiles.rules import Choice, Files, Number, Rule, Several, Switch, Text, quoted

MAX_TOKENS = 1 << 20  # no window is near it; keeps a slip of the finger out of the memory plan
MAX_SEED = 0xFFFFFFFE  # llama.cpp reads 0xFFFFFFFF as "draw one"
EXCERPT_CHARS = 60


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything that can be set about a run; each field but the first is a key of the same name.

    Windows and budgets are in tokens. None means: let the program choose.
    """

    is_window_known: bool = True  # False: the window is QwQ-32B's because nobody told that of this model

    description: str = ""

    # The model: where its files are, what window it was trained with.
    repo: str = ""  # owner/name on the hub
    files: Mapping[str, str] = field(default_factory=dict)  # quantization type -> file name in the repo
    native_window: int = 32_768
    yarn_origin: int = 32_768  # the window that YaRN scales from
    yarn_factors: tuple[float, ...] = (1.0,)  # factors the model was tried with
    max_thinking_budget: int = 0  # what a task may ask for at most; 0: anything
    max_answer_reserve: int = 0

    # Sampling: see engine.api.SamplerSettings.
    temperature: float = 0.6
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    typical: float = 1.0
    penalty_window: int = 64
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = -1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    sampler_order: tuple[str, ...] = DEFAULT_ORDER  # a step that is not named is left out
    seed: int | None = None  # None: a new one every run

    # The context: see engine.api.ContextSettings.
    n_ctx: int | None = None  # None: as large as prompt and budgets need
    yarn: float | None = None  # 1: off; None: on when prompt and budgets need more than the native window
    kv_type: str | None = None  # of both K and V; None: f16, or what the memory allows
    flash_attention: bool | None = None  # None: wherever the device has it
    n_batch: int = 512
    n_ubatch: int = 512
    threads: int = 0  # 0: the physical cores
    n_gpu_layers: int | None = None  # -1: all; None: as many as the memory allows
    memory_reserve: int = 512  # MiB of every device that a plan leaves free
    use_mmap: bool = True
    kv_store: float | None = None  # GiB of disk for what was prefilled; None: a tenth of what is free; 0: off
    kv_store_min_tokens: int = 1024  # what is worth storing

    # Budgets and the prompt.
    thinking_budget: int = 16_384
    answer_reserve: int = 4_096  # window kept free for the answer while it thinks
    max_tokens: int = 0  # of the answer; 0: no limit but the window
    system: str = ""  # "": no system turn
    question_suffix: str = ""  # put after the question, on a line of its own
    loop_guard: bool = True

    def sampler_settings(self, seed: int) -> SamplerSettings:
        """The sampler chain of this profile, with the seed that was drawn or given for this run."""
        return SamplerSettings(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical=self.typical,
            penalty_window=self.penalty_window,
            repeat_penalty=self.repeat_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            dry_multiplier=self.dry_multiplier,
            dry_base=self.dry_base,
            dry_allowed_length=self.dry_allowed_length,
            dry_window=self.dry_window,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            order=self.sampler_order,
            seed=seed,
        )


def _tokens(low: int, **words: float | None) -> Number:
    return Number(low, MAX_TOKENS, whole=True, words=words)


_SHARE = Number(0, 1)
_SHARE_ABOVE_0 = Number(0, 1, above_low=True)

RULES: Mapping[str, Rule] = {
    "description": Text(),
    "repo": Text(r"[\w.-]+/[\w.-]+", "owner/name of a repository on the hub"),
    "files": Files(),
    "native_window": _tokens(64),
    "yarn_origin": _tokens(64),
    "yarn_factors": Several(Number(1, 64)),
    "max_thinking_budget": _tokens(0),
    "max_answer_reserve": _tokens(0),
    "temperature": Number(0, 5),
    "top_k": Number(0, 1_000_000, whole=True),
    "top_p": _SHARE_ABOVE_0,
    "min_p": _SHARE,
    "typical": _SHARE_ABOVE_0,
    "penalty_window": _tokens(-1),
    "repeat_penalty": Number(0, 10, above_low=True),
    "frequency_penalty": Number(-2, 2),
    "presence_penalty": Number(-2, 2),
    "dry_multiplier": Number(0, 10),
    "dry_base": Number(1, 10),
    "dry_allowed_length": _tokens(1),
    "dry_window": _tokens(-1),
    "xtc_probability": _SHARE,
    "xtc_threshold": _SHARE,
    "sampler_order": Several(Choice(DEFAULT_ORDER)),
    "seed": Number(0, MAX_SEED, whole=True, words={"random": None}),
    "n_ctx": _tokens(64, auto=None),
    "yarn": Number(1, 64, words={"off": 1.0, "auto": None}),
    "kv_type": Choice(tuple(KV_TYPES), auto=True),
    "flash_attention": Switch(auto=True),
    "n_batch": Number(1, 65_536, whole=True),
    "n_ubatch": Number(1, 65_536, whole=True),
    "threads": Number(0, 1024, whole=True),
    "n_gpu_layers": Number(-1, 10_000, whole=True, words={"auto": None}),
    "memory_reserve": Number(0, 1 << 20, whole=True),
    "use_mmap": Switch(),
    "kv_store": Number(0, 1 << 20, words={"off": 0.0, "auto": None}),
    "kv_store_min_tokens": _tokens(1),
    "thinking_budget": _tokens(0),
    "answer_reserve": _tokens(1),
    "max_tokens": _tokens(0),
    "system": Text(),
    "question_suffix": Text(),
    "loop_guard": Switch(),
}

_SAMPLER_KEYS = tuple(each.name for each in fields(SamplerSettings) if each.name not in ("seed", "order"))
RECORDED_KEYS = (
    *_SAMPLER_KEYS,
    "sampler_order",
    *("thinking_budget", "answer_reserve", "max_tokens", "loop_guard"),
    *("n_batch", "n_ubatch", "flash_attention", "threads"),
)
"""What decides which tokens come, besides the plan: the sampler, the budgets, how it is computed."""


def accepted(key: str, value: object, source: str) -> object:
    """What TOML holds under `key`, in the field's type. Raises ProfileError naming `source` and the key."""
    rule = _rule(key, source)
    try:
        return rule.accept(value)
    except ValueError as error:
        raise _refused(key, value, source) from error


def accepted_text(key: str, text: str, source: str) -> object:
    """The same for a value written as text, in an environment variable or a flag."""
    rule = _rule(key, source)
    try:
        return rule.accept(rule.read(text))
    except ValueError as error:
        raise _refused(key, text, source) from error


def nearest(name: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `names` that `name` was probably meant to be: one that begins so, or one that is like it."""
    from difflib import get_close_matches

    known = list(names)
    starting = [each for each in known if len(name) > 1 and each.startswith(name)]
    return next(iter(starting or get_close_matches(name, known, n=1, cutoff=likeness)), None)


def _rule(key: str, source: str) -> Rule:
    if key in RULES:
        return RULES[key]
    near = nearest(key, RULES)
    hint = f"Did you mean {near}?" if near else "Keys stand at the top level of the file."
    shown = quoted(key[:EXCERPT_CHARS])
    raise ProfileError(f"{source}: there is no key {shown}. {hint} `qwq profiles show chat` lists them all.")


def _refused(key: str, value: object, source: str) -> ProfileError:
    return ProfileError(f"{source}: {key} is {excerpt(value)}, allowed: {RULES[key].allowed}.")


def excerpt(value: object) -> str:
    """The start of a refused value, fit for an error message."""
    if isinstance(value, str):
        return quoted(value[:EXCERPT_CHARS])
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python refuses to spell integers of thousands of digits
        return "a huge number"
    return text[:EXCERPT_CHARS]
