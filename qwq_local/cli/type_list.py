"""What `qwq convert --types` prints: every file type, its size for a source, and whether that fits here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwq_convert.key_values import KeyValues
from qwq_convert.plan import TypeSize, describe, open_source, sizes

from qwq_local.cli.environment import Environment
from qwq_local.cli.fitting import measured_fit
from qwq_local.models.architecture import Shape
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.text import binary_size


def type_lines(environment: Environment, source: Path) -> Iterator[str]:
    """The table for the source, and what its column about fitting means. Raises ConvertError."""
    with open_source(source) as opened:
        model = describe(opened)
    profile = resolve(DEFAULT_MODEL, None, profile_folders(directories(environment.variables)), {}).profile
    fit, shape = measured_fit(profile), shape_of(model.key_values)
    yield from type_table(sizes(model), lambda n_bytes: fit.context(n_bytes, shape))
    place = f"{fit.memory.place} with {binary_size(fit.memory.free_bytes, 2)} free"
    yield f"FITS: tokens of context beside the weights in {place}, {fit.kv_type} KV cache."


def type_table(rows: Sequence[TypeSize], context_beside: Callable[[int], int]) -> Iterator[str]:
    """Every file type as aligned lines: bits per weight, size, context beside so many bytes, imatrix."""
    yield f"{'TYPE':<8} {'BITS':>6} {'SIZE':>15} {'FITS':>8}  IMATRIX"
    for row in rows:
        if row.n_bytes is None:
            yield f"{row.name:<8} {'-':>6} {'-':>15} {'-':>8}  not for this model's shapes"
            continue
        context = context_beside(row.n_bytes)
        figures = f"{row.bits_per_weight:6.2f} {binary_size(row.n_bytes, 2):>15}"
        fits = f"{context:,}" if context else "no"
        yield f"{row.name:<8} {figures} {fits:>8}  {'needed' if row.needs_imatrix else ''}".rstrip()


def shape_of(key_values: KeyValues) -> Shape:
    """The dimensions that the key-values of a GGUF tell."""
    architecture = key_values["general.architecture"].value

    def figure(key: str) -> int:
        return int(key_values[f"{architecture}.{key}"].value)

    return Shape(
        n_layers=figure("block_count"),
        hidden=figure("embedding_length"),
        intermediate=figure("feed_forward_length"),
        n_heads=figure("attention.head_count"),
        n_kv_heads=figure("attention.head_count_kv"),
        n_vocab=len(key_values["tokenizer.ggml.tokens"].value),
        context_length=figure("context_length"),
    )
