"""Runs `qwq`: in this process, in its own process with pipes, or on a pseudo-terminal."""

from __future__ import annotations

import errno
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

import pyte

from qwq_local.cli.environment import Environment
from qwq_local.cli.main import main
from qwq_local.errors import ExitStatus
from tests.emulator import Emulator

ROOT = Path(__file__).parent.parent
QWQ = (sys.executable, "-m", "qwq_local")
TIMEOUT_S = 120


def environment(cache: Path, **changes: str) -> dict[str, str]:
    """The environment of a `qwq` with its own cache that imports this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QWQ_", "HF_", "NO_COLOR"))}
    own = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'convert'}",
        "QWQ_CACHE_DIR": str(cache),
        "QWQ_CONFIG_DIR": str(cache / "config"),
        "QWQ_DATA_DIR": str(cache / "data"),
        "HF_HOME": str(cache / "huggingface"),
        "TERM": "xterm-256color",
    }
    return {**kept, **own, **changes}


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of a finished process."""

    status: int
    stdout: str
    stderr: str


def qwq(cache: Path, *arguments: str, stdin: bytes | None = None, **variables: str) -> Ran:
    """Run `qwq` to its end in its own process; no `stdin` means a closed one."""
    result = subprocess.run(
        [*QWQ, *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env=environment(cache, **variables),
        timeout=TIMEOUT_S,
    )
    return Ran(result.returncode, result.stdout.decode(), result.stderr.decode())


class InterruptingStream(io.StringIO):
    """A stream that presses Ctrl-C when the marker has been written `times` times."""

    def __init__(self, marker: str, times: int = 1) -> None:
        super().__init__()
        self._marker = marker
        self._left = times

    def write(self, text: str) -> int:
        n_written = super().write(text)
        if self._marker in text:
            self._left -= 1
            if self._left == 0:
                signal.raise_signal(signal.SIGINT)
        return n_written


class ClosingStream(io.StringIO):
    """A stream whose reader closes it after the first `n_lines`."""

    def __init__(self, n_lines: int) -> None:
        super().__init__()
        self._left = n_lines

    def write(self, text: str) -> int:
        if self._left == 0:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        self._left -= 1
        return super().write(text)


def qwq_here(
    cache: Path,
    *arguments: str,
    stdin: bytes | None = None,
    stdout: io.StringIO | None = None,
    **variables: str,
) -> Ran:
    """Run `qwq` to its end in this process, which is much faster: Python and llama.cpp are loaded already.

    For the commands in cli/flags.py, and for the help and usage errors of all commands. What C code prints,
    signals and closed pipes need a process: see `qwq`.
    """
    out, err = stdout or io.StringIO(), io.StringIO()
    own = Environment(None if stdin is None else io.BytesIO(stdin), out, err, environment(cache, **variables))
    with TemporaryFile("w+", encoding="utf-8") as help_text:
        with redirect_stdout(help_text), redirect_stderr(err):
            status = main(arguments, own)
        if status != ExitStatus.READER_GONE:  # then the file is the null device
            help_text.seek(0)
            out.write(help_text.read())
    return Ran(status, out.getvalue(), err.getvalue())


@dataclass
class Terminal:
    """A `qwq` on a pseudo-terminal, its screen kept by a terminal emulator."""

    arguments: Sequence[str]
    variables: Mapping[str, str]
    columns: int = 80
    rows: int = 24
    stdout: int | None = None
    program: Sequence[str] = QWQ
    cwd: Path | None = None
    raw: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> Terminal:
        self.screen = Emulator(self.columns, self.rows, history=10_000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self._own, theirs = pty.openpty()
        _resize(theirs, self.columns, self.rows)
        self.process = subprocess.Popen(
            [*self.program, *self.arguments],
            stdin=theirs,
            stdout=theirs if self.stdout is None else self.stdout,
            stderr=theirs,
            env=dict(self.variables),
            cwd=self.cwd,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._own)

    def read_until(self, condition: Callable[[str], bool]) -> str:
        """Feed the screen until its text meets the condition; fails if it never does."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(self.text):
            if not self._read(deadline):
                if condition(self.text):
                    break
                raise AssertionError(f"ended or timed out without it; the screen:\n{self.text}")
        return self.text

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Feed the screen until the condition holds; cheaper than `read_until` after thousands of lines."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if not self._read(deadline) and not condition():
                raise AssertionError(f"ended or timed out without it; the screen:\n{self.visible}")

    def type(self, keys: str) -> None:
        """Press keys or paste any amount of text; output is read meanwhile."""
        data = keys.encode()
        os.set_blocking(self._own, False)
        try:
            while data:
                ready, writable, _ = select.select([self._own], [self._own], [], TIMEOUT_S)
                if ready:
                    self._read(time.monotonic() + TIMEOUT_S)
                elif writable:
                    data = data[os.write(self._own, data[:4096]) :]
                else:
                    raise AssertionError(f"the program takes no more keys; the screen:\n{self.visible}")
        finally:
            os.set_blocking(self._own, True)

    def resize(self, columns: int, rows: int) -> None:
        """Change the window, as a mouse does; the program gets a signal."""
        self.columns, self.rows = columns, rows
        self.screen.resize(rows, columns)
        _resize(self._own, columns, rows)

    def read_to_end(self) -> int:
        """Feed the screen until the process ends; its exit status."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read(deadline):
            pass
        return self.process.wait(timeout=TIMEOUT_S)

    def interrupt(self) -> float:
        """Send Ctrl-C as the terminal does; returns the time of sending."""
        os.write(self._own, b"\x03")
        return time.monotonic()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self.process.send_signal(number)

    @property
    def visible(self) -> str:
        """The screen alone, trailing blanks cut."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def text(self) -> str:
        """Scrollback and screen, trailing blanks cut."""
        lines = ["".join(c.data for c in _cells(row, self.columns)) for row in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*lines, *self.screen.display]).rstrip()

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._own], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            raw = os.read(self._own, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.raw += raw
        self._stream.feed(raw)
        return bool(raw)


def _cells(row: Mapping[int, pyte.screens.Char], columns: int) -> list[pyte.screens.Char]:
    return [row[column] for column in range(columns)]


def _take_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _resize(descriptor: int, columns: int, rows: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
