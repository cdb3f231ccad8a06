"""YaRN, written here from the paper, against llama.cpp's logits for our GGUF.

The reference is a Qwen2 decoder in float64 numpy, its rotation from arXiv 2309.00071 (section 3.2, "NTK by
parts", and the attention factor of section 3.4). The weights are F32, queries and keys large, so that
attention is sharp and a wrong angle shows. The same comparison must fail for any other rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.backend.planner import model_window
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel
from qwq_local.errors import PromptTooLong
from qwq_local.models.facts import own_rope_scaling
from qwq_local.models.header import read_header
from qwq_local.planning.window import Needs, RopeScaling, Scaling, share_window
from qwq_local.profiles.keys import Profile
from tests.checkpoints import (
    CheckpointSpec,
    config,
    store,
    weights,
    write_checkpoint,
    write_json,
    write_safetensors,
)
from tests.conftest import load
from tests.single_sequence import SingleSequence

Array = NDArray[np.float64]
ORIGIN = 64  # the native window of this little model
N_TOKENS = 200  # three times that
SHARPNESS = 6.0
SPEC = CheckpointSpec(
    n_layers=2, hidden_size=128, intermediate_size=96, n_heads=2, n_kv_heads=1, vocab_size=320, dtype="F32"
)
TOLERANCE = 1e-5
SHOWS = 1e-2


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles per position of each pair of a head's values, and what the result is multiplied by."""

    frequencies: Array
    attention: float = 1.0


def yarn(factor: float, origin: int = ORIGIN, *, attention: bool = True) -> Rotation:
    """Section 3.2: pairs that turn more than 32 times over the native window stay, those that turn less than
    once are interpolated, those between are mixed by a ramp; section 3.4: attention is sharpened."""
    base, dim = 1_000_000.0, SPEC.hidden_size // SPEC.n_heads
    plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(origin / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(pair_that_turns(32)))
    high = min(dim - 1, math.ceil(pair_that_turns(1)))
    ramp = np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
    mixed = plain / factor * ramp + plain * (1 - ramp)
    return Rotation(mixed, 0.1 * math.log(factor) + 1 if attention else 1.0)


def unscaled() -> Rotation:
    return yarn(1.0)


def linear(factor: float) -> Rotation:
    return Rotation(unscaled().frequencies / factor)


def reference(stored: dict[str, Array], tokens: list[int], rotation: Rotation) -> Array:
    """The logits after the last token, in float64."""
    hidden = stored["model.embed_tokens.weight"][tokens]
    for layer in range(SPEC.n_layers):
        block = {k.partition(f"layers.{layer}.")[2]: v for k, v in stored.items() if f"layers.{layer}." in k}
        normed = norm(hidden, block["input_layernorm.weight"])
        hidden = hidden + attended(normed, block, rotation)
        normed = norm(hidden, block["post_attention_layernorm.weight"])
        gate = normed @ block["mlp.gate_proj.weight"].T
        up = normed @ block["mlp.up_proj.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ block["mlp.down_proj.weight"].T
    result: Array = norm(hidden[-1], stored["model.norm.weight"]) @ stored["lm_head.weight"].T
    return result


def norm(values: Array, weight: Array) -> Array:
    result: Array = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5) * weight
    return result


def attended(normed: Array, block: dict[str, Array], rotation: Rotation) -> Array:
    dim = SPEC.hidden_size // SPEC.n_heads
    heads = {}
    for name, count in (("q", SPEC.n_heads), ("k", SPEC.n_kv_heads), ("v", SPEC.n_kv_heads)):
        projected = normed @ block[f"self_attn.{name}_proj.weight"].T + block[f"self_attn.{name}_proj.bias"]
        heads[name] = projected.reshape(len(normed), count, dim).transpose(1, 0, 2)
    query, key = rotated(heads["q"], rotation), rotated(heads["k"], rotation)
    repeat = SPEC.n_heads // SPEC.n_kv_heads
    key, value = key.repeat(repeat, 0), heads["v"].repeat(repeat, 0)
    scores = query @ key.transpose(0, 2, 1) / math.sqrt(dim)
    scores += np.triu(np.full((len(normed), len(normed)), -np.inf), 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (shares / shares.sum(-1, keepdims=True)) @ value
    joined: Array = mixed.transpose(1, 0, 2).reshape(len(normed), -1) @ block["self_attn.o_proj.weight"].T
    return joined


def rotated(values: Array, rotation: Rotation) -> Array:
    """Qwen2 turns the first half of a head against the second."""
    angles = np.arange(values.shape[1])[:, None] * rotation.frequencies[None]
    cos, sin = np.cos(angles) * rotation.attention, np.sin(angles) * rotation.attention
    first, second = np.split(values, 2, axis=-1)
    result: Array = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return result


@pytest.fixture(scope="module")
def stored() -> dict[str, Array]:
    """Small weights, so that float32 is exact enough, and large queries and keys for sharp attention."""
    made = {}
    for name, values in weights(SPEC).items():
        scale = 0.1 if name.endswith("proj.weight") else 1.0
        if "q_proj.weight" in name or "k_proj.weight" in name:
            scale = 0.1 * SHARPNESS**0.5
        if name == "lm_head.weight":
            scale = 0.25
        if name.endswith("norm.weight"):
            made[name] = np.ones_like(values)
            continue
        made[name] = (values * scale).astype(np.float32)
    return {name: values.astype(np.float64) for name, values in made.items()}


@pytest.fixture(scope="module")
def model(stored: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """The weights converted to F32 by our converter and loaded by llama.cpp."""
    made = load(gguf(stored, tmp_path_factory.mktemp("yarn")))
    yield made
    made.close()


def gguf(stored: dict[str, Array], folder: Path, **changes: object) -> Path:
    checkpoint = write_checkpoint(folder / "checkpoint", SPEC)
    write_json(checkpoint / "config.json", config(SPEC) | changes)
    tensors = {name: store(values.astype(np.float32), "F32") for name, values in stored.items()}
    write_safetensors(checkpoint / "model.safetensors", tensors)
    out = folder / "sharp.gguf"
    run_conversion(ConvertRequest(checkpoint, "F32", out))
    return out


TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 250, N_TOKENS)]
EXACT = ContextSettings(
    n_ctx=256, n_batch=256, n_ubatch=256, kv_type_k="f32", kv_type_v="f32", flash_attention=False, threads=1
)


