"""A reader that went away: the command ends quietly, as any program does that is killed by SIGPIPE."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ClosedPipe(Exception):
    """Nobody reads what is written. Not an OSError: the argument parser would end the process with 1."""


@contextmanager
def closed_pipes_end_it() -> Iterator[None]:
    """Within the block, a closed pipe raises ClosedPipe."""
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipe from error


def end_quietly() -> int:
    """The exit status of a program whose reader went away; nothing is written any more."""
    silence_stdout()
    return 128 + getattr(signal, "SIGPIPE", 13)


def silence_stdout() -> None:
    """Keep the interpreter from complaining when it flushes a stream that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
