"""A context's tokens with their keys and values, to a file and back, by llama.cpp's own functions.

They stream, so that a sequence of gigabytes needs no memory beside the KV cache. What is read must have been
verified before: llama.cpp asserts on a file that is cut short.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from qwq_local.engine.context import LlamaContext
from qwq_local.engine.library import forget_log, last_warning, library
from qwq_local.errors import EngineError

_SEQUENCE = 0
_HEAD_BYTES = 12


def state_bytes(context: LlamaContext) -> int:
    """The most that `write_state` would write, a few bytes more than it is."""
    state = int(library().llama_state_seq_get_size(context._handle, _SEQUENCE))
    return state + _HEAD_BYTES + 4 * len(context.tokens)


def write_state(context: LlamaContext, path: Path) -> int:
    """Write everything cached to `path`; its length. Raises EngineError when the file is not whole."""
    tokens = context.tokens
    forget_log()
    written: int = library().llama_state_seq_save_file(
        context._handle, os.fsencode(path), _SEQUENCE, (ctypes.c_int32 * len(tokens))(*tokens), len(tokens)
    )
    # llama.cpp does not look at how closing the file went.
    if not written or path.stat().st_size != written:
        raise EngineError(f"the KV cache was not written whole: {last_warning() or 'is the disk full?'}.")
    return written


def read_state(context: LlamaContext, path: Path, n_tokens: int) -> bool:
    """Replace what is cached by the `n_tokens` tokens of a verified file; False leaves an empty cache."""
    context.truncate(0)
    if n_tokens > context.settings.n_ctx:
        return False
    tokens, count = (ctypes.c_int32 * n_tokens)(), ctypes.c_size_t()
    loaded = library().llama_state_seq_load_file(
        context._handle, os.fsencode(path), _SEQUENCE, tokens, n_tokens, ctypes.byref(count)
    )
    if not loaded or count.value != n_tokens:
        context._forget_from(0)
        return False
    context._tokens = list(tokens)
    return True
