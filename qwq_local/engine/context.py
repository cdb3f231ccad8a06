"""A llama.cpp context over loaded weights: cached sequences, decode, sampling. The scheduler drives it."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwq_local.engine.api import ContextSettings, SamplerSettings
from qwq_local.engine.constraint import ConstraintMatcher, sample_under
from qwq_local.engine.library import forget_log, last_warning, library
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.sampler import SamplerChain
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import Aborted, AbortFlag, DoesNotFit, EngineError, UsageError
from qwq_local.planning.shape import KV_TYPES

if TYPE_CHECKING:
    import numpy as np

_ROPE_UNSCALED, _ROPE_LINEAR, _ROPE_YARN = 0, 1, 2
_DECODED, _NO_ROOM, _ABORTED = 0, 1, 2
_cell_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A saved sequence: the settings of its context, its tokens, and llama.cpp's bytes of keys and values."""

    settings: ContextSettings
    tokens: tuple[int, ...]
    buffer: Any


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens that follow what a slot has cached; logits are wanted after the last `n_logits` of them."""

    slot: int
    tokens: Sequence[int]
    n_logits: int = 1


class CachedSequence:
    """The tokens of one slot whose keys and values are in the KV cache."""

    def __init__(self, lib: Any, handle: Any, slot: int, settings: ContextSettings) -> None:
        self._lib = lib
        self._handle = handle
        self._memory = lib.llama_get_memory(handle)
        self.slot = slot
        self.settings = settings
        self.tokens: list[int] = []
        self.cells: list[int] = []  # one id per cell; sequences that share a prefix share its ids

    def truncate(self, n_tokens: int) -> None:
        """Drop all tokens from position `n_tokens` on."""
        if n_tokens < len(self.tokens):
            self._remove_from(n_tokens)
            del self.tokens[n_tokens:], self.cells[n_tokens:]

    def share(self, other: CachedSequence, n_tokens: int) -> None:
        """Hold the first `n_tokens` tokens of another slot, in the same cells."""
        self.truncate(0)
        self._lib.llama_memory_seq_cp(self._memory, other.slot, self.slot, 0, n_tokens)
        self.tokens, self.cells = other.tokens[:n_tokens], other.cells[:n_tokens]

    @property
    def state_bytes(self) -> int:
        """The size of what `saved_state` returns."""
        return int(self._lib.llama_state_seq_get_size(self._handle, self.slot))

    def saved_state(self) -> SequenceState:
        """The tokens with their keys and values, for a context that holds the same keys."""
        buffer = (ctypes.c_uint8 * self.state_bytes)()
        written = self._lib.llama_state_seq_get_data(self._handle, buffer, len(buffer), self.slot)
        if written != len(buffer):
            raise EngineError(f"llama.cpp wrote {written:,} of {len(buffer):,} bytes of the KV cache.")
        return SequenceState(self.settings, tuple(self.tokens), buffer)

    def restore(self, state: SequenceState) -> bool:
        """Hold the tokens of a saved state; False, and nothing cached, if it does not belong here."""
        self.truncate(0)
        fits = len(state.tokens) <= self.settings.n_ctx and state.settings.holds_same_keys(self.settings)
        if not fits:
            return False
        if not self._lib.llama_state_seq_set_data(self._handle, state.buffer, len(state.buffer), self.slot):
            # What a failed restore leaves behind corrupts later decodes.
            self._remove_from(0)
            return False
        self._set(state.tokens)
        return True

    def write_state(self, path: Path) -> int:
        """Write the tokens with their keys and values to a file; returns its length.

        llama.cpp streams both ways, so gigabytes need no memory beside the KV cache. The file has 12 bytes,
        four for each token, and the state. Raises EngineError if it is not complete.
        """
        tokens, count = (ctypes.c_int32 * len(self.tokens))(*self.tokens), len(self.tokens)
        forget_log()
        written: int = self._lib.llama_state_seq_save_file(
            self._handle, os.fsencode(path), self.slot, tokens, count
        )
        # llama.cpp does not check whether closing the file succeeded.
        if not written or path.stat().st_size != written:
            raise EngineError(f"the KV cache was not written whole: {last_warning() or 'is the disk full?'}.")
        return written

    def read_state(self, path: Path, n_tokens: int) -> bool:
        """Hold the `n_tokens` tokens of a file; False, and nothing cached, if it does not belong here.

        The file must have been verified: llama.cpp asserts on one that is cut short.
        """
        self.truncate(0)
        if n_tokens > self.settings.n_ctx:
            return False
        tokens, count = (ctypes.c_int32 * n_tokens)(), ctypes.c_size_t()
        read = self._lib.llama_state_seq_load_file(
            self._handle, os.fsencode(path), self.slot, tokens, n_tokens, ctypes.byref(count)
        )
        if not read or count.value != n_tokens:
            self._remove_from(0)
            return False
        self._set(tokens)
        return True

    def extend(self, tokens: Sequence[int]) -> None:
        """Note tokens that llama_decode has added."""
        self.tokens.extend(tokens)
        self.cells.extend(itertools.islice(_cell_ids, len(tokens)))

    def forget_uncounted(self) -> None:
        """Remove what a failed llama_decode has left after the last token."""
        self._remove_from(len(self.tokens))

    def _set(self, tokens: Iterable[int]) -> None:
        self.tokens, self.cells = [], []
        self.extend(list(tokens))

    def _remove_from(self, position: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, self.slot, position, -1)


class LlamaContext:
    """A llama.cpp context: `n_slots` sequences over one KV cache. Free it with `close`, before its model."""

    chain_class: type[SamplerChain] = SamplerChain

    def __init__(self, model: LoadedModel, settings: ContextSettings) -> None:
        """Raises DoesNotFit when the memory is not there, UsageError for settings llama.cpp would refuse."""
        self._lib = library()
        self._model = model
        self.handle = self._create(settings)
        self.settings = replace(
            settings,
            n_ctx=self._lib.llama_n_ctx(self.handle),
            n_batch=self._lib.llama_n_batch(self.handle),
            n_ubatch=self._lib.llama_n_ubatch(self.handle),
        )
        self.sequences = tuple(
            CachedSequence(self._lib, self.handle, slot, self.settings) for slot in range(settings.n_slots)
        )
        self._batch = _Batch(self._lib, self.settings.n_batch)
        self._abort: AbortFlag | None = None
        # llama.cpp keeps the address: Python must keep the callback.
        self._on_abort = self._lib.ggml_abort_callback(lambda _: bool(self._abort))
        self._never = self._lib.ggml_abort_callback()

    @property
    def vocabulary(self) -> LlamaVocabulary:
        """The model's vocabulary."""
        return self._model.vocabulary

    @property
    def is_abortable(self) -> bool:
        """Whether llama.cpp asks the abort callback inside a decode: on CPU and Metal it does."""
        return not self._lib.llama_supports_gpu_offload() or sys.platform == "darwin"

    def new_chain(self, settings: SamplerSettings) -> SamplerChain:
        """A sampler chain with a fresh seed and empty penalty windows; the caller closes it."""
        vocab = self._lib.llama_model_get_vocab(self._model.handle)
        return self.chain_class(settings, vocab, self.vocabulary.size, self.settings.n_ctx)

    def decode(self, rows: Sequence[Rows], abort: AbortFlag | None = None) -> list[int]:
        """One llama_decode; returns for each of `rows` the index of its last row, for `sample` and `logits`.

        At most `n_batch` tokens. With `abort` llama.cpp looks at the flag while it computes. Whatever
        happens, each sequence afterwards holds exactly its `tokens`. Raises Aborted, EngineError.
        """
        if abort:
            raise Aborted
        if abort is not self._abort:
            self._lib.llama_set_abort_callback(
                self.handle, self._never if abort is None else self._on_abort, None
            )
            self._abort = abort
        last_rows = self._batch.fill(rows, self.sequences)
        status = self._lib.llama_decode(self.handle, self._batch.struct)
        if status == _DECODED:
            for each in rows:
                self.sequences[each.slot].extend(each.tokens)
            return last_rows
        for each in rows:
            self.sequences[each.slot].forget_uncounted()
        if status == _ABORTED and abort:
            raise Aborted
        if status == _NO_ROOM:
            raise EngineError(f"the context of {self.settings.n_ctx:,} tokens is full.")
        raise EngineError(f"llama_decode failed with status {status}: {last_warning() or 'no reason given'}.")

    def sample(self, chain: SamplerChain, row: int, matcher: ConstraintMatcher | None = None) -> int:
        """The next token after a row of the last decode, by the chain, under the constraint if there is one.

        Raises EngineError when no token continues the constraint.
        """
        if matcher is None:
            token: int = self._lib.llama_sampler_sample(chain.handle, self.handle, row)
            return token
        return sample_under(matcher, chain, self.handle, self.vocabulary.size, row)

    def logits(self, row: int) -> np.ndarray[Any, Any]:
        """The logits after a row of the last decode, a float32 for each token; valid until the next one."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocabulary.size,))

    def synchronize(self) -> None:
        """Wait for the logits of the last decode, so that several threads may read them."""
        self._lib.llama_synchronize(self.handle)

    def close(self) -> None:
        """Free the context; closing twice is harmless."""
        if self.handle is not None:
            self._lib.llama_free(self.handle)
            self.handle = None

    def _create(self, settings: ContextSettings) -> Any:
        _check(settings)
        lib = self._lib
        forget_log()
        params = context_params(lib, settings)
        if settings.yarn_factor <= 1 and (attention := _own_attention_factor(lib, self._model.handle)) > 0:
            params.yarn_attn_factor = 1.0 / attention
        handle = lib.llama_init_from_model(self._model.handle, params)
        if not handle:
            raise DoesNotFit(
                f"a context of {settings.n_ctx:,} tokens ({settings.kv_type_k} KV) does not fit: "
                f"{last_warning() or 'llama.cpp gives no reason'}. "
                f"Try --set n_ctx={max(512, settings.n_ctx // 2)} or --set kv_type=q8_0."
            )
        return handle


class _Batch:
    """llama.cpp's batch of at most `size` rows, over arrays that are filled again for every decode."""

    def __init__(self, lib: Any, size: int) -> None:
        self._tokens = (ctypes.c_int32 * size)()
        self._positions = (ctypes.c_int32 * size)()
        self._slots = (ctypes.c_int32 * size)()
        self._wants_logits: Any = (ctypes.c_int8 * size)()
        self._one_slot = (ctypes.c_int32 * size)(*[1] * size)
        int_pointer = ctypes.POINTER(ctypes.c_int32)
        base = ctypes.addressof(self._slots)
        self._slot_pointers = (int_pointer * size)(
            *(ctypes.cast(base + 4 * row, int_pointer) for row in range(size))
        )
        self.struct = lib.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._one_slot,
            seq_id=self._slot_pointers,
            logits=self._wants_logits,
        )

    def fill(self, rows: Sequence[Rows], sequences: Sequence[CachedSequence]) -> list[int]:
        """Put the rows in; returns the index of the last one of each."""
        end, last_rows = 0, []
        for each in rows:
            start, count = end, len(each.tokens)
            end += count
            position = len(sequences[each.slot].tokens)
            if count == 1:
                self._tokens[start], self._positions[start] = each.tokens[0], position
                self._slots[start], self._wants_logits[start] = each.slot, each.n_logits
            else:
                self._tokens[start:end] = list(each.tokens)
                self._positions[start:end] = list(range(position, position + count))
                self._slots[start:end] = [each.slot] * count
                self._wants_logits[start:end] = [0] * (count - each.n_logits) + [1] * each.n_logits
            last_rows.append(end - 1)
        self.struct.n_tokens = end
        return last_rows


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common, by comparing slices that halve."""
    low, high = 0, min(len(a), len(b))
    a, b = list(a[:high]), list(b[:high])
    if a == b:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _check(settings: ContextSettings) -> None:
    for kv_type in (settings.kv_type_k, settings.kv_type_v):
        if kv_type not in KV_TYPES:
            raise UsageError(f"no KV type {kv_type!r}; there are {', '.join(KV_TYPES)}.")
    quantized = settings.kv_type_v not in ("f32", "f16", "bf16")
    if quantized and settings.flash_attention is False:
        raise UsageError(f"a {settings.kv_type_v} V cache needs flash attention: --set flash_attention=on.")
    if not 1 <= settings.n_slots <= min(settings.n_batch, 256):
        raise UsageError(f"{settings.n_slots} slots: there can be 1 to {min(settings.n_batch, 256)}.")
    if not 1 <= settings.n_ctx <= 1 << 22 or not 1 <= settings.n_ubatch <= settings.n_batch <= 1 << 16:
        raise UsageError(
            f"n_ctx {settings.n_ctx}, n_batch {settings.n_batch}, n_ubatch {settings.n_ubatch}: "
            "n_ctx goes to 4194304, and n_ubatch <= n_batch <= 65536."
        )
    if settings.yarn_factor < 1 or (settings.yarn_factor > 1 and settings.yarn_origin < 1):
        raise UsageError(
            f"YaRN needs a factor of at least 1 and the native window, not {settings.yarn_factor}."
        )


def context_params(lib: Any, settings: ContextSettings) -> Any:
    """The settings as llama.cpp takes them."""
    params = lib.llama_context_default_params()
    params.n_ctx = settings.n_ctx
    params.n_batch = settings.n_batch
    params.n_ubatch = settings.n_ubatch
    params.n_seq_max = settings.n_slots
    params.kv_unified = True
    # Logits are read after the last token of each slot: the compute buffer holds these rows only.
    params.n_outputs_max = settings.n_slots
    params.n_threads = params.n_threads_batch = settings.threads or os.cpu_count() or 1
    params.type_k, params.type_v = KV_TYPES[settings.kv_type_k].ggml, KV_TYPES[settings.kv_type_v].ggml
    params.flash_attn_type = {None: -1, False: 0, True: 1}[settings.flash_attention]
    if settings.yarn_factor > 1:
        params.rope_scaling_type = _ROPE_LINEAR if settings.is_linear else _ROPE_YARN
        params.rope_freq_scale = 1.0 / settings.yarn_factor
        params.yarn_orig_ctx = settings.yarn_origin
    else:
        # Said outright, so that scaling keys in the GGUF are not applied below the native window.
        params.rope_scaling_type = _ROPE_UNSCALED
        params.rope_freq_scale = 1.0
        params.yarn_ext_factor, params.yarn_attn_factor = 0.0, 1.0
    return params


def _own_attention_factor(lib: Any, model: Any) -> float:
    """What the file multiplies attention by whatever the scaling; 1 when it does not say."""
    buffer = ctypes.create_string_buffer(64)
    if lib.llama_model_meta_val_str(model, b"general.architecture", buffer, len(buffer)) < 0:
        return 1.0
    key = buffer.value + b".rope.scaling.attn_factor"
    if lib.llama_model_meta_val_str(model, key, buffer, len(buffer)) < 0:
        return 1.0
    try:
        return float(buffer.value)
    except ValueError:
        return 1.0
