"""A GGUF path in, loaded weights out, with progress and a way to stop. One model serves several contexts."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from qwq_local.engine.library import forget_log, last_warning, library
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import Aborted, AbortFlag, DoesNotFit, ModelFileError
from qwq_local.text import binary_size

_ALL_LAYERS = -1


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How weights are loaded; `n_gpu_layers` -1 or None offloads all, which on a CPU build means none.

    `vocab_only` leaves the weights where they are: such a model can tokenize and nothing else. `split` says
    how many of the layers each GPU gets; empty leaves that to llama.cpp.
    """

    n_gpu_layers: int | None = _ALL_LAYERS
    use_mmap: bool = True
    special_ids: tuple[int, ...] = ()
    vocab_only: bool = False
    split: tuple[int, ...] = ()


class LoadedModel:
    """Weights in memory; free them with `close` after every context made over them."""

    def __init__(self, path: Path, handle: Any, special_ids: tuple[int, ...]) -> None:
        self.path = path
        self.handle = handle
        self._lib = library()
        self.vocabulary = LlamaVocabulary(self._lib.llama_model_get_vocab(handle), special_ids)

    def close(self) -> None:
        """Free the weights; closing twice is harmless."""
        if self.handle is not None:
            self._lib.llama_model_free(self.handle)
            self.handle = None


def load_model(path: Path, settings: LoadSettings, abort: AbortFlag) -> Generator[float, None, LoadedModel]:
    """Fractions from 0 to 1 while the weights load; the generator's return value is the model.

    The header must have been checked before (see models/architecture.py): llama.cpp asserts on some kinds
    of damage. Raises ModelFileError or DoesNotFit when llama.cpp refuses, Aborted when the flag was set.
    """
    lib = library()
    forget_log()
    fractions: SimpleQueue[float | None] = SimpleQueue()
    stop = AbortFlag()

    def on_progress(fraction: float, _: object) -> bool:
        fractions.put(fraction)
        return not (stop or abort)

    params = lib.llama_model_default_params()
    params.n_gpu_layers = _ALL_LAYERS if settings.n_gpu_layers is None else settings.n_gpu_layers
    params.vocab_only = settings.vocab_only
    if len(settings.split) > 1:
        params.tensor_split = tensor_split(settings.split)
    if not settings.use_mmap:
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    params.progress_callback = lib.llama_progress_callback(on_progress)
    loaded: list[Any] = []
    name = os.fsencode(path)

    def load() -> None:
        loaded.append(lib.llama_model_load_from_file(name, params))
        fractions.put(None)

    # llama.cpp loads in one call: on a thread of its own, progress can be yielded and Ctrl-C is heard.
    worker = threading.Thread(target=load, name="load", daemon=True)
    worker.start()
    try:
        shown = -1
        while (fraction := fractions.get()) is not None:
            if int(100 * fraction) > shown:
                shown = int(100 * fraction)
                yield fraction
    finally:
        stop.set()
        worker.join()
        handle = loaded[0]
        if handle and (abort or fraction is not None):
            lib.llama_model_free(handle)
    if abort:
        raise Aborted
    if not handle:
        raise _refusal(path)
    return LoadedModel(path, handle, settings.special_ids)


def tensor_split(split: Sequence[int]) -> Any:
    """The layers of each GPU as llama.cpp takes them: shares, one for every device there could be."""
    shares = (ctypes.c_float * library().llama_max_devices())()
    for index, count in enumerate(split):
        shares[index] = count
    return shares


def drained(loading: Generator[float, None, LoadedModel]) -> LoadedModel:
    """The model at the end of a `load_model`, for callers that show no progress."""
    while True:
        try:
            next(loading)
        except StopIteration as finished:
            model: LoadedModel = finished.value
            return model


def _refusal(path: Path) -> ModelFileError | DoesNotFit:
    why = last_warning()
    if any(word in why for word in ("alloc", "memory", "buffer")):
        size = binary_size(path.stat().st_size)
        return DoesNotFit(
            f"{path.name} ({size}) does not fit: {why}. Try a smaller type, or fewer layers on "
            "the GPU: --set n_gpu_layers=N."
        )
    return ModelFileError(f"llama.cpp refuses {path}: {why or 'no reason given'}. Fetch or convert it again.")
