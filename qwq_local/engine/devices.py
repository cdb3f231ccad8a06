"""The devices that the installed llama.cpp can compute on, from ggml's list, with their memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwq_local.engine.library import library
from qwq_local.planning.memory import Device, DeviceKind

# ggml-backend.h, enum ggml_backend_dev_type.
_KINDS = (DeviceKind.CPU, DeviceKind.GPU, DeviceKind.INTEGRATED, DeviceKind.ACCELERATOR)
_pointer = ctypes.c_void_p


class _Properties(ctypes.Structure):
    """ggml-backend.h, struct ggml_backend_dev_props."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("capabilities", ctypes.c_bool * 8),
    )


def can_offload() -> bool:
    """Whether the installed library was built with a GPU backend."""
    return bool(library().llama_supports_gpu_offload())


@cache
def ggml() -> Any:
    """Functions of libggml and libggml-base that llama_cpp does not export, with their types."""
    llama_cpp = library()
    # These two are beside llama_cpp's library and named by the same rules, so its loader finds them.
    from llama_cpp._ctypes_extensions import load_shared_library
    from qwq_convert.ggml import GgmlInitParams

    text = ctypes.c_char_p
    folder = Path(str(llama_cpp.__file__)).parent / "lib"
    registry, base = (load_shared_library(name, folder) for name in ("ggml", "ggml-base"))
    declared = {}
    for lib, name, result, *arguments in (
        (registry, "ggml_backend_dev_count", ctypes.c_size_t),
        (registry, "ggml_backend_dev_get", _pointer, ctypes.c_size_t),
        (base, "ggml_backend_dev_get_props", None, _pointer, ctypes.POINTER(_Properties)),
        (base, "ggml_backend_dev_name", ctypes.c_char_p, _pointer),
        (base, "ggml_backend_buft_get_device", _pointer, _pointer),
        (base, "ggml_backend_buft_is_host", ctypes.c_bool, _pointer),
        (base, "gguf_init_empty", _pointer),
        (base, "gguf_free", None, _pointer),
        (base, "gguf_set_val_str", None, _pointer, text, text),
        (base, "gguf_set_val_u32", None, _pointer, text, ctypes.c_uint32),
        (base, "gguf_set_val_f32", None, _pointer, text, ctypes.c_float),
        (base, "gguf_add_tensor", None, _pointer, _pointer),
        (base, "ggml_init", _pointer, GgmlInitParams),
        (base, "ggml_free", None, _pointer),
        (base, "ggml_tensor_overhead", ctypes.c_size_t),
        (base, "ggml_new_tensor_2d", _pointer, _pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
        (base, "ggml_set_name", _pointer, _pointer, text),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
        declared[name] = function
    return SimpleNamespace(**declared)


def list_devices() -> tuple[Device, ...]:
    """Every device in ggml's order; the free memory of the CPU is wrong there (see machine/memory.py)."""
    return tuple(device for device, _ in _devices())


def offload_devices() -> tuple[Device, ...]:
    """The devices that llama.cpp gives layers to, in its order: GPUs, or integrated ones if there is no GPU.

    A GPU that two backends list counts once (llama.cpp, llama_prepare_model_devices).
    """
    by_kind: dict[DeviceKind, list[Device]] = {DeviceKind.GPU: [], DeviceKind.INTEGRATED: []}
    seen = set()
    for device, identity in _devices():
        if device.kind not in by_kind or (identity and identity in seen):
            continue
        seen.add(identity)
        by_kind[device.kind].append(device)
    return tuple(by_kind[DeviceKind.GPU] or by_kind[DeviceKind.INTEGRATED])


def _devices() -> Iterator[tuple[Device, str]]:
    """Each device, and an identity that is equal in every backend that lists it."""
    lib = ggml()
    for index in range(lib.ggml_backend_dev_count()):
        found = _Properties()
        lib.ggml_backend_dev_get_props(lib.ggml_backend_dev_get(index), ctypes.byref(found))
        kind = _KINDS[found.type] if found.type < len(_KINDS) else DeviceKind.OTHER
        name, description = _text(found.name), _text(found.description)
        device = Device(name, description, kind, found.memory_free, found.memory_total)
        yield device, _text(found.device_id)


def _text(raw: bytes | None) -> str:
    return raw.decode("utf-8", "replace") if raw else ""
