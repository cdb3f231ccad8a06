"""Keys from a terminal, fast even for a paste of five megabytes. For POSIX terminals.

prompt_toolkit's own parser searches the whole paste again for every kilobyte that arrives, and makes one
key press of every character where the terminal does not mark pastes. Here a long run of text is one key
press.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TextIO

from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

READ_BYTES = 65536
RUN = 32
"""This many characters that arrive at once are one key press: more than anybody types."""

_PASTE_END = "\x1b[201~"
_RUN = re.compile(rf"[^\x00-\x1f\x7f]{{{RUN},}}")


class PasteParser(Vt100Parser):
    """prompt_toolkit's parser, with a cost linear in the paste."""

    def __init__(self, feed_key_callback: Callable[[KeyPress], None]) -> None:
        self._pasted: list[str] = []
        self._tail = ""
        self._is_idle = True
        super().__init__(feed_key_callback)

    def feed(self, data: str) -> None:
        """Take the next characters."""
        while data:
            data = self._feed_paste(data) if self._in_bracketed_paste else self._feed_keys(data)

    def _feed_paste(self, data: str) -> str:
        """Collect a paste. Returns the data after its end."""
        # The end mark may be cut: search the end of the last piece, too.
        seen = self._tail + data
        end = seen.find(_PASTE_END)
        if end < 0:
            self._pasted.append(data)
            self._tail = seen[-len(_PASTE_END) + 1 :]
            return ""
        rest = seen[end + len(_PASTE_END) :]
        text = "".join(self._pasted) + data[: len(data) - len(rest)]
        self._in_bracketed_paste = False
        self._pasted, self._tail = [], ""
        self.feed_key_callback(KeyPress(Keys.BracketedPaste, text[: -len(_PASTE_END)]))
        return rest

    def _feed_keys(self, data: str) -> str:
        """Make key presses until a paste begins. Returns the data of the paste."""
        position = 0
        while position < len(data):
            if self._is_idle and (run := _RUN.match(data, position)):
                self.feed_key_callback(KeyPress(run.group()[0], run.group()))
                position = run.end()
                continue
            character = data[position]
            # Inside a sequence there is no text; an unknown sequence ends by itself.
            self._is_idle = character != "\x1b" and (self._is_idle or not self._waits(character))
            self._input_parser.send(character)
            position += 1
            if self._in_bracketed_paste:
                self._is_idle = True
                return data[position:]
        return ""

    @staticmethod
    def _waits(character: str) -> bool:
        """Whether a sequence may continue after the character."""
        return character in "[O;?<" or character.isdigit()


class TerminalInput(Vt100Input):
    """A terminal's keys through the linear parser."""

    def __init__(self, stdin: TextIO) -> None:
        super().__init__(stdin)
        self.vt100_parser = PasteParser(self._buffer_key)

    def read_keys(self) -> list[KeyPress]:
        """The keys that have arrived."""
        self.vt100_parser.feed(self.stdin_reader.read(READ_BYTES))
        keys, self._buffer = self._buffer, []
        return keys

    def _buffer_key(self, key: KeyPress) -> None:
        self._buffer.append(key)
