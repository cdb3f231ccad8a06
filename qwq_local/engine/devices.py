"""What the installed llama.cpp can use besides the CPU."""

from __future__ import annotations

from qwq_local.engine.library import library


def can_offload() -> bool:
    """Whether the installed library was built with a GPU backend."""
    return bool(library().llama_supports_gpu_offload())
