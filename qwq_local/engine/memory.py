"""The free memory that llama.cpp would put a model in: of the GPUs, as ggml reports it, else main memory."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

from qwq_local.engine.library import library

_GPUS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU of ggml-backend.h
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def model_memory() -> tuple[int, str]:
    """Free bytes of all GPUs together, or of main memory where there is none, and in words what that is."""
    library()
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp._ggml import libggml, libggml_base_path

    base = load_shared_library("ggml-base", libggml_base_path)
    return _gpus(libggml, base) or (main_memory_bytes(), "main memory")


def _gpus(ggml: Any, base: Any) -> tuple[int, str] | None:
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    ggml.ggml_backend_dev_count.restype = size
    _type(ggml.ggml_backend_dev_get, pointer, size)
    _type(base.ggml_backend_dev_type, ctypes.c_int, pointer)
    _type(base.ggml_backend_dev_description, ctypes.c_char_p, pointer)
    _type(base.ggml_backend_dev_memory, None, pointer, ctypes.POINTER(size), ctypes.POINTER(size))
    free_bytes, names = 0, []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        if base.ggml_backend_dev_type(device) not in _GPUS:
            continue
        free, total = size(), size()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        free_bytes += free.value
        names.append((base.ggml_backend_dev_description(device) or b"GPU").decode("utf-8", "replace"))
    return (free_bytes, " + ".join(names)) if free_bytes else None


def _type(function: Any, result: Any, *arguments: Any) -> None:
    function.restype, function.argtypes = result, arguments


def main_memory_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Bytes of main memory that are available: what the system says, and no more than the cgroup allows."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(meminfo), re.MULTILINE)
    available = int(match[1]) * 1024 if match else _physical_bytes()
    # Version 2 of cgroups, then version 1; "max" means no limit.
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(cgroup / limit_file).strip(), _read(cgroup / used_file).strip()
        if limit.isdecimal() and used.isdecimal():
            available = min(available, max(0, int(limit) - int(used)))
    return available


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
