"""Weights rounded to four bits, for the last part of training.

A step computes its loss with the rounded weights and moves the exact ones (a straight-through estimate),
so the model moves to where rounding costs little. The rounding is Q4_K's: blocks of 32 with a
scale and a minimum each, but those two are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCK = 32
LEVELS = 15


def to_four_bits(weight: Tensor) -> Tensor:
    """`weight` (rows, columns) with each block of a row on 16 evenly spaced values."""
    blocks = weight.reshape(-1, BLOCK)
    least = blocks.amin(-1, keepdim=True).clamp(max=0)
    step = ((blocks.amax(-1, keepdim=True) - least) / LEVELS).clamp(min=1e-12)
    return (((blocks - least) / step).round() * step + least).reshape(weight.shape)


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """All matrices of `model` in four bits inside the block (backward pass included), exact after it."""
    matrices = [each for each in model.parameters() if each.ndim == 2]
    exact = [each.detach().clone() for each in matrices]
    overwrite(matrices, [to_four_bits(each) for each in exact])
    try:
        yield
    finally:
        overwrite(matrices, exact)


@torch.no_grad()
def overwrite(matrices: list[nn.Parameter], values: list[Tensor]) -> None:
    """Copy `values` into `matrices`."""
    for matrix, value in zip(matrices, values, strict=True):
        matrix.copy_(value)
