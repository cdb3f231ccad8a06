"""The process around a command: streams and variables as one value, pipes that close, Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO, TextIO, TypeVar

from qwq_local.errors import UsageError

if TYPE_CHECKING:
    from qwq_local.backend.api import Backend
    from qwq_local.backend.make import BackendMaker, BackendRequest

T = TypeVar("T")


def _make_backend(request: BackendRequest) -> Backend:
    from qwq_local.backend.make import make_backend

    return make_backend(request)


@dataclass(frozen=True, slots=True)
class Environment:
    """Streams, variables and who answers. `stdout` carries the answer alone, `stderr` everything else."""

    stdin: BinaryIO | None
    stdout: TextIO
    stderr: TextIO
    variables: Mapping[str, str]
    make_backend: BackendMaker = _make_backend

    @property
    def stdin_is_terminal(self) -> bool:
        """Whether somebody types into standard input. False when it is closed."""
        return self.stdin is not None and self.stdin.isatty()

    def read_stdin(self, limit: int) -> bytes:
        """At most `limit` bytes of standard input. Raises UsageError when it cannot be read."""
        if self.stdin is None:
            return b""
        try:
            return self.stdin.read(limit)
        except (OSError, ValueError) as error:
            raise UsageError(f"standard input cannot be read: {error}.") from None

    def print(self, *lines: str) -> None:
        """Writes lines to stdout, so that each can be read at once."""
        for line in lines:
            self.stdout.write(f"{line}\n")
            self.stdout.flush()

    def agrees(self, question: str, verb: str) -> bool:
        """Asks a question on stderr and reads the answer. True for y or yes.

        Raises UsageError where nobody can answer; `verb` says what `rm` does.
        """
        if not self.stdin_is_terminal:
            raise UsageError(f"rm asks before it {verb}, and nobody can answer here: add --yes.")
        self.stderr.write(f"{question} [y/N] ")
        self.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def process_environment() -> Environment:
    """The environment of this process. Text that goes into a pipe or a file is UTF-8 in every locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    stdin = sys.stdin.buffer if sys.stdin is not None else None
    return Environment(stdin, sys.stdout, sys.stderr, os.environ)


def engine_environment(*, shows_log: bool = False) -> Environment:
    """The environment of a command that runs llama.cpp: what its C code prints is shown or dropped."""
    from qwq_local.engine.library import divert_stderr, show_log

    if shows_log:
        show_log()
    else:
        sys.stderr = _best_effort(divert_stderr())
    return process_environment()


class _BestEffortStream(io.TextIOWrapper):
    """A text stream that ignores write errors."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _best_effort(stream: TextIO) -> TextIO:
    """The same stream, ignoring write errors. The one passed in cannot be used any more."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding, errors = stream.encoding, stream.errors
    return _BestEffortStream(stream.detach(), encoding, errors, line_buffering=True, write_through=True)


def open_missing_streams() -> bool:
    """Opens descriptors 0 and 2 on the null device where they are closed. Returns whether stdout is open.

    Otherwise the next file to be opened gets the number, and C code reads from it or prints into it.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY), "r")
    if sys.stdout is None:
        return False
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    # Stderr carries no result: the answer is written even where stderr cannot be.
    sys.stderr = _best_effort(sys.stderr)
    return True


def refuse_stdout(out: Path | None) -> None:
    """Raises UsageError for `-o -`: the file is not written from front to back, so it cannot be a pipe."""
    if out == Path("-"):
        raise UsageError("-o -: what is written here needs a file, not a pipe. Give its name.")


def finish_stdout(stream: TextIO) -> None:
    """Ends the output: a pipe's reader gets its end now, while this process has other work to do."""
    stream.flush()
    if stream is sys.stdout and not stream.isatty():
        silence_stdout()


def silence_stdout() -> None:
    """Sends stdout to the null device, so that the interpreter's last flush cannot fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextmanager
def interrupts_call(action: Callable[[], None]) -> Iterator[None]:
    """Within the block, each Ctrl-C calls the action."""

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        action()

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # The parent process keeps Ctrl-C for itself, as nohup does.
        yield
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class ReplyInterrupt:
    """What Ctrl-C does while llama.cpp works: the first calls `stop`, the second raises KeyboardInterrupt.

    C code loses a KeyboardInterrupt that is raised while llama.cpp calls back into Python; `stop` ends the
    work in order.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._is_stopped = False

    def __call__(self) -> None:
        """Handles Ctrl-C."""
        if self._is_stopped:
            raise KeyboardInterrupt
        self._is_stopped = True
        self._stop()

    def is_stopped(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._is_stopped

    def watch(self, events: Iterable[T]) -> Iterator[T]:
        """The events of replies. A stop that came between two of them ends the next one."""
        for event in events:
            if self._is_stopped:
                self._stop()
            yield event


@contextmanager
def interrupts_stop(stop: Callable[[], None]) -> Iterator[ReplyInterrupt]:
    """Within the block, the first Ctrl-C calls `stop`."""
    interrupt = ReplyInterrupt(stop)
    with interrupts_call(interrupt):
        yield interrupt