def logits(model: LoadedModel, factor: float) -> Array:
    """llama.cpp's logits after the last token, through our engine's own settings."""
    settings = replace(EXACT, yarn_factor=factor, yarn_origin=ORIGIN)
    with closing(SingleSequence(model, settings)) as context:
        list(context.prefill(TOKENS))
        pointer = library().llama_get_logits_ith(context._handle, -1)
        return np.ctypeslib.as_array(pointer, (SPEC.vocab_size,)).astype(np.float64)


def difference(theirs: Array, ours: Array) -> float:
    return float(np.abs(theirs - ours).max())


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_logits_are_those_of_the_paper(model: LoadedModel, stored: dict[str, Array], factor: float) -> None:
    assert difference(logits(model, factor), reference(stored, TOKENS, yarn(factor))) <= TOLERANCE


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda factor: unscaled(), id="YaRN off"),
        pytest.param(linear, id="linear scaling"),
        pytest.param(lambda factor: yarn(factor, 4096), id="context_length as origin"),
        pytest.param(lambda factor: yarn(factor, 2 * ORIGIN), id="twice the origin"),
        pytest.param(lambda factor: yarn(factor, attention=False), id="no attention factor"),
        pytest.param(lambda factor: yarn(factor * 2), id="scaled twice"),
    ],
)
def test_any_other_rotation_fails_the_same_comparison(
    model: LoadedModel, stored: dict[str, Array], factor: float, wrong: Callable[[float], Rotation]
) -> None:
    """By a hundredth and more, a thousand times the tolerance: the checkpoint shows wrong rotations."""
    assert difference(logits(model, factor), reference(stored, TOKENS, wrong(factor))) >= SHOWS


SCALED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGIN, "attention_factor": 1.3}


def test_a_file_with_scaling_keys_runs_unscaled_while_it_fits_and_by_its_own_factor_beyond(
    stored: dict[str, Array], tmp_path: Path
) -> None:
    """It is never scaled twice, and its attention factor multiplies only the scaled run."""
    path = gguf(stored, tmp_path, rope_scaling=SCALED)
    own = own_rope_scaling(read_header(path))
    assert own == RopeScaling(4.0, ORIGIN, Scaling.YARN)
    window = model_window(Profile(native_window=32_768, yarn_factors=(1.0, 2.0)), own)
    assert [window.scaling(window.factor_for(n)) for n in (1, ORIGIN)] == [RopeScaling()] * 2
    assert [window.scaling(window.factor_for(n)) for n in (ORIGIN + 1, 4 * ORIGIN)] == [own] * 2
    assert window.largest == 4 * ORIGIN
    with pytest.raises(PromptTooLong):
        share_window(Needs(4 * ORIGIN, 0, 1), window)
    with closing(load(path)) as model:
        assert difference(logits(model, 1.0), reference(stored, TOKENS, unscaled())) <= TOLERANCE
        assert difference(logits(model, 4.0), reference(stored, TOKENS, yarn(4.0))) <= TOLERANCE


def sized(text: bytes) -> bytes:
    """A string in GGUF: its length, then its bytes."""
    return len(text).to_bytes(8, "little") + text


def test_a_files_attention_factor_is_undone_without_scaling(stored: dict[str, Array], tmp_path: Path) -> None:
    """llama.cpp applies this key with any scaling. Ours never writes it, so another key is renamed to it."""
    path = gguf(stored, tmp_path, rope_scaling=SCALED)
    raw = path.read_bytes()
    written, read = b"qwen2.rope.scaling.yarn_attn_factor", b"qwen2.rope.scaling.attn_factor"
    name = str(read_header(path).scalar("general.name")).encode()
    assert raw.count(sized(written)) == raw.count(sized(name)) == 1
    # The name compensates the length, so that no tensor moves.
    longer = name + b" " * (len(written) - len(read))
    path.write_bytes(raw.replace(sized(written), sized(read)).replace(sized(name), sized(longer)))
    with closing(load(path)) as model:
        assert difference(logits(model, 1.0), reference(stored, TOKENS, unscaled())) <= TOLERANCE


def test_a_file_without_scaling_keys_has_the_window_of_its_profile(
    stored: dict[str, Array], tmp_path: Path
) -> None:
    """Whatever its context_length says, which the converter wrote as 4,096."""
    header = read_header(gguf(stored, tmp_path))
    assert header.integer("qwen2.context_length") == 4096
    profile = Profile(native_window=ORIGIN, yarn_origin=ORIGIN, yarn_factors=(1.0, 2.0, 4.0))
    window = model_window(profile, own_rope_scaling(header))
    assert share_window(Needs(2 * ORIGIN, 0, 1), window).rope == RopeScaling(4.0, ORIGIN)
