"""What a conversion is asked for, and what it tells of on its way: values only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwq_convert.key_values import Override, Yarn
from qwq_convert.quant_types import NO_OPTIONS, TypeOptions


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What to convert, to what and where.

    `source` is a checkpoint folder or a float GGUF, `name` replaces the model's own name, `types` overrules
    the file type tensor by tensor, `split_max_bytes` begins a new file where that many bytes of tensors
    would be passed, `threads` None takes every core. `record_every_s` is the work that a crash costs at most,
    against how often the disk must come to rest.
    """

    source: Path
    file_type: str
    out: Path
    name: str | None = None
    threads: int | None = None
    types: TypeOptions = NO_OPTIONS
    overrides: tuple[Override, ...] = ()
    yarn: Yarn | None = None
    imatrix: Path | None = None
    split_max_bytes: int | None = None
    allow_nonfinite: bool = False
    record_every_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything is checked and nothing written yet: how many tensors and bytes of them will be.

    `unweighted` are the tensors that the importance matrix says nothing about, where there is one.
    """

    count: int
    bytes_total: int
    unweighted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resumed:
    """An earlier run of the same conversion left `count` tensors, `bytes_done` of them, which are kept."""

    count: int
    bytes_done: int


@dataclass(frozen=True, slots=True)
class StartedOver:
    """The partial file at `path` was of another conversion, or of an earlier state of the source."""

    path: Path


@dataclass(frozen=True, slots=True)
class Written:
    """Some rows of the tensor `name` are written; `bytes_done` of `bytes_total` so far."""

    name: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class TensorDone:
    """`name` is written whole, `index` (from 1) of `count`; `n_nonfinite` of its weights were no numbers."""

    name: str
    index: int
    count: int
    bytes_done: int
    bytes_total: int
    n_nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The model is whole, checked, on the disk and under its final name: one file, or all parts of it."""

    paths: tuple[Path, ...]
    n_bytes: int


ConvertEvent = Planned | Resumed | StartedOver | Written | TensorDone | Finished
