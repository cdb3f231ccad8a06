"""The process's surroundings as one value, so that tests pass in their own."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, TextIO


@dataclass(frozen=True, slots=True)
class Environment:
    """Streams and variables; `stdout` carries the answer alone, `stderr` everything else."""

    stdin: BinaryIO | None
    stdout: TextIO
    stderr: TextIO
    variables: Mapping[str, str]

    @property
    def stdin_is_terminal(self) -> bool:
        """Whether a person types into standard input; a closed one counts as no input, not as a person."""
        return self.stdin is not None and self.stdin.isatty()


def process_environment() -> Environment:
    """The real surroundings; text that goes into a pipe or a file is UTF-8 whatever the locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    stdin = sys.stdin.buffer if sys.stdin is not None else None
    return Environment(stdin, sys.stdout, sys.stderr, os.environ)
