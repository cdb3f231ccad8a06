"""Predicted bytes against llama.cpp's: the dry run against real contexts, the formula against the dry run."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from qwq_convert.architecture import ModelShape
from qwq_convert.architectures.qwen2 import ARCHITECTURE as QWEN2
from qwq_convert.architectures.qwen3 import ARCHITECTURE as QWEN3
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.engine.api import ContextSettings
from qwq_local.engine.dry_run import DryRun, held_bytes
from qwq_local.models.architecture import check_architecture
from qwq_local.models.facts import model_sizes, tensor_kinds
from qwq_local.models.header import read_header
from qwq_local.planning.compute import compute_bytes, described_compute
from qwq_local.planning.memory import Machine, Placement, Target, device_uses
from qwq_local.planning.shape import ContextShape, ModelSizes, can_store, is_quantized
from qwq_local.text import GIB
from tests.checkpoints import CheckpointSpec, write_checkpoint
from tests.command import ROOT
from tests.conftest import load
from tests.single_sequence import SingleSequence

SPECS = {
    "wide heads": CheckpointSpec(n_layers=3, hidden_size=512, intermediate_size=640, n_heads=4, n_kv_heads=2),
    "small heads": CheckpointSpec(
        n_layers=5, hidden_size=128, intermediate_size=704, n_heads=4, n_kv_heads=4
    ),
    "one KV head": CheckpointSpec(
        n_layers=2, hidden_size=320, intermediate_size=320, n_heads=5, n_kv_heads=1
    ),
    "qwen3": CheckpointSpec(
        n_layers=3, hidden_size=128, n_heads=4, n_kv_heads=2, head_dim=64, architecture="qwen3"
    ),
    "tied": CheckpointSpec(n_layers=1, hidden_size=256, n_heads=4, n_kv_heads=2, tied=True, vocab_size=5000),
}
CPU = Machine("test", (), 64 * GIB, 64 * GIB, cores=1)


@pytest.fixture(scope="module", params=SPECS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUFs of one shape in three file types."""
    folder = tmp_path_factory.mktemp("sizes")
    write_checkpoint(folder / "checkpoint", SPECS[request.param])
    out = folder / "model.gguf"
    file_type = {"wide heads": "Q8_0", "small heads": "F32"}.get(request.param, "BF16")
    run_conversion(ConvertRequest(folder / "checkpoint", file_type, out))
    return out


def sizes_of(path: Path) -> tuple[ModelSizes, DryRun]:
    header = read_header(path)
    shape = check_architecture(header)
    sizes = model_sizes(header, shape)
    return sizes, DryRun(sizes.shape, tensor_kinds(header))


def contexts(shape: ModelShape) -> Iterator[ContextShape]:
    """Combinations of everything that a context's size depends on, as llama.cpp accepts them."""
    for n_ctx, n_ubatch, kv_type, flash in itertools.product(
        (256, 1000, 4096), (32, 128, 512), ("f16", "f32", "q8_0", "q4_0"), (False, True)
    ):
        if is_quantized(kv_type) and not (flash and can_store(shape, kv_type)):
            continue
        n_batch = min(512, n_ctx)
        yield ContextShape(n_ctx, n_batch, min(n_ubatch, n_batch), kv_type, kv_type, flash)


def test_a_plan_predicts_real_contexts_to_the_byte(path: Path) -> None:
    """KV cache and compute buffers of every combination, against llama.cpp's real allocations."""
    sizes, dry_run = sizes_of(path)
    target = Target(sizes, CPU, lambda placement: dry_run.compute_bytes(placement) or ())
    counted = 0
    with closing(load(path)) as model, closing(dry_run):
        for shape in contexts(sizes.shape):
            settings = ContextSettings(
                shape.n_ctx,
                shape.n_batch,
                shape.n_ubatch,
                shape.kv_type_k,
                shape.kv_type_v,
                flash_attention=shape.flash_attention,
                threads=1,
            )
            with closing(SingleSequence(model, settings)) as context:
                real = held_bytes(context._handle)
            [planned] = device_uses(target, Placement(shape))
            assert real is not None
            assert planned.kv_cache == sum(part.kv_cache for part in real), shape
            assert planned.compute == sum(part.compute for part in real), shape
            counted += 1
    assert counted >= 24


def test_the_weights_are_the_tensors_of_the_file(path: Path) -> None:
    """Against llama.cpp's own account, which pads every tensor to 32 bytes, and against the file's length."""
    sizes, _ = sizes_of(path)
    n_tensors = len(read_header(path).tensors)
    with closing(load(path)) as model:
        settings = ContextSettings(256, 256, 256, flash_attention=True, threads=1)
        with closing(SingleSequence(model, settings)) as context:
            real = held_bytes(context._handle)
    assert real is not None
    # Mapped from the file, so the gaps between tensors count as well.
    assert 0 <= sum(part.weights for part in real) - sizes.total_bytes < 32 * n_tensors
    assert len(sizes.layer_bytes) == sizes.shape.n_layers
    assert len(set(sizes.layer_bytes)) == 1
    assert (sizes.tied_bytes > 0) == (sizes.shape.n_layers == 1)
    [use] = device_uses(Target(sizes, CPU, lambda _: (0,)), Placement(ContextShape(256)))
    assert use.weights == sizes.total_bytes


