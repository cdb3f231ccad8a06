"""A text stream and what is known about the terminal behind it: its size, and what it can draw.

Uses the standard library only. Tests build an Output by hand, with a fake stream and a size of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

Size = Callable[[], tuple[int, int]]
"""Returns (columns, rows) now. Called for every frame, since a window can be resized."""


def _unknown_size() -> tuple[int, int]:
    return 80, 24


@dataclass(frozen=True, slots=True)
class Output:
    """One stream. `reflows`: the terminal wraps old lines again when its window gets narrower."""

    stream: TextIO
    is_terminal: bool = False
    is_dumb: bool = False
    has_color: bool = True
    reflows: bool = True
    size: Size = _unknown_size

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str]) -> Output:
        """Describes `stream`, by isatty(), TERM, NO_COLOR and the few terminals that never reflow."""
        term = environ.get("TERM", "")
        screen_without_tmux = term.startswith("screen") and "TMUX" not in environ
        return cls(
            stream=stream,
            is_terminal=_isatty(stream),
            is_dumb=term in ("dumb", "unknown"),
            has_color=not environ.get("NO_COLOR"),
            reflows=not (
                "XTERM_VERSION" in environ or term.startswith(("linux", "vt")) or screen_without_tmux
            ),
            size=lambda: _terminal_size(stream),
        )

    @property
    def is_live(self) -> bool:
        """Whether lines can be drawn over: a terminal that understands cursor movement."""
        return self.is_terminal and not self.is_dumb

    def write(self, text: str) -> None:
        """Write and flush, so that two streams on one terminal keep their order."""
        if text:
            self.stream.write(text)
            self.stream.flush()


def _isatty(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def _terminal_size(stream: TextIO) -> tuple[int, int]:
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return _unknown_size()
    # A serial line or a bare pseudo-terminal may say 0 x 0.
    return columns or 80, rows or 24
