"""llama.cpp's own dry run: the compute buffers that it would allocate for a placement, in milliseconds.

llama.cpp builds the model from its dimensions and the types of its tensors alone (llama_model_init_from_user
with no_alloc), and reserves the graphs of a real context. It reads neither the file nor the vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

from qwq_convert.architecture import KEY_LENGTH, VALUE_LENGTH, ModelShape
from qwq_convert.ggml import GgmlInitParams

from qwq_local.engine.api import ContextSettings
from qwq_local.engine.breakdown import HeldBytes, held_bytes
from qwq_local.engine.context import context_params
from qwq_local.engine.devices import ggml, offload_devices
from qwq_local.engine.library import library
from qwq_local.engine.model import tensor_split
from qwq_local.planning.memory import Placement

TensorKinds = Mapping[str, tuple[int, tuple[int, ...]]]
_pointer = ctypes.c_void_p


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
            held = self.held(placement)
            self._known[placement] = None if held is None else self._by_device(held)
        return self._known[placement]

    def held(self, placement: Placement) -> tuple[HeldBytes, ...] | None:
        """Everything that a context of this placement would hold, by device."""
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

    def _by_device(self, held: tuple[HeldBytes, ...]) -> tuple[int, ...]:
        compute = dict.fromkeys(self._gpus, 0)
        host = 0
        for part in held:
            if part.device in compute:
                compute[part.device] += part.compute
            else:
                host += part.compute
        return (*compute.values(), host)

    def _made(self, split: tuple[int, ...]) -> Any:
        """A model of this shape without a byte of weights; None when llama.cpp refuses."""
        lib, gguf = library(), _gguf()
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
_NOTHING_TO_SET = ctypes.CFUNCTYPE(None, _pointer, _pointer)(lambda _tensor, _data: None)


@cache
def _gguf() -> Any:
    """The functions of libggml-base that describe a model, their types declared."""
    base = ggml().base
    text = ctypes.c_char_p
    for name, result, *arguments in (
        ("gguf_init_empty", _pointer),
        ("gguf_free", None, _pointer),
        ("gguf_set_val_str", None, _pointer, text, text),
        ("gguf_set_val_u32", None, _pointer, text, ctypes.c_uint32),
        ("gguf_set_val_f32", None, _pointer, text, ctypes.c_float),
        ("gguf_add_tensor", None, _pointer, _pointer),
        ("ggml_init", _pointer, GgmlInitParams),
        ("ggml_free", None, _pointer),
        ("ggml_tensor_overhead", ctypes.c_size_t),
        ("ggml_new_tensor_2d", _pointer, _pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
        ("ggml_set_name", _pointer, _pointer, text),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    return base
