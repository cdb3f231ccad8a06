"""What takes the terminal for itself for a while: the pager and the editor; and the clipboard.

Comes in: a page or a text. Goes out: what the person made of it. The input line is erased before and drawn
again after; what the conversation says meanwhile is drawn then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from prompt_toolkit.application import Application, in_terminal
from prompt_toolkit.application.current import set_app
from prompt_toolkit.input import Input

from qwq_local.chat.events import Page
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.clipboard import Copied, copy
from qwq_local.terminal.repl.editor import Editing
from qwq_local.terminal.repl.pager import Pager
from qwq_local.terminal.repl.renderer import QuietOutput


class Elsewhere:
    """Shows one thing at a time; `is_open` while it does."""

    def __init__(self, output: Output, environ: Mapping[str, str], source: Input, quiet: QuietOutput) -> None:
        self.is_open = False
        self._output = output
        self._environ = environ
        self._source = source
        self._quiet = quiet
        self._pager: Pager | None = None
        self._editing: Editing | None = None

    def read(self, app: Application[Any], page: Page) -> Coroutine[Any, Any, None]:
        """Show a page until the person leaves it; nothing else is shown from the call on."""
        self.is_open = True
        return self._read(app, page)

    def edit(self, app: Application[Any], text: str) -> Coroutine[Any, Any, str | None]:
        """The text as the person saved it; None when it was not saved. Raises QwqError."""
        editing = Editing(text, self._environ)
        self.is_open = True
        return self._edit(app, editing)

    async def _read(self, app: Application[Any], page: Page) -> None:
        # An Escape that follows at once must not end in the chat's wait for the rest of a key.
        await asyncio.sleep(app.ttimeoutlen)
        async with self._away(app):
            self._pager = Pager(page, self._source, self._quiet, self._copied, self._output.has_color)
            try:
                await self._pager.run()
            finally:
                self._pager = None

    async def _edit(self, app: Application[Any], editing: Editing) -> str | None:
        self._editing = editing
        try:
            async with self._away(app):
                return await asyncio.get_running_loop().run_in_executor(None, editing.run)
        finally:
            self._editing = None

    async def copy(self, text: str, what: str) -> Copied:
        """Put a text into the clipboard; what was done."""
        loop = asyncio.get_running_loop()
        copied = await loop.run_in_executor(None, copy, text, what, self._environ)
        self._send(copied)
        return copied

    def interrupt(self) -> None:
        """A Ctrl-C that came as a signal: ends the pager; an editor has had it, too."""
        if self._pager:
            self._pager.end()

    def end(self) -> None:
        """Give the terminal back."""
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
        self._send(copied)
        return copied.line

    def _send(self, copied: Copied) -> None:
        if copied.sequence:
            self._quiet.write_raw(copied.sequence)
            self._quiet.flush()
