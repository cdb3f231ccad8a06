"""The names of one architecture in GGUF: the form that each module of architectures/ fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import GGUFWriter

if TYPE_CHECKING:
    from qwq_convert.model_config import ModelConfig

Shape = tuple[str, ...]
"""Rows and columns in the words of config.json: vocab, hidden, kv, intermediate."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names and keys of one architecture.

    `class_name` is what config.json says, `name` what the GGUF says. The tables map a Hugging Face name to
    the GGUF name and shape, `layer_tensors` below "model.layers.N." and "blk.N.". Tensors with an ignored
    suffix follow from the config. `add_keys` writes the model's figures, in the reference's order.
    """

    class_name: str
    name: str
    outer_tensors: Mapping[str, tuple[str, Shape]]
    layer_tensors: Mapping[str, tuple[str, Shape]]
    ignored_suffixes: tuple[str, ...]
    add_keys: Callable[[GGUFWriter, ModelConfig], None]
