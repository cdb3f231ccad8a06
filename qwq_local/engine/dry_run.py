"""The bytes that a context of llama.cpp holds, by device: in use, and in a dry run for a placement.

For a dry run llama.cpp builds the model from its dimensions and the types of its tensors alone
(llama_model_init_from_user with no_alloc), and reserves the graphs of a real context, in milliseconds. It
reads neither the file nor the vocabulary.

The figures come from llama_get_memory_breakdown, which is C++ (src/llama-ext.h): a std::map from buffer type
to three sizes. The module reads the map by its layout in memory, which libstdc++ and libc++ keep for older
programs; the library's version is pinned (see library.py). Where the function is missing, the answer is None.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from qwq_convert.architecture import KEY_LENGTH, VALUE_LENGTH, ModelShape
from qwq_convert.ggml import GgmlInitParams

from qwq_local.engine.api import ContextSettings
from qwq_local.engine.context import context_params
from qwq_local.engine.devices import ggml, offload_devices
from qwq_local.engine.library import library
from qwq_local.engine.model import tensor_split
from qwq_local.planning.memory import Placement

TensorKinds = Mapping[str, tuple[int, tuple[int, ...]]]
_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
_WORD = ctypes.c_size_t
_NODE_WORDS = 8  # three pointers, a colour, the key, three sizes
_MAX_NODES = 256


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """The bytes on one device: `device` is ggml's name for it, CPU for every host buffer."""

    device: str
    weights: int
    kv_cache: int
    compute: int


# The map in words: its size, and the place of the pointer to the root; in a node, the places of the children.
if sys.platform == "darwin":
    # libc++: first node, then the end node, whose left child is the root. Nodes: left, right, parent, colour.
    _MAP_WORDS, _ROOT, _CHILDREN = 3, 1, (0, 1)
else:
    # libstdc++: comparator, then a header node whose parent is the root. Nodes: colour, parent, left, right.
    _MAP_WORDS, _ROOT, _CHILDREN = 6, 2, (2, 3)
_VALUE = 4  # the place of the key in a node; the sizes follow it


def held_bytes(handle: Any) -> tuple[HeldBytes, ...] | None:
    """The bytes that a context and its model hold; None where the library has no such function."""
    ask = _function()
    if ask is None:
        return None
    sums: dict[str, list[int]] = {}
    for buffer_type, *sizes in _nodes(ask(handle).words[_ROOT]):
        held = sums.setdefault(_device_name(buffer_type), [0, 0, 0])
        for index, size in enumerate(sizes):
            held[index] += size
    return tuple(HeldBytes(name, *sizes) for name, sizes in sums.items())


@cache
def _function() -> Any:
    if sys.platform == "win32":
        return None
    function = getattr(library().llama_cpp._lib, _SYMBOL, None)
    if function is None:
        return None
    fields = (("words", _WORD * _MAP_WORDS),)
    # Larger than two registers, so it comes back through memory, as a class with a destructor does.
    function.restype = type("Map", (ctypes.Structure,), {"_fields_": fields})
    function.argtypes = [ctypes.c_void_p]
    return function


def _nodes(root: int) -> Iterator[tuple[int, int, int, int]]:
    """Key and sizes of every node. The tree is not freed: a hundred bytes per call."""
    pending = [root]
    count = 0
    while pending and count < _MAX_NODES:
        if not (address := pending.pop()):
            continue
        count += 1
        words = (_WORD * _NODE_WORDS).from_address(address)
        pending += [words[child] for child in _CHILDREN]
        key, weights, kv_cache, compute = words[_VALUE:]
        yield key, weights, kv_cache, compute


def _device_name(buffer_type: int) -> str:
    lib = ggml()
    device = lib.ggml_backend_buft_get_device(buffer_type)
    if lib.ggml_backend_buft_is_host(buffer_type) or not device:
        return "CPU"
    return str(lib.ggml_backend_dev_name(device).decode("utf-8", "replace"))


