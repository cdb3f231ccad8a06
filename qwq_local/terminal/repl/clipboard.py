"""Copies text to the clipboard, by the platform's program or by the terminal's OSC 52 sequence."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

MAX_OSC_BYTES = 100_000
"""The longest text for a terminal, in bytes: several terminals cut or refuse longer ones."""

TIMEOUT_S = 3.0

# Since 3.3 tmux neither passes sequences on nor accepts OSC 52 by default; this command always works.
_TMUX = ["tmux", "load-buffer", "-w", "-"]
_INTO_TMUX = " to tmux and, if it may, to the clipboard"


@dataclass(frozen=True, slots=True)
class Copied:
    """What was done, and the sequence to write to the terminal, if any."""

    line: str
    sequence: str = ""
    is_error: bool = False


def copy(text: str, what: str, environ: Mapping[str, str]) -> Copied:
    """Put the text into the clipboard; `what` names it."""
    size = f"{len(text):,} characters"
    for command in _programs(environ):
        if _fed(command, text, environ):
            where = _INTO_TMUX if command is _TMUX else ""
            return Copied(f"copied {what} ({size}){where}.")
    raw = text.encode("utf-8", "replace")
    if len(raw) > MAX_OSC_BYTES:
        fix = "Install wl-copy, xclip or pbcopy, or use /save."
        return Copied(f"{what} ({size}) is too long for a terminal's clipboard. {fix}", is_error=True)
    sequence = f"\x1b]52;c;{base64.b64encode(raw).decode()}\x07"
    if environ.get("TMUX"):
        # A tmux before 3.2 passes on only what is in its own envelope, with each ESC doubled.
        sequence = "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    return Copied(f"copied {what} ({size}) through the terminal, if it allows that.", sequence)


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
