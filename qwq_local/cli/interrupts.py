"""Ctrl-C in, an abort flag out: the engine stops at its next check, and the turn ends in order.

A KeyboardInterrupt raised while llama.cpp calls back into Python would be lost in C, so while a model works
the first Ctrl-C only sets the flag. A second one, or one while nothing works, interrupts as usual.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qwq_local.engine.api import AbortFlag


@contextmanager
def interrupts_to(flag: AbortFlag) -> Iterator[None]:
    """Within the block, the first Ctrl-C sets the flag, the second raises KeyboardInterrupt."""

    def set_or_raise() -> None:
        if flag:
            raise KeyboardInterrupt
        flag.set()

    with interrupts_call(set_or_raise):
        yield


@contextmanager
def interrupts_call(action: Callable[[], None]) -> Iterator[None]:
    """Within the block, each Ctrl-C calls the action."""

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        action()

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started by something that keeps Ctrl-C for itself, such as nohup.
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
