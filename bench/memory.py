"""Memory: the plan against llama.cpp's real allocations, and the formula against the dry run.

    python bench/memory.py [--part real|formula|gpu]

`real` makes every context and asks the library for its bytes; `formula` asks the dry run for shapes up to
QwQ-32B's, for which no file is needed; `gpu` runs where there is one: a GGUF of QwQ-32B's shape at Q4_K_M,
its weights zeros in a sparse file, at 8k, 16k and 31k tokens against the driver's own figure.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from compare import machine
from decode import THREADS, load, read
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType
from make_model import WORK, bench_model
from qwq_convert.architecture import ModelShape
from qwq_convert.architectures.qwen2 import ARCHITECTURE as QWEN2
from qwq_convert.quant_types import TensorPlace, more_bits

from qwq_local.backend.planner import Planner
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.devices import offload_devices
from qwq_local.engine.dry_run import DryRun, held_bytes
from qwq_local.models.architecture import QWQ_32B, check_architecture
from qwq_local.models.facts import model_sizes, tensor_kinds
from qwq_local.models.header import read_header
from qwq_local.models.store import converted_miniature
from qwq_local.planning.compute import compute_bytes
from qwq_local.planning.memory import Machine, Placement, Target, device_uses
from qwq_local.planning.shape import ContextShape, can_store, is_quantized
from qwq_local.profiles.keys import Profile
from qwq_local.text import MIB


def qwen2(
    n_layers: int, hidden: int, intermediate: int, n_heads: int, n_kv_heads: int, n_vocab: int
) -> ModelShape:
    """The shape of a Qwen2 model."""
    head_dim = hidden // n_heads
    return ModelShape(
        QWEN2, n_layers, hidden, intermediate, n_heads, n_kv_heads, head_dim, n_vocab, context_length=32_768
    )


SHAPES = (
    QWQ_32B,
    qwen2(28, 3584, 18944, 28, 4, 152_064),
    qwen2(24, 1024, 2816, 16, 4, 152_064),
    qwen2(4, 256, 704, 8, 8, 640),
)
CONTEXTS, UBATCHES, KV_TYPES = (512, 4096, 32_768, 131_072), (64, 512), ("f16", "q8_0", "q4_0")
GPU_CONTEXTS = (8192, 16_384, 31_744)


def combinations(shape: ModelShape, contexts: tuple[int, ...]) -> Iterator[ContextShape]:
    """Context, batch, KV type and flash attention, as far as llama.cpp accepts them together."""
    for n_ctx, n_ubatch, kv_type, flash in itertools.product(contexts, UBATCHES, KV_TYPES, (False, True)):
        if is_quantized(kv_type) and not (flash and can_store(shape, kv_type)):
            continue
        n_batch = min(512, n_ctx)
        yield ContextShape(n_ctx, n_batch, min(n_ubatch, n_batch), kv_type, kv_type, flash)


def compare_with_real(path: Path) -> None:
    """Print the largest difference between planned and real bytes over all combinations."""
    header = read_header(path)
    sizes = model_sizes(header, check_architecture(header))
    nowhere = Machine("bench", (), 1 << 40, 1 << 40, cores=1)
    worst, count = 0, 0
    with closing(DryRun(sizes.shape, tensor_kinds(header))) as dry_run, closing(load(path)) as model:
        demand = Target(sizes, nowhere, lambda placement: dry_run.compute_bytes(placement) or (0,))
        for shape in combinations(sizes.shape, CONTEXTS[:3]):
            settings = ContextSettings(
                shape.n_ctx,
                shape.n_batch,
                shape.n_ubatch,
                shape.kv_type_k,
                shape.kv_type_v,
                flash_attention=shape.flash_attention,
                threads=THREADS,
            )
            with closing(LlamaContext(model, settings)) as context:
                real = held_bytes(context.handle) or ()
            [planned] = device_uses(demand, Placement(shape))
            both = planned.kv_cache + planned.compute
            worst = max(worst, abs(both - sum(part.kv_cache + part.compute for part in real)))
            count += 1
    print(f"{path.name}: planned / real, {count} combinations, largest difference {worst} bytes", flush=True)


def compare_formula(shape: ModelShape) -> None:
    """Print the smallest and the largest ratio of the formula to the dry run."""
    ratios = []
    with closing(DryRun(shape, {})) as dry_run:
        for context in combinations(shape, CONTEXTS):
            asked = dry_run.compute_bytes(Placement(context))
            if asked is not None:
                ratios.append(compute_bytes(shape, context) / asked[0])
    print(
        f"{shape.n_layers} layers of {shape.hidden}: formula / dry run, {len(ratios)} combinations, "
        f"{min(ratios):.3f} to {max(ratios):.3f} (1 to 1.1), {ratios.count(1.0)} exact",
        flush=True,
    )


def compare_with_driver() -> None:
    """Print planned against used bytes of the first GPU, by its driver's count of free memory."""
    if not offload_devices():
        print("no GPU here: the figures for GPUs stay unverified", flush=True)
        return
    path = WORK / "qwq-shape-Q4_K_M.gguf"
    write_qwq_shape(path)
    for n_ctx in GPU_CONTEXTS:
        profile = Profile(
            native_window=32_768, yarn_origin=32_768, n_ctx=n_ctx, thinking_budget=1024, answer_reserve=256
        )
        with closing(Planner(path, profile)) as planner:
            plan = planner.plan(100)
        before = offload_devices()[0].free_bytes
        model = load(path)
        context = plan.placement.context
        settings = ContextSettings(
            n_ctx, context.n_batch, context.n_ubatch, plan.kv_type, plan.kv_type, flash_attention=True
        )
        with closing(model), closing(LlamaContext(model, settings)) as made:
            read(made, [100 + i % 5000 for i in range(2048)])
            taken = before - offload_devices()[0].free_bytes
        planned = plan.uses[0].total
        print(
            f"{n_ctx:,} tokens, {plan.kv_type} KV, {plan.n_gpu_layers} layers: "
            f"planned {planned / MIB:.0f} MiB, taken {taken / MIB:.0f} MiB, ratio {planned / taken:.4f}",
            flush=True,
        )


