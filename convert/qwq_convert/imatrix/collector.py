"""Runs a loaded model on tokens, and sums the squares of its activations by weight and column.

Batches, order of summation and choice of weights are those of llama-imatrix (tools/imatrix/imatrix.cpp), so
the sums are equal to the last bit.

Tensors cross the C border by their layout in memory: `struct ggml_tensor` in ggml.h of the llama.cpp that
llama-cpp-python 0.3.36 carries. It changes between builds without notice, so `check_layout` tests it on
tensors of known content first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from qwq_convert.file_types import QuantType
from qwq_convert.ggml import GgmlInitParams, Rows, declare
from qwq_local.errors import ConvertError, DoesNotFit

Tokens = NDArray[np.int32]

# llama-imatrix's n_batch and n_ubatch: a batch holds as many chunks as fit, and the tokens of one step are
# multiplied and summed at once.
BATCH_TOKENS = 2048
STEP_TOKENS = 512
# As llama-imatrix, skip an activation with fewer rows.
LEAST_ROWS = 16
# This many rows are squared and added at a time, so that they stay in the core's cache.
_ROWS_AT_ONCE = 32
_OUTPUT = "output.weight"
_LAST_BEFORE_OUTPUT = b"result_norm"
_ABORTED = 2
TESTED_VERSION = "0.3.36"
TENSOR_OVERHEAD = 368
MAX_DIMENSIONS, MAX_SOURCES, MAX_NAME = 4, 10, 64
# Far above the number of MUL_MAT, and far below that of the last operation that has a name.
_MOST_OPERATIONS = 64

_pointer = ctypes.c_void_p


class GgmlTensor(ctypes.Structure):
    """struct ggml_tensor: `ne` values, `nb` bytes from one to the next in each dimension, columns first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _pointer),
        ("ne", ctypes.c_int64 * MAX_DIMENSIONS),
        ("nb", ctypes.c_size_t * MAX_DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _pointer * MAX_SOURCES),
        ("view_src", _pointer),
        ("view_offs", ctypes.c_size_t),
        ("data", _pointer),
        ("name", ctypes.c_char * MAX_NAME),
        ("extra", _pointer),
        ("padding", ctypes.c_char * 8),
    )


