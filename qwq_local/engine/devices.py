"""The devices that the installed llama.cpp can compute on, from ggml's list, with their memory."""

from __future__ import annotations

import ctypes
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
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
        declared[name] = function
    return SimpleNamespace(base=base, **declared)


def list_devices() -> tuple[Device, ...]:
    """Every device in ggml's order; the free memory of the CPU is wrong there (see machine/memory.py)."""
    lib = ggml()
    handles = map(lib.ggml_backend_dev_get, range(lib.ggml_backend_dev_count()))
    return tuple(_device(lib, handle)[0] for handle in handles)


def offload_devices() -> tuple[Device, ...]:
    """The devices that llama.cpp gives layers to, in its order: GPUs, or integrated ones if there is no GPU.

    A GPU that two backends list counts once (llama.cpp, llama_prepare_model_devices).
    """
    lib = ggml()
    by_kind: dict[DeviceKind, list[Device]] = {DeviceKind.GPU: [], DeviceKind.INTEGRATED: []}
    seen = set()
    for index in range(lib.ggml_backend_dev_count()):
        device, identity = _device(lib, lib.ggml_backend_dev_get(index))
        if device.kind not in by_kind or (identity and identity in seen):
            continue
        seen.add(identity)
        by_kind[device.kind].append(device)
    return tuple(by_kind[DeviceKind.GPU] or by_kind[DeviceKind.INTEGRATED])


def _device(lib: Any, handle: int) -> tuple[Device, str]:
    """The device, and an identity that is equal in every backend that lists it."""
    found = _Properties()
    lib.ggml_backend_dev_get_props(handle, ctypes.byref(found))
    kind = _KINDS[found.type] if found.type < len(_KINDS) else DeviceKind.OTHER
    device = Device(
        name=_text(found.name),
        description=_text(found.description),
        kind=kind,
        free_bytes=found.memory_free,
        total_bytes=found.memory_total,
    )
    return device, _text(found.device_id)


def _text(raw: bytes | None) -> str:
    return raw.decode("utf-8", "replace") if raw else ""
