"""An architecture is one file: Qwen3 from checkpoint to logits, and the example of docs/extending.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import qwq_convert.architectures as package
from numpy.typing import NDArray
from qwq_convert.architectures import architectures
from qwq_convert.gguf_file import read_header as read_gguf_header
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.engine.dry_run import DryRun
from qwq_local.models.architecture import check_architecture, check_completeness
from qwq_local.models.facts import model_sizes, tensor_kinds
from qwq_local.models.header import read_header
from qwq_local.planning.compute import compute_bytes
from qwq_local.planning.memory import Placement
from qwq_local.planning.shape import ContextShape
from tests.checkpoints import (
    CheckpointSpec,
    config,
    store,
    weights,
    write_checkpoint,
    write_json,
    write_safetensors,
)
from tests.command import ROOT, environment, qwq

QWEN3 = CheckpointSpec(hidden_size=64, n_heads=4, n_kv_heads=2, head_dim=32, architecture="qwen3")
LIMITS = {"thinking_budget": 16, "answer_reserve": 32, "max_tokens": 4}
# The example's names for tensors that Qwen3 names differently.
EXAMPLE_NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.norm.": "transformer.ln_f.",
    "model.layers.": "transformer.h.",
    "self_attn.": "attn.",
    "input_layernorm.": "ln_1.",
    "post_attention_layernorm.": "ln_2.",
}


def test_every_module_of_the_folder_is_an_architecture() -> None:
    """A new architecture is a new file: nothing else lists them."""
    modules = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    assert {architecture.name for architecture in architectures()} == modules == {"qwen2", "qwen3"}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def qwen3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 whose heads together are wider than the model."""
    folder = tmp_path_factory.mktemp("qwen3")
    source = write_checkpoint(folder / "Qwen3-tiny", replace(QWEN3, tied=request.param))
    return run_conversion(ConvertRequest(source, "BF16", folder / "model.gguf"))


def test_qwen3_has_the_keys_that_llama_cpps_converter_writes_in_its_order(qwen3: Path) -> None:
    """conversion/base.py, TextModel.set_gguf_parameters; key and value length come last."""
    header = read_gguf_header(qwen3)
    figures = {
        key.removeprefix("qwen3."): header.value(key) for key in header.keys if key.startswith("qwen3.")
    }
    eps, base = figures.pop("attention.layer_norm_rms_epsilon"), figures.pop("rope.freq_base")
    assert (round(float(str(eps)), 9), base) == (1e-5, 1e6)
    assert list(figures.items()) == [
        ("block_count", 2),
        ("context_length", 4096),
        ("embedding_length", 64),
        ("feed_forward_length", 96),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 32),
        ("attention.value_length", 32),
    ]
    assert header.value("tokenizer.ggml.pre") == "qwen2"


def test_qwen3_passes_the_header_check_and_is_planned_as_llama_cpp_allocates(qwen3: Path) -> None:
    header = read_header(qwen3)
    shape = check_completeness(header)
    assert (shape.architecture.name, shape.q_width, shape.kv_width) == ("qwen3", 128, 64)
    assert model_sizes(header, shape).total_bytes == sum(t.n_bytes for t in header.tensors.values())
    context = ContextShape(n_ctx=512)
    with closing(DryRun(shape, tensor_kinds(header))) as dry_run:
        asked = dry_run.compute_bytes(Placement(context))
    assert asked is not None
    assert 1 <= compute_bytes(shape, context) / asked[-1] <= 1.1


def test_qwen3_logits_in_llama_cpp_equal_those_of_its_definition(tmp_path: Path) -> None:
    """Keys and values are cached in 16 bits, so the numbers differ by about a thousandth."""
    spec = replace(QWEN3, dtype="F32")
    source = write_checkpoint(tmp_path / "Qwen3-tiny", spec)
    gguf = run_conversion(ConvertRequest(source, "F32", tmp_path / "model.gguf"))
    model = llama_cpp.Llama(str(gguf), n_ctx=256, logits_all=True, verbose=False)
    try:
        tokens = model.tokenize(b"the end and the thing", add_bos=False)
        model.eval(tokens)
        found = np.array(model.scores[: len(tokens)])
    finally:
        model.close()
    expected = qwen3_logits(spec, tokens)
    assert len(tokens) > 5
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


