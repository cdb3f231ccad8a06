"""Programs that take the whole terminal for a while: the pager and the user's editor.

The input line is erased before and drawn again afterwards, with everything that the conversation said
meanwhile.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prompt_toolkit.application import Application, in_terminal
from prompt_toolkit.application.current import set_app
from prompt_toolkit.input import Input

from qwq_local.chat.events import Page
from qwq_local.errors import QwqError
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.clipboard import copy
from qwq_local.terminal.repl.pager import Pager
from qwq_local.terminal.repl.renderer import QuietOutput

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
        self._pager: Pager | None = None
        self._editing: EditorProcess | None = None

    def read(self, app: Application[Any], page: Page) -> Coroutine[Any, Any, None]:
        """Show a page until the user leaves it. `is_open` is true from the call on."""
        self.is_open = True
        return self._read(app, page)

    def edit(self, app: Application[Any], text: str) -> Coroutine[Any, Any, str | None]:
        """Edit a text. Returns the saved text, or None if it was not saved. Raises QwqError."""
        editing = EditorProcess(text, self._environ)
        self.is_open = True
        return self._edit(app, editing)

    async def _read(self, app: Application[Any], page: Page) -> None:
        # An Escape that follows at once must not be taken for the start of a key of the chat.
        await asyncio.sleep(app.ttimeoutlen)
        async with self._away(app):
            self._pager = Pager(page, self._source, self._quiet, self._copied, self._output.has_color)
            try:
                await self._pager.run()
            finally:
                self._pager = None

    async def _edit(self, app: Application[Any], editing: EditorProcess) -> str | None:
        self._editing = editing
        try:
            async with self._away(app):
                return await asyncio.get_running_loop().run_in_executor(None, editing.run)
        finally:
            self._editing = None

    def interrupt(self) -> None:
        """Ctrl-C as a signal: ends the pager. An editor gets the signal itself."""
        if self._pager:
            self._pager.end()

    def end(self) -> None:
        """End the program that has the terminal."""
        self.interrupt()
        if self._editing:
            self._editing.end()

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