declare("ggml_tensor_overhead", ctypes.c_size_t)
declare("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
declare("ggml_init", _pointer, GgmlInitParams)
declare("ggml_free", None, _pointer)
declare("ggml_new_tensor_2d", _pointer, _pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
declare("ggml_mul_mat", _pointer, _pointer, _pointer, _pointer)
declare("ggml_set_name", _pointer, _pointer, ctypes.c_char_p)
declare("ggml_get_data", _pointer, _pointer)
declare("ggml_nbytes", ctypes.c_size_t, _pointer)
declare("ggml_backend_buffer_is_host", ctypes.c_bool, _pointer)
declare("ggml_backend_tensor_get", None, _pointer, _pointer, ctypes.c_size_t, ctypes.c_size_t)


def check_layout(library: Any = libggml, layout: type[ctypes.Structure] = GgmlTensor) -> int:
    """The number of the MUL_MAT operation. Checks that the library's tensors have this `layout`.

    Raises ConvertError when they do not: activations would be read from wrong places.
    """
    overhead = library.ggml_tensor_overhead()
    if overhead != TENSOR_OVERHEAD:
        raise _other_build(f"a tensor takes {overhead} bytes, expected {TENSOR_OVERHEAD}")
    multiplication = next((i for i in range(_MOST_OPERATIONS) if library.ggml_op_name(i) == b"MUL_MAT"), -1)
    context = library.ggml_init(GgmlInitParams(16 * overhead, None, False))
    if multiplication < 0 or not context:
        raise _other_build("it has no matrix multiplication")
    try:
        weight = library.ggml_new_tensor_2d(context, QuantType.F32, 3, 5)
        rows = library.ggml_new_tensor_2d(context, QuantType.F32, 3, 4)
        product = library.ggml_mul_mat(context, weight, rows)
        library.ggml_set_name(rows, b"probe")
        found, node = layout.from_address(rows), layout.from_address(product)
        read = {
            "type": found.type == QuantType.F32 and found.buffer is None,
            "ne": (*found.ne,) == (3, 4, 1, 1) and (*node.ne,) == (5, 4, 1, 1),
            "nb": (*found.nb,) == (4, 12, 48, 48),
            "op": node.op == multiplication and found.op == 0,
            "src": (*node.src,) == (weight, rows, *[None] * (MAX_SOURCES - 2)),
            "data": found.data == library.ggml_get_data(rows),
            "name": found.name == b"probe",
        }
    finally:
        library.ggml_free(context)
    if wrong := [field for field, is_right in read.items() if not is_right]:
        raise _other_build(f"a tensor's {', '.join(wrong)} lie elsewhere")
    return multiplication


def weight_name(tensor: GgmlTensor) -> str:
    """The tensor's name in the model file; `CUDA0#blk.0.attn_k.weight#0` is a copy on a device."""
    parts = bytes(tensor.name).split(b"#")
    return (parts[1] if len(parts) > 1 else parts[0]).decode("utf-8", "replace")


def planes(tensor: GgmlTensor, *, in_memory: bool) -> Iterator[Rows]:
    """The rows of an F32 tensor, plane by plane of the two outer dimensions.

    Without `in_memory` the numbers are first copied from their device.
    """
    n_bytes = libggml.ggml_nbytes(ctypes.addressof(tensor))
    if tensor.type != QuantType.F32 or tensor.nb[0] != 4:
        raise ValueError("expected a tensor of 32-bit floats, those of a row side by side")
    content: NDArray[np.uint8]
    if in_memory:
        content = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(tensor.data))
    else:
        content = np.empty(n_bytes, np.uint8)
        libggml.ggml_backend_tensor_get(ctypes.addressof(tensor), content.ctypes.data, 0, n_bytes)
    shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
    stacked: Rows = np.ndarray(shape, np.float32, content.data, 0, strides)
    for outer in stacked:
        yield from outer


def _other_build(difference: str) -> ConvertError:
    return ConvertError(
        f"this build of llama.cpp is not the tested one: {difference}. "
        f"Run: pip install llama-cpp-python=={TESTED_VERSION}"
    )


class CollectionStopped(Exception):
    """The collection was asked to stop. Only the sums of the unfinished group of chunks are lost."""


@dataclass(frozen=True, slots=True)
class CollectorSettings:
    """Tokens of a chunk, threads, whether to collect for the output layer and to parse special tokens."""

    chunk_size: int = 512
    threads: int = 1
    process_output: bool = False
    parse_special: bool = False

    @property
    def n_parallel(self) -> int:
        """How many chunks are computed side by side."""
        return max(1, BATCH_TOKENS // self.chunk_size)


@dataclass(slots=True)
class ActivationSums:
    """Sums of squares per column and tokens counted, by the weight's name."""

    sums: dict[str, Rows] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def copy(self) -> ActivationSums:
        """A copy that changes independently."""
        return ActivationSums({name: sums.copy() for name, sums in self.sums.items()}, dict(self.counts))

    def add(self, name: str, rows: Rows) -> None:
        """Add the squares of each row, one row after the other, in 32 bits.

        The order affects the result: NumPy adds the rows of a C-ordered array first to last when it reduces
        the first axis. Raises ConvertError when a sum is no longer finite or the number of columns changed.
        """
        n_columns = rows.shape[1]
        sums = self.sums.setdefault(name, np.zeros(n_columns, np.float32))
        if len(sums) != n_columns:
            raise ConvertError(
                f"{name} has {len(sums)} columns in the importance matrix so far, {n_columns} in the model. "
                "Leave out the files of another model."
            )
        terms = np.empty((1 + _ROWS_AT_ONCE, n_columns), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            used = terms[: 1 + len(some)]
            used[0] = sums
            with np.errstate(over="ignore", invalid="ignore"):
                np.multiply(some, some, out=used[1:])
                np.add.reduce(used, axis=0, out=sums)
        if not np.isfinite(sums).all():
            raise ConvertError(
                f"{name}: the activations are no longer finite after {self.counts.get(name, 0):,} tokens. "
                "The model is damaged, or its type overflows: try the BF16 file."
            )
        self.counts[name] = self.counts.get(name, 0) + len(rows)


class Collector:
    """A context over a loaded model that sums the squares of its activations. A context manager."""

    def __init__(self, model: Any, settings: CollectorSettings, stop: Callable[[], bool]) -> None:
        """`model` is llama.cpp's handle. `stop` is called often and ends the work when it returns true.

        Raises ConvertError for another build of llama.cpp, and DoesNotFit when there is too little memory.
        """
        self._multiplication = check_layout()
        self._settings = settings
        self._stop = stop
        self._tally = ActivationSums()
        self._failure: BaseException | None = None
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        # They must live as long as the context that calls them.
        self._on_node = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        self._on_abort = llama_cpp.ggml_abort_callback(lambda _: self._is_ending)
        self._context = self._create(model)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def tokenize(self, text: bytes) -> Tokens:
        """The tokens of a text, after the beginning token if the model wants one."""
        tokens = np.empty(len(text) + 8, np.int32)
        room = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = llama_cpp.llama_tokenize(
            self._vocabulary, text, len(text), room, len(tokens), True, self._settings.parse_special
        )
        if count < 0:
            raise ConvertError(f"llama.cpp could not tokenize a text of {len(text):,} bytes. Shorten it.")
        return tokens[:count].copy()

    def run(self, chunks: Tokens, tally: ActivationSums) -> Iterator[int]:
        """Compute chunks side by side and add to `tally`; yields the number of tokens after each step.

        `chunks` has a row for each, at most `n_parallel` of them. Raises CollectionStopped and ConvertError;
        `tally` is then of no use.
        """
        n_chunks, chunk_size = chunks.shape
        if llama_cpp.llama_vocab_get_add_bos(self._vocabulary):
            chunks = chunks.copy()
            chunks[:, 0] = llama_cpp.llama_vocab_bos(self._vocabulary)
        self._tally = tally
        llama_cpp.llama_memory_clear(self._memory, True)
        # llama.cpp itself splits a batch into such steps. Given one by one, it keeps the logits of one step
        # only, a quarter of llama-imatrix's.
        step = STEP_TOKENS // n_chunks
        for start in range(0, chunk_size, step):
            tokens = chunks[:, start : start + step]
            self._decode(tokens.tolist(), start)
            yield tokens.size

    @property
    def _is_ending(self) -> bool:
        return self._failure is not None or self._stop()

    def _create(self, model: Any) -> Any:
        settings = self._settings
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = settings.n_parallel * settings.chunk_size
        params.n_seq_max = settings.n_parallel
        params.n_batch = params.n_ubatch = min(STEP_TOKENS, params.n_ctx)
        params.n_threads = params.n_threads_batch = settings.threads
        params.cb_eval = self._on_node
        params.abort_callback = self._on_abort
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise DoesNotFit(
                f"a context of {settings.n_parallel} chunks of {settings.chunk_size:,} tokens does not fit "
                "in memory. Try a smaller --ctx, or fewer layers on the GPU."
            )
        return context

    def _decode(self, tokens: Sequence[Sequence[int]], start: int) -> None:
        batch, at = self._batch, 0
        for sequence, part in enumerate(tokens):
            for place, token in enumerate(part):
                batch.token[at] = token
                batch.pos[at] = start + place
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                # For all tokens: the last layer is computed for outputs only.
                batch.logits[at] = True
                at += 1
        batch.n_tokens = at
        status = llama_cpp.llama_decode(self._context, batch)
        if self._failure is not None:
            raise self._failure
        if self._stop() or status == _ABORTED:
            raise CollectionStopped
        if status:
            raise ConvertError(f"llama.cpp stopped with status {status}. Try a smaller --ctx.")

    def _see(self, address: int, is_asking: bool, _: object) -> bool:
        """llama.cpp calls this for each node of the graph: first to ask, then with its numbers."""
        try:
            node = GgmlTensor.from_address(address)
            return self._wants(node) if is_asking else self._take(node)
        except BaseException as error:
            # An exception cannot pass through C. It is raised again when llama.cpp returns.
            self._failure = self._failure or error
            return False

    def _wants(self, node: GgmlTensor) -> bool:
        if node.op != self._multiplication:
            return not self._settings.process_output and node.name == _LAST_BEFORE_OUTPUT
        weight, rows = (GgmlTensor.from_address(source) for source in node.src[:2])
        name = weight_name(weight)
        is_wanted = name.startswith("blk.") or (self._settings.process_output and name == _OUTPUT)
        return is_wanted and rows.ne[1] >= LEAST_ROWS and rows.type == QuantType.F32

    def _take(self, node: GgmlTensor) -> bool:
        """Whether the graph continues: not into the output layer, whose logits are not needed."""
        if node.op != self._multiplication:
            return False
        weight, rows = (GgmlTensor.from_address(source) for source in node.src[:2])
        name = weight_name(weight)
        if weight.ne[2] * weight.ne[3] != 1:
            raise ConvertError(f"{name} is a stack of matrices; only dense models can be collected for.")
        in_memory = bool(libggml.ggml_backend_buffer_is_host(rows.buffer))
        for plane in planes(rows, in_memory=in_memory):
            self._tally.add(name, plane)
        return not self._is_ending
