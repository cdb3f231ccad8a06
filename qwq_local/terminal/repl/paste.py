"""Keys and pastes from a terminal, fast even for a paste of five megabytes. For POSIX terminals.

prompt_toolkit's own parser searches the whole paste again for every kilobyte that arrives, and makes one
key press of every character where the terminal does not mark pastes. Here a long run of text is one key
press.

A large paste is one character of the input, shown as `[pasted 214 lines]` and sent in full. The characters
are from a private area of Unicode and are removed from everything that is typed or pasted. So a marker is
deleted, moved over and undone as one character, and a marker that somebody types is only text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TextIO

from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress
from prompt_toolkit.keys import Keys

MAX_LINES = 20
"""A paste of fewer lines is shown as it is."""

MAX_CHARACTERS = 4000
"""A longer paste is shown as a marker."""

MAX_INPUT = 16_000
"""In an input longer than this, every paste is shown as a marker."""

_FIRST, _LAST = 0xF0000, 0xFFFFD
_MARKER = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_NOT_TEXT = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}\ud800-\udfff]")


class Pastes:
    """The large pastes of one session."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def take_in(self, pasted: str, length_before: int) -> str:
        """The text to insert for a paste, into an input that has `length_before` characters."""
        text = incoming(pasted)
        is_large = text.count("\n") >= MAX_LINES or len(text) > MAX_CHARACTERS
        if is_large or (len(text) > 1 and length_before + len(text) > MAX_INPUT):
            return self.marker(text)
        return text

    def marker(self, text: str) -> str:
        """A character that stands for the text; the text itself when there are too many."""
        if _FIRST + len(self._texts) > _LAST:
            return text
        self._texts.append(text)
        return chr(_FIRST + len(self._texts) - 1)

    def expand(self, text: str) -> str:
        """The text in full."""
        return _MARKER.sub(lambda match: self._text(match.group()), text)

    def shown(self, text: str) -> str:
        """The text with its markers written out."""
        return _MARKER.sub(lambda match: self.label(match.group()), text)

    def label(self, marker: str) -> str:
        """The text of a marker, such as `[pasted 214 lines]`."""
        text = self._text(marker)
        lines = text.count("\n") + (not text.endswith("\n"))
        if lines < 2:
            return f"[pasted {len(text):,} characters]"
        return f"[pasted {lines:,} lines]"

    def parts(self, text: str) -> list[str]:
        """Typed text and pasted text in turns, typed text first."""
        parts, end = [], 0
        for match in _MARKER.finditer(text):
            parts += [text[end : match.start()], self._text(match.group())]
            end = match.end()
        return [*parts, text[end:]]

    def joined(self, parts: list[str]) -> str:
        """The input that has these parts."""
        return "".join(
            self.marker(incoming(part)) if index % 2 else incoming(part) for index, part in enumerate(parts)
        )

    def _text(self, marker: str) -> str:
        index = ord(marker) - _FIRST
        return self._texts[index] if index < len(self._texts) else ""


def has_marker(text: str) -> bool:
    """Whether a character of the text stands for a paste."""
    return _MARKER.search(text) is not None


def incoming(text: str) -> str:
    """Text from outside with plain line ends, without surrogates and without the characters of pastes."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _NOT_TEXT.sub("\ufffd", text)


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
            continues = character in "[O;?<" or character.isdigit()
            self._is_idle = character != "\x1b" and (self._is_idle or not continues)
            self._input_parser.send(character)
            position += 1
            if self._in_bracketed_paste:
                self._is_idle = True
                return data[position:]
        return ""


class TerminalInput(Vt100Input):
    """A terminal's keys through the linear parser."""

    def __init__(self, stdin: TextIO) -> None:
        super().__init__(stdin)
        self.vt100_parser = PasteParser(lambda key: self._buffer.append(key))

    def read_keys(self) -> list[KeyPress]:
        """The keys that have arrived."""
        self.vt100_parser.feed(self.stdin_reader.read(READ_BYTES))
        keys, self._buffer = self._buffer, []
        return keys
