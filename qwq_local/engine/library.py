"""The door to llama_cpp: `library()` imports it, checks its version, and keeps its log off the screen."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from functools import cache
from types import ModuleType
from typing import Any, TextIO

from qwq_local.errors import EngineError

TESTED_VERSION = "0.3.36"
_WARNING = 2
_recent: deque[str] = deque(maxlen=20)
_shown = False


def check_version(installed: str) -> None:
    """Raise EngineError in one line when another version of llama-cpp-python is installed.

    The layout of C structs changes between versions without notice.
    """
    if installed != TESTED_VERSION:
        raise _wrong_version(f"llama-cpp-python {installed}")


def _wrong_version(found: str) -> EngineError:
    return EngineError(
        f"{found} is installed; this qwq is tested with {TESTED_VERSION} only. "
        f"Run: pip install llama-cpp-python=={TESTED_VERSION}"
    )


@cache
def library() -> ModuleType:
    """llama_cpp's low-level functions, with backends loaded and its log captured. Raises EngineError."""
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise _wrong_version("no llama-cpp-python") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"llama-cpp-python does not load: {error}. Reinstall it for this machine."
        ) from error
    check_version(llama_cpp.__version__)
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _log_callback(llama_cpp: ModuleType) -> Any:
    def log(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        if _shown:
            sys.stderr.write(line)
        if level >= _WARNING and line.strip():
            _recent.append(line.strip())

    return llama_cpp.llama_log_callback(log)


def show_log() -> None:
    """Write llama.cpp's log to stderr from now on."""
    global _shown
    _shown = True


def forget_log() -> None:
    """Forget earlier warnings of llama.cpp, before a call whose failure `last_warning` should explain."""
    _recent.clear()


def last_warning() -> str:
    """llama.cpp's last message about an error, for ours; empty when there is none."""
    for line in reversed(_recent):
        if "error" in line.lower() or "failed" in line.lower():
            return line.split(": ", 1)[-1][:300]
    return ""


def divert_stderr() -> TextIO:
    """The real stderr as a new stream; from now on, output of C code to descriptor 2 is discarded.

    llama.cpp prints some lines without its log callback. Call this once, before the library is used.
    """
    sys.stderr.flush()
    stream = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return stream