def qwen3_logits(spec: CheckpointSpec, tokens: list[int]) -> NDArray[np.float32]:
    """Logits of a Qwen3 model after each token, as transformers' modeling_qwen3.py defines them."""
    tensors, head = weights(spec), spec.head_dim or 0

    def normed(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    angles = np.arange(len(tokens))[:, None] * 1e6 ** (-np.arange(0, head, 2) / head)

    def rotated(x: Any) -> Any:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = tensors["model.embed_tokens.weight"][tokens].astype(np.float64)
    hidden_from = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(spec.n_layers):
        prefix = f"model.layers.{layer}"
        w = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items()}
        entered = normed(x, w["input_layernorm.weight"])
        q, k, v = (
            (entered @ w[f"self_attn.{each}_proj.weight"].T).reshape(len(tokens), -1, head) for each in "qkv"
        )
        q = rotated(normed(q, w["self_attn.q_norm.weight"]))
        k = rotated(normed(k, w["self_attn.k_norm.weight"]))
        k, v = (np.repeat(each, spec.n_heads // spec.n_kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head) + hidden_from
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", shares, v).reshape(len(tokens), -1)
        x = x + mixed @ w["self_attn.o_proj.weight"].T
        entered = normed(x, w["post_attention_layernorm.weight"])
        gate = entered @ w["mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (entered @ w["mlp.up_proj.weight"].T)
        x = x + inner @ w["mlp.down_proj.weight"].T
    logits: NDArray[np.float32] = normed(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T
    return logits


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the converter with only the architecture that docs/extending.md adds."""
    folder = tmp_path_factory.mktemp("extended")
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = text.partition("## An architecture\n")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shutil.copytree(ROOT / "convert", folder / "convert", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("qwq_local", "profiles", "miniature", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "convert" / "qwq_convert" / "architectures" / "example.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def example(extended: Path) -> Path:
    """A checkpoint of the example architecture."""
    source = extended / "Example-tiny"
    write_checkpoint(source, QWEN3)
    write_json(source / "config.json", config(QWEN3) | {"architectures": ["ExampleForCausalLM"]})
    renamed = {}
    for name, values in weights(QWEN3).items():
        for old, new in EXAMPLE_NAMES.items():
            name = name.replace(old, new)
        renamed[name] = store(values, QWEN3.dtype)
    write_safetensors(source / "model.safetensors", renamed)
    return source


def test_an_architecture_is_added_in_one_file_as_the_documentation_says(
    extended: Path, example: Path
) -> None:
    def run(*arguments: str, status: int = 0) -> str:
        paths = os.pathsep.join([str(extended), str(extended / "convert")])
        result = subprocess.run(
            [sys.executable, "-m", "qwq_local", *arguments],
            env=environment(extended / "cache", PYTHONPATH=paths),
            cwd=extended,
            capture_output=True,
            text=True,
        )
        assert result.returncode in (0, status), result.stderr
        return result.stdout + result.stderr

    out = str(extended / "example.gguf")
    assert "whole and checked" in run("convert", str(example), "Q4_0", "-o", out)
    header = read_gguf_header(Path(out))
    assert header.value("general.architecture") == "maincoder"
    assert header.value("maincoder.attention.key_length") == 32
    assert "sound" in run("verify", out, str(example))
    run("models", "add", out)
    assert re.search(r"architecture +maincoder", run("models", "show", "example"))
    plan = json.loads(run("plan", out, "--json").splitlines()[0])
    assert plan["error"] is None
    limits = [f"{key}={value}" for key, value in LIMITS.items()]
    answer = run(
        "ask", "--model", out, *(part for each in limits for part in ("--set", each)), "hi", status=6
    )
    assert "refuses" not in answer


def test_without_its_file_the_example_is_refused_by_name(example: Path, tmp_path: Path) -> None:
    ran = qwq(tmp_path, "convert", str(example), "Q8_0", "-o", str(tmp_path / "out.gguf"))
    assert ran.status == 1
    assert "architecture 'ExampleForCausalLM' is not supported, only Qwen2ForCausalLM, Qwen3" in ran.stderr


def test_heads_of_another_size_than_stated_are_refused(qwen3: Path, tmp_path: Path) -> None:
    """The header states a key length that the tensors do not have."""
    content = qwen3.read_bytes()
    key = b"qwen3.attention.key_length\x04\x00\x00\x00"
    at = content.index(key) + len(key)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[:at] + (16).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(Exception, match=r"qwen3\.attention\.value_length is 32, the heads have 16 values"):
        check_architecture(read_header(damaged))
