"""A text through the person's own editor: text in, the changed text out.

The editor is VISUAL, EDITOR, or the first of a few that is there. The text lies in a folder that only its
owner can enter, and is gone afterwards. Runs in a thread; the terminal is the editor's meanwhile.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qwq_local.errors import QwqError

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


class Editing:
    """One text in the editor. `run` waits for it; `end` ends it, from any thread."""

    def __init__(self, text: str, environ: Mapping[str, str]) -> None:
        self._text = text
        self._environ = environ
        self._command = editor_command(environ)
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> str | None:
        """The text as it was saved; None when it was not. Raises QwqError."""
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