class DryRun:
    """Asks llama.cpp what a model of this shape would take; answers are remembered. Free it with `close`."""

    def __init__(self, shape: ModelShape, tensors: TensorKinds) -> None:
        self._shape = shape
        self._tensors = tensors
        self._gpus = tuple(device.name for device in offload_devices())
        self._model: Any = None
        self._split: tuple[int, ...] | None = None
        self._known: dict[Placement, tuple[int, ...] | None] = {}

    def compute_bytes(self, placement: Placement) -> tuple[int, ...] | None:
        """The compute buffers: one figure per GPU, the CPU's last; None where llama.cpp will not say."""
        if placement not in self._known:
            held = self._held(placement)
            compute = dict.fromkeys((*self._gpus, "CPU"), 0)
            for part in held or ():
                compute[part.device if part.device in compute else "CPU"] += part.compute
            self._known[placement] = None if held is None else tuple(compute.values())
        return self._known[placement]

    def _held(self, placement: Placement) -> tuple[HeldBytes, ...] | None:
        lib = library()
        if self._model is None or self._split != placement.split:
            self.close()
            self._model = self._made(placement.split)
            self._split = placement.split
        if not self._model:
            return None
        context = placement.context
        settings = ContextSettings(
            n_ctx=context.n_ctx,
            n_batch=context.n_batch,
            n_ubatch=context.n_ubatch,
            kv_type_k=context.kv_type_k,
            kv_type_v=context.kv_type_v,
            flash_attention=context.flash_attention,
            threads=1,
        )
        handle = lib.llama_init_from_model(self._model, context_params(lib, settings))
        if not handle:
            return None
        try:
            return held_bytes(handle)
        finally:
            lib.llama_free(handle)

    def close(self) -> None:
        """Free the model that holds nothing; closing twice is harmless."""
        if self._model:
            library().llama_model_free(self._model)
        self._model = None

    def _made(self, split: tuple[int, ...]) -> Any:
        """A model of this shape without a byte of weights; None when llama.cpp refuses."""
        lib, gguf = library(), ggml()
        metadata = gguf.gguf_init_empty()
        tensors = gguf.ggml_init(
            GgmlInitParams(gguf.ggml_tensor_overhead() * (len(self._tensors) + 1), None, True)
        )
        try:
            self._describe(gguf, metadata, tensors)
            params = lib.llama_model_default_params()
            params.no_alloc, params.load_mode = True, lib.LLAMA_LOAD_MODE_NONE
            params.n_gpu_layers = sum(split)
            if len(split) > 1:
                params.tensor_split = tensor_split(split)
            return lib.llama_model_init_from_user(metadata, _NOTHING_TO_SET, None, params)
        finally:
            gguf.ggml_free(tensors)
            gguf.gguf_free(metadata)

    def _describe(self, gguf: Any, metadata: Any, tensors: Any) -> None:
        shape, architecture = self._shape, self._shape.architecture
        gguf.gguf_set_val_str(metadata, b"general.architecture", architecture.name.encode())
        gguf.gguf_set_val_str(metadata, b"tokenizer.ggml.model", b"none")
        heads = dict.fromkeys((KEY_LENGTH, VALUE_LENGTH), shape.head_dim)
        window = {"context_length": 1 << 20}
        for key, value in ({"vocab_size": shape.n_vocab} | shape.figures() | heads | window).items():
            gguf.gguf_set_val_u32(metadata, architecture.key(key).encode(), value)
        for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
            gguf.gguf_set_val_f32(metadata, architecture.key(key).encode(), 1.0)  # changes no size
        for name, (kind, dimensions) in self._tensors.items():
            rows = dimensions[0] if len(dimensions) > 1 else 1
            tensor = gguf.ggml_new_tensor_2d(tensors, kind, dimensions[-1], rows)
            gguf.ggml_set_name(tensor, name.encode())
            gguf.gguf_add_tensor(metadata, tensor)


# llama.cpp calls it for each tensor whose content it wants.
_NOTHING_TO_SET = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda _tensor, _data: None)
