"""One llama.cpp context over loaded weights: the KV cache as a list of tokens, prefill, decode, sampling.

The longest common prefix of the cache and the next prompt is kept. Whatever happens in llama_decode, the
cache afterwards holds exactly the tokens that `tokens` lists.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwq_local.engine.api import (
    Aborted,
    AbortFlag,
    ContextSettings,
    Grammar,
    PrefillProgress,
    SamplerSettings,
)
from qwq_local.engine.batches import BatchSizer
from qwq_local.engine.library import forget_log, last_warning, library
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.sampler import SamplerChain
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import DoesNotFit, EngineError, UsageError
from qwq_local.planning.shape import KV_TYPES

_ROPE_UNSCALED, _ROPE_LINEAR, _ROPE_YARN = 0, 1, 2
_DECODED, _ABORTED = 0, 2
# A single token that takes longer than this is worth the abort callback's cost of one call per graph node.
_SLOW_TOKEN_S = 0.1


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What a context had cached: its settings, the tokens, and llama.cpp's bytes of their keys and values."""

    settings: ContextSettings
    tokens: tuple[int, ...]
    buffer: Any


class LlamaContext:
    """The Engine protocol over llama.cpp. Free it with `close`, before its model."""

    def __init__(self, model: LoadedModel, settings: ContextSettings, abort: AbortFlag) -> None:
        """Raises DoesNotFit when the memory cannot be had, UsageError for settings llama.cpp would refuse."""
        self._lib = library()
        self._model = model
        self._abort = abort
        self._chain: SamplerChain | None = None
        self._handle = self._create(settings)
        self._memory = self._lib.llama_get_memory(self._handle)
        self._settings = replace(
            settings,
            n_ctx=self._lib.llama_n_ctx(self._handle),
            n_batch=self._lib.llama_n_batch(self._handle),
            n_ubatch=self._lib.llama_n_ubatch(self._handle),
        )
        self._tokens: list[int] = []
        self._batch = (ctypes.c_int32 * self._settings.n_batch)()
        self._token_s = 0.0
        # Backends other than CPU and Metal do not ask the abort callback: there, batches are kept short.
        self._sizer = BatchSizer(self._settings.n_batch, adaptive=not _abortable(self._lib))
        self._on_abort = self._lib.ggml_abort_callback(lambda _: bool(self._abort))
        self._never = self._lib.ggml_abort_callback()
        self._watching = False

    @property
    def vocabulary(self) -> LlamaVocabulary:
        """The model's vocabulary."""
        return self._model.vocabulary

    @property
    def settings(self) -> ContextSettings:
        """The settings in force."""
        return self._settings

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens in the KV cache."""
        return self._tokens

    def prefill(self, tokens: Sequence[int]) -> Iterator[PrefillProgress]:
        """Make the KV cache hold exactly `tokens`; see Engine.prefill."""
        if not tokens:
            raise EngineError("an empty prompt cannot be prefilled.")
        if len(tokens) > self._settings.n_ctx:
            raise EngineError(f"{len(tokens)} tokens do not fit a context of {self._settings.n_ctx}.")
        # The last token is always decoded, since its logits are what the caller is after.
        cached = min(_common_prefix(self._tokens, tokens), len(tokens) - 1)
        self.truncate(cached)
        yield PrefillProgress(cached, len(tokens), cached)
        while (done := len(self._tokens)) < len(tokens):
            count = min(self._sizer.size, len(tokens) - done)
            began = time.perf_counter()
            self._decode(tokens[done : done + count], watch=True)
            self._sizer.measured(count, time.perf_counter() - began)
            yield PrefillProgress(done + count, len(tokens), cached)

    def start_sampling(self, settings: SamplerSettings) -> None:
        """Begin a new sampler chain."""
        if self._chain is not None:
            self._chain.close()
        n_vocab = self.vocabulary.size
        vocab = self._lib.llama_model_get_vocab(self._model.handle)
        self._chain = SamplerChain(settings, vocab, n_vocab, self._settings.n_ctx)

    def remember(self, tokens: Sequence[int]) -> None:
        """Let penalties and DRY look back at these tokens alone."""
        if self._chain is None:
            raise EngineError("there is no sampler chain that could remember.")
        self._chain.remember(tokens)

    def sample(self, grammar: Grammar | None = None) -> int:
        """The next token by the chain from the current logits."""
        if self._chain is None or not self._tokens:
            raise EngineError("sampling needs a prefilled prompt and a sampler chain.")
        if grammar is None:
            token: int = self._lib.llama_sampler_sample(self._chain.handle, self._handle, -1)
            return token
        from qwq_local.engine.constraint import ConstraintMatcher, sample_under

        if not isinstance(grammar, ConstraintMatcher):
            raise EngineError("the constraint was compiled by another engine.")
        return sample_under(grammar, self._chain, self._handle, self.vocabulary.size)

    def append(self, token: int) -> None:
        """Put one token into the KV cache and compute the logits after it."""
        if len(self._tokens) >= self._settings.n_ctx:
            raise EngineError(f"the context of {self._settings.n_ctx} tokens is full.")
        began = time.perf_counter()
        self._decode((token,), watch=self._token_s > _SLOW_TOKEN_S)
        self._token_s = time.perf_counter() - began

    def truncate(self, n_tokens: int) -> None:
        """Drop all cached tokens from position `n_tokens` on."""
        if n_tokens < len(self._tokens):
            self._forget_from(n_tokens)
            del self._tokens[n_tokens:]

    @property
    def state_bytes(self) -> int:
        """The size of what `saved_state` returns."""
        return int(self._lib.llama_state_seq_get_size(self._handle, 0))

    def saved_state(self) -> SequenceState:
        """The cached tokens with their keys and values, for a context that holds the same keys."""
        buffer = (ctypes.c_uint8 * self.state_bytes)()
        written = self._lib.llama_state_seq_get_data(self._handle, buffer, len(buffer), 0)
        if written != len(buffer):
            raise EngineError(f"llama.cpp wrote {written:,} of {len(buffer):,} bytes of the KV cache.")
        return SequenceState(self._settings, tuple(self._tokens), buffer)

    def restore(self, state: SequenceState) -> bool:
        """Take over the tokens of a saved state; False, and an empty cache, when it does not belong here."""
        self.truncate(0)
        fits = len(state.tokens) <= self._settings.n_ctx and state.settings.holds_same_keys(self._settings)
        if not fits:
            return False
        if not self._lib.llama_state_seq_set_data(self._handle, state.buffer, len(state.buffer), 0):
            self._forget_from(0)
            return False
        self._tokens = list(state.tokens)
        return True

    def write_state(self, path: Path) -> int:
        """Write the cached tokens with their keys and values to a file; its length.

        llama.cpp streams both ways, so that gigabytes need no memory beside the KV cache. The file has 12
        bytes, four for each token, and the state. Raises EngineError when it is not whole.
        """
        tokens, count = (ctypes.c_int32 * len(self._tokens))(*self._tokens), len(self._tokens)
        forget_log()
        written: int = self._lib.llama_state_seq_save_file(self._handle, os.fsencode(path), 0, tokens, count)
        # llama.cpp does not look at how closing the file went.
        if not written or path.stat().st_size != written:
            raise EngineError(f"the KV cache was not written whole: {last_warning() or 'is the disk full?'}.")
        return written

    def read_state(self, path: Path, n_tokens: int) -> bool:
        """Take over the `n_tokens` tokens of a file; False, and an empty cache, when it does not belong here.

        The file must have been verified: llama.cpp asserts on one that is cut short.
        """
        self.truncate(0)
        if n_tokens > self._settings.n_ctx:
            return False
        tokens, count = (ctypes.c_int32 * n_tokens)(), ctypes.c_size_t()
        read = self._lib.llama_state_seq_load_file(
            self._handle, os.fsencode(path), 0, tokens, n_tokens, ctypes.byref(count)
        )
        if not read or count.value != n_tokens:
            self._forget_from(0)
            return False
        self._tokens = list(tokens)
        return True

    def close(self) -> None:
        """Free the context; closing twice is harmless."""
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        if self._handle is not None:
            self._lib.llama_free(self._handle)
            self._handle = None

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

    def _decode(self, tokens: Sequence[int], *, watch: bool) -> None:
        if self._abort:
            raise Aborted
        if watch is not self._watching:
            self._lib.llama_set_abort_callback(self._handle, self._on_abort if watch else self._never, None)
            self._watching = watch
        count = len(tokens)
        self._batch[:count] = list(tokens)
        # With no positions given, llama.cpp continues after the last cached token of sequence 0.
        status = self._lib.llama_decode(self._handle, self._lib.llama_batch_get_one(self._batch, count))
        if status == _DECODED:
            self._tokens.extend(tokens)
            return
        self._forget_from(len(self._tokens))
        if status == _ABORTED and self._abort:
            raise Aborted
        raise EngineError(f"llama_decode failed with status {status}: {last_warning() or 'no reason given'}.")

    def _forget_from(self, position: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, 0, position, -1)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def _check(settings: ContextSettings) -> None:
    for kv_type in (settings.kv_type_k, settings.kv_type_v):
        if kv_type not in KV_TYPES:
            raise UsageError(f"no KV type {kv_type!r}; there are {', '.join(KV_TYPES)}.")
    quantized = settings.kv_type_v not in ("f32", "f16", "bf16")
    if quantized and settings.flash_attention is False:
        raise UsageError(f"a {settings.kv_type_v} V cache needs flash attention: --set flash_attention=on.")
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
    # Only the last token's logits are read: the compute buffer then holds one row, not one per token.
    params.n_outputs_max = 1
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


def _abortable(lib: Any) -> bool:
    """Whether every backend in use asks the abort callback (ggml: CPU and Metal do)."""
    return not lib.llama_supports_gpu_offload() or sys.platform == "darwin"