def write_qwq_shape(path: Path) -> None:
    """A GGUF of QwQ-32B's shape and Q4_K_M's tensor types: the header is whole, the weights are a hole."""
    if path.is_file():
        return
    shape = replace(QWQ_32B, context_length=32_768)
    writer = GGUFWriter(path, "qwen2")
    _copy_vocabulary(bench_model("wide"), writer)
    for key, value in shape.figures().items():
        writer.add_uint32(shape.architecture.key(key), value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_file_type(15)
    total = 0
    for tensor in shape.tensors():
        if tensor.name == "output.bias":
            continue
        name, dimensions = tensor.name, tensor.shape
        kind = tensor_kind(name, shape.n_layers)
        values, block = GGML_QUANT_SIZES[kind]
        rows = dimensions[0] if len(dimensions) > 1 else 1
        n_bytes = rows * dimensions[-1] // values * block
        stored = (*dimensions[:-1], dimensions[-1] // values * block)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=kind)
        total += -(-n_bytes // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        file.truncate(-(-end // writer.data_alignment) * writer.data_alignment + total)


def tensor_kind(name: str, n_layers: int) -> GGMLQuantizationType:
    """The type that llama-quantize gives a tensor for Q4_K_M."""
    kinds = GGMLQuantizationType
    if name.endswith(("norm.weight", ".bias")):
        return kinds.F32
    if name == "output.weight":
        return kinds.Q6_K
    raised = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\.", name)
    return (
        kinds.Q6_K
        if raised and more_bits(TensorPlace(int(raised[1]), n_layers, n_gqa=1, has_imatrix=False))
        else kinds.Q4_K
    )


def _copy_vocabulary(source: Path, writer: GGUFWriter) -> None:
    for field in GGUFReader(source).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        part = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=part)


def main() -> None:
    """Run the chosen parts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=("real", "formula", "gpu"), action="append")
    parts = parser.parse_args().part or ["real", "formula", "gpu"]
    print(machine(), flush=True)
    if "real" in parts:
        compare_with_real(converted_miniature(WORK, "Q8_0"))
        compare_with_real(bench_model("wide"))
    if "formula" in parts:
        for shape in SHAPES:
            compare_formula(shape)
    if "gpu" in parts:
        compare_with_driver()


if __name__ == "__main__":
    main()
