"""What a context of llama.cpp holds, in bytes by device, as llama.cpp itself reports it.

The figures come from llama_get_memory_breakdown, which is C++ (src/llama-ext.h): a std::map from buffer type
to three sizes. The module reads the map by its layout in memory, which libstdc++ and libc++ keep for older
programs; the library's version is pinned (see library.py). Where the function is missing, the answer is None.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwq_local.engine.devices import ggml
from qwq_local.engine.library import library

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


@dataclass(frozen=True, slots=True)
class _MapLayout:
    """The map object in words: its size, the pointer to the root; in a node, the children and the value."""

    map_words: int
    root: int
    children: tuple[int, int]
    value: int = 4


# libstdc++: comparator, then a header node whose parent is the root; nodes are colour, parent, left, right.
_LIBSTDCXX = _MapLayout(map_words=6, root=2, children=(2, 3))
# libc++: first node, then the end node, whose left child is the root; nodes are left, right, parent, colour.
_LIBCXX = _MapLayout(map_words=3, root=1, children=(0, 1))


def held_bytes(handle: Any) -> tuple[HeldBytes, ...] | None:
    """The bytes that a context and its model hold; None where the library has no such function."""
    ask = _function()
    if ask is None:
        return None
    layout = _layout()
    found = ask(handle)
    sums: dict[str, list[int]] = {}
    for buffer_type, *sizes in _nodes(found.words[layout.root], layout):
        held = sums.setdefault(_device_name(buffer_type), [0, 0, 0])
        for index, size in enumerate(sizes):
            held[index] += size
    return tuple(HeldBytes(name, *sizes) for name, sizes in sums.items())


def _layout() -> _MapLayout:
    return _LIBCXX if sys.platform == "darwin" else _LIBSTDCXX


@cache
def _function() -> Any:
    if sys.platform == "win32":
        return None
    from llama_cpp._ctypes_extensions import load_shared_library

    lib = load_shared_library("llama", Path(str(library().__file__)).parent / "lib")
    function = getattr(lib, _SYMBOL, None)
    if function is None:
        return None
    fields = (("words", _WORD * _layout().map_words),)
    # Larger than two registers, so it comes back through memory, as a class with a destructor does.
    function.restype = type("Map", (ctypes.Structure,), {"_fields_": fields})
    function.argtypes = [ctypes.c_void_p]
    return function


def _nodes(root: int, layout: _MapLayout) -> Iterator[tuple[int, int, int, int]]:
    """Key and sizes of every node. The tree is not freed: a hundred bytes per call."""
    pending = [root]
    count = 0
    while pending and count < _MAX_NODES:
        if not (address := pending.pop()):
            continue
        count += 1
        words = (_WORD * _NODE_WORDS).from_address(address)
        pending += [words[child] for child in layout.children]
        key, weights, kv_cache, compute = words[layout.value : layout.value + 4]
        yield key, weights, kv_cache, compute


def _device_name(buffer_type: int) -> str:
    lib = ggml()
    device = lib.ggml_backend_buft_get_device(buffer_type)
    if lib.ggml_backend_buft_is_host(buffer_type) or not device:
        return "CPU"
    return str(lib.ggml_backend_dev_name(device).decode("utf-8", "replace"))