def qwen2(
    n_layers: int, hidden: int, intermediate: int, n_heads: int, n_kv_heads: int, n_vocab: int
) -> ModelShape:
    """The shape of a Qwen2 model."""
    head_dim = hidden // n_heads
    return ModelShape(
        QWEN2, n_layers, hidden, intermediate, n_heads, n_kv_heads, head_dim, n_vocab, context_length=32_768
    )


def qwen3(shape: ModelShape, head_dim: int) -> ModelShape:
    """The same dimensions in a Qwen3 model, whose heads have a size of their own."""
    return replace(shape, architecture=QWEN3, head_dim=head_dim)


SHAPES = (
    qwen2(64, 5120, 27648, 40, 8, 152_064),
    qwen2(24, 1024, 2816, 16, 4, 152_064),
    qwen2(28, 3584, 18944, 28, 4, 152_064),
    qwen2(4, 256, 704, 8, 8, 640),
    qwen2(3, 768, 768, 12, 2, 50_000),
    qwen2(1, 512, 1024, 8, 2, 999),
    qwen2(3, 512, 128, 8, 8, 99),  # as many KV heads as heads, so that keys and values are the largest part
    qwen3(qwen2(28, 1024, 3072, 16, 8, 151_936), 128),
    qwen3(qwen2(64, 5120, 25600, 64, 8, 151_936), 128),
    qwen3(qwen2(3, 512, 512, 8, 2, 999), 32),
)


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"{shape.architecture.name} {shape.n_layers}x{shape.hidden}"
)
def test_the_formula_is_never_under_the_dry_run_and_at_most_a_tenth_over(shape: ModelShape) -> None:
    """One is QwQ-32B's shape. Neither the dry run nor the formula needs a file."""
    counted = 0
    with closing(DryRun(shape, {})) as dry_run:
        for n_ctx, n_ubatch, kv_type, flash in itertools.product(
            (512, 4096, 131_072), (16, 512), ("f16", "f32", "q8_0", "q4_0"), (False, True)
        ):
            if is_quantized(kv_type) and not (flash and can_store(shape, kv_type)):
                continue
            n_batch = min(512, n_ctx)
            context = ContextShape(n_ctx, n_batch, min(n_ubatch, n_batch), kv_type, kv_type, flash)
            asked = dry_run.compute_bytes(Placement(context))
            assert asked is not None
            ratio = compute_bytes(shape, context) / asked[0]
            assert 1 <= ratio <= 1.1, (context, asked)
            counted += 1
    assert counted >= 24


def test_most_of_the_formulas_figures_are_exact() -> None:
    """The formula replays the same allocation."""
    shape = SHAPES[0]
    with closing(DryRun(shape, {})) as dry_run:
        for n_ctx, kv_type in itertools.product((2048, 16_384, 32_768, 65_536), ("f16", "q8_0", "q4_0")):
            context = ContextShape(n_ctx, 512, 512, kv_type, kv_type)
            assert dry_run.compute_bytes(Placement(context)) == (compute_bytes(shape, context),)


def test_a_described_processor_gets_the_formula() -> None:
    sizes = ModelSizes(SHAPES[1], (1,) * 24, 1, 1)
    placement = Placement(ContextShape(4096))
    assert described_compute(sizes, CPU)(placement) == (compute_bytes(SHAPES[1], placement.context),)


def test_the_sizes_read_from_a_context_are_those_the_library_logs(miniature: Callable[[str], Path]) -> None:
    """The log is written by the library itself, in MiB with two decimals."""
    path = miniature("Q8_0")
    program = f"""
from pathlib import Path
from qwq_local.engine.library import show_log
show_log()
from qwq_local.engine.api import ContextSettings
from qwq_local.errors import AbortFlag
from qwq_local.engine.dry_run import held_bytes
from tests.single_sequence import SingleSequence
from tests.conftest import load
context = SingleSequence(load(Path({str(path)!r})), ContextSettings(8192, 512, 512, threads=1), AbortFlag())
[held] = held_bytes(context._handle)
print(held.kv_cache, held.compute)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"},
    )
    kv_cache, compute = map(int, ran.stdout.split())
    for what, n_bytes in (("KV", kv_cache), ("compute", compute)):
        logged = re.search(rf"CPU {what} buffer size =\s+([\d.]+) MiB", ran.stderr)
        assert logged is not None, ran.stderr
        assert abs(float(logged[1]) - n_bytes / 2**20) <= 0.0051
