"""Programs outside the chat: the clipboard's, and those that take the whole terminal, pager and editor.

Before pager and editor the input line is erased; afterwards it is drawn again, with everything that the
conversation said meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_toolkit.application import Application, in_terminal
from prompt_toolkit.application.current import set_app
from prompt_toolkit.input import Input

from qwq_local.chat.events import Page
from qwq_local.errors import QwqError
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.pager import Pager
from qwq_local.terminal.repl.renderer import QuietOutput

MAX_OSC_BYTES = 100_000
"""The longest text for a terminal, in bytes: several terminals cut or refuse longer ones."""

TIMEOUT_S = 3.0

# Since 3.3 tmux neither passes sequences on nor accepts OSC 52 by default; this command always works.
_TMUX = ["tmux", "load-buffer", "-w", "-"]
_INTO_TMUX = " to tmux and, if it may, to the clipboard"


@dataclass(frozen=True, slots=True)
class _Copied:
    """What was done, and the sequence to write to the terminal, if any."""

    line: str
    sequence: str = ""
    is_error: bool = False


def copy(text: str, what: str, environ: Mapping[str, str]) -> _Copied:
    """Put the text into the clipboard; `what` names it."""
    size = f"{len(text):,} characters"
    for command in _programs(environ):
        if _fed(command, text, environ):
            where = _INTO_TMUX if command is _TMUX else ""
            return _Copied(f"copied {what} ({size}){where}.")
    raw = text.encode("utf-8", "replace")
    if len(raw) > MAX_OSC_BYTES:
        fix = "Install wl-copy, xclip or pbcopy, or use /save."
        return _Copied(f"{what} ({size}) is too long for a terminal's clipboard. {fix}", is_error=True)
    sequence = f"\x1b]52;c;{base64.b64encode(raw).decode()}\x07"
    if environ.get("TMUX"):
        # A tmux before 3.2 passes on only what is in its own envelope, with each ESC doubled.
        sequence = "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    return _Copied(f"copied {what} ({size}) through the terminal, if it allows that.", sequence)


def _programs(environ: Mapping[str, str]) -> list[list[str]]:
    """The programs that reach the clipboard of this terminal's display."""
    commands = []
    if environ.get("WAYLAND_DISPLAY"):
        commands.append(["wl-copy"])
    if environ.get("DISPLAY"):
        commands += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    # Over a network, the clipboard of the machine that runs this program is not the user's.
    if not environ.get("SSH_CONNECTION"):
        if sys.platform == "darwin":
            commands.append(["pbcopy"])
        if environ.get("WSL_DISTRO_NAME"):
            commands.append(["clip.exe"])
    if environ.get("TMUX"):
        commands.append(_TMUX)
    return [command for command in commands if shutil.which(command[0], path=environ.get("PATH"))]


def _fed(command: list[str], text: str, environ: Mapping[str, str]) -> bool:
    """Whether the program took the text."""
    encoding = "utf-16-le" if command[0] == "clip.exe" else "utf-8"
    try:
        # xclip stays in the background to serve the clipboard: a pipe for its output would never end.
        result = subprocess.run(
            command,
            input=text.encode(encoding, "replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            env=dict(environ),
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


MAX_BYTES = 16 * 1024 * 1024
_USUAL = ("nano", "vim", "vi")


def editor_command(environ: Mapping[str, str]) -> list[str]:
    """The program and its arguments. Raises QwqError where there is none."""
    for variable in ("VISUAL", "EDITOR"):
        value = environ.get(variable, "").strip()
        if not value:
            continue
        try:
            command = shlex.split(value)
        except ValueError as error:
            raise QwqError(f"{variable}={value} cannot be read: {error}. Mend its quotes.") from None
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            raise QwqError(f"{variable}={value}: there is no program {command[0]}. Set it to your editor.")
        return command
    for name in _USUAL:
        if shutil.which(name, path=environ.get("PATH")):
            return [name]
    raise QwqError("no editor was found. Set EDITOR, for example EDITOR=nano.")


class EditorProcess:
    """One text in the editor. `run` waits for the editor; `end` ends it, from any thread."""

    def __init__(self, text: str, environ: Mapping[str, str]) -> None:
        self._text = text
        self._environ = environ
        self._command = editor_command(environ)
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> str | None:
        """Wait for the editor. Returns the saved text, or None if it was not saved. Raises QwqError."""
        with tempfile.TemporaryDirectory(prefix="qwq-") as folder:
            path = Path(folder) / "question.md"
            path.write_text(self._text, encoding="utf-8")
            before = path.stat().st_mtime_ns
            try:
                with subprocess.Popen([*self._command, str(path)], env=dict(self._environ)) as process:
                    self._process = process
                    status = process.wait()
            except OSError as error:
                raise QwqError(f"{self._command[0]} did not start: {error.strerror}.") from None
            if status:
                how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
                raise QwqError(f"{self._command[0]} {how}; nothing was changed.")
            return self._saved(path, before)

    def end(self) -> None:
        """Ask the editor to end."""
        if self._process is not None:
            self._process.terminate()

    def _saved(self, path: Path, before: int) -> str | None:
        try:
            stat = path.stat()
            if stat.st_size > MAX_BYTES:
                raise QwqError(f"the text has {stat.st_size:,} bytes, more than {MAX_BYTES:,}.")
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise QwqError(f"the text cannot be read any more: {error.strerror}.") from None
        if stat.st_mtime_ns == before and text == self._text:
            return None
        return text[:-1] if text.endswith("\n") else text


class Fullscreen:
    """Runs one program at a time; `is_open` while one runs."""

    def __init__(self, output: Output, environ: Mapping[str, str], source: Input, quiet: QuietOutput) -> None:
        self.is_open = False
        self._output = output
        self._environ = environ
        self._source = source
        self._quiet = quiet
        self._running: Pager | EditorProcess | None = None

    async def read(self, app: Application[Any], page: Page) -> None:
        """Show a page until the user leaves it; the caller has set `is_open`."""
        # An Escape that follows at once must not be taken for the start of a key of the chat.
        await asyncio.sleep(app.ttimeoutlen)
        async with self._away(app):
            pager = Pager(page, self._source, self._quiet, self._copied, self._output.has_color)
            self._running = pager
            await pager.run()

    async def edit(self, app: Application[Any], text: str) -> str | None:
        """Edit a text. Returns the saved text, or None if it was not saved. Raises QwqError."""
        self._running = editing = EditorProcess(text, self._environ)
        self.is_open = True
        async with self._away(app):
            return await asyncio.get_running_loop().run_in_executor(None, editing.run)

    def interrupt(self) -> None:
        """Ctrl-C as a signal: ends the pager. An editor gets the signal itself."""
        if isinstance(self._running, Pager):
            self._running.end()

    def end(self) -> None:
        """End the program that has the terminal."""
        if self._running:
            self._running.end()

    @asynccontextmanager
    async def _away(self, app: Application[Any]) -> AsyncIterator[None]:
        try:
            with set_app(app):
                async with in_terminal():
                    yield
        finally:
            self.is_open = False

    def _copied(self, text: str) -> str:
        copied = copy(text, "the page", self._environ)
        self._quiet.send(copied.sequence)
        return copied.line
