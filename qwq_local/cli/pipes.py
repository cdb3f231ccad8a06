"""Streams that are closed, full or no longer read.

Without a reader of stdout the command ends quietly, as any program does that is killed by SIGPIPE. What goes
to stderr is only for eyes: where it cannot be written the answer goes on without it.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from qwq_local.errors import UsageError


class ClosedPipe(Exception):
    """Nobody reads what is written. Not an OSError: the argument parser would end the process with 1."""


class ForgivingStream(io.TextIOWrapper):
    """A text stream whose write errors are nobody's concern."""

    def write(self, text: str, /) -> int:
        """Write what can be written."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            super().flush()


def forgiving(stream: TextIO) -> TextIO:
    """The same stream, its write errors forgiven; used up by this."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding, errors = stream.encoding, stream.errors
    return ForgivingStream(stream.detach(), encoding, errors, line_buffering=True, write_through=True)


def mend_streams() -> bool:
    """Open descriptors 0 and 2 on nothing where they are closed; whether stdout is open.

    Otherwise the next file to be opened would get the number, and C code would read from it or print into it.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), "r")
    if sys.stdout is None:
        return False
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = forgiving(sys.stderr)
    return True


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


def refuse_stdout(out: Path | None) -> None:
    """Raises UsageError where -o asks for a pipe: such a file is not written from front to back."""
    if out == Path("-"):
        raise UsageError("-o -: what is written here needs a file, not a pipe. Give its name.")


def finish_stdout(stream: TextIO) -> None:
    """Nothing more will come: a pipe's reader gets its end now, while this process has other things to do."""
    stream.flush()
    if stream is sys.stdout and not stream.isatty():
        silence_stdout()


def silence_stdout() -> None:
    """Keep the interpreter from complaining when it flushes a stream that nobody reads."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
