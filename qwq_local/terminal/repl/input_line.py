"""The input line: typing, pasting, completion, history search, and how it looks.

A large paste is one character of the text. While a sentence for the thinking is typed, a second line
takes the place of the first.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, ThreadedCompleter
from prompt_toolkit.completion import Completion as Offer
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_completions
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import History
from prompt_toolkit.layout import ConditionalContainer, Dimension, DynamicContainer, HSplit, Layout, Window
from prompt_toolkit.layout.controls import BufferControl
from prompt_toolkit.layout.menus import CompletionsMenuControl
from prompt_toolkit.layout.processors import (
    AppendAutoSuggestion,
    HighlightIncrementalSearchProcessor,
    HighlightSelectionProcessor,
    Processor,
    TabsProcessor,
    Transformation,
    TransformationInput,
)
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.styles import BaseStyle, Style
from prompt_toolkit.widgets import SearchToolbar

from qwq_local.chat.events import Completion
from qwq_local.errors import QwqError
from qwq_local.files import atomic_file, lock_open_file
from qwq_local.paths import make_private
from qwq_local.terminal.layout import TAB
from qwq_local.terminal.output import Output
from qwq_local.terminal.repl.paste import Pastes, has_marker, incoming
from qwq_local.terminal.sanitizer import drop_special, one_line

# The closing quotes are at the end of the first line that ends with them.
_BLOCK = re.compile(r'"""(.*?)"""[^\S\n]*(?:\n|\Z)', re.DOTALL)


def is_block_open(text: str) -> bool:
    """Whether Enter begins a new line, because a block between three quotes is open."""
    return text.startswith('"""') and not _BLOCK.match(text)


def block_content(text: str) -> str:
    """The text without the three quotes, where they are around the whole of it."""
    block = _BLOCK.match(text)
    return block[1].strip("\n") if block and not text[block.end() :].strip() else text


MAX_OFFERS = 200
"""The largest number of completions on offer."""

MEANING_CELLS = 60


class _TalkCompleter(Completer):
    """Offers completions at the cursor."""

    def __init__(self, complete: Callable[[str], Sequence[Completion]]) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Offer]:
        try:
            found = self._complete(document.text_before_cursor)
        except (QwqError, OSError, ValueError):
            return
        for completion in found[:MAX_OFFERS]:
            yield Offer(
                # A name with a line end or an escape sequence in it could not be entered.
                incoming(drop_special(completion.text)).replace("\n", " "),
                start_position=-completion.replaces,
                display=one_line(completion.text, MEANING_CELLS),
                display_meta=one_line(completion.meaning, MEANING_CELLS),
            )


MENU_ROWS = 6
STEER_CHARACTERS = 4000

STYLE: BaseStyle = Style.from_dict(
    {
        "prompt": "bold",
        "paste": "italic",
        "auto-suggestion": "noinherit dim",
        "selected": "noinherit reverse",
        "completion-menu": "noinherit",
        "completion-menu.completion": "noinherit",
        "completion-menu.completion.current": "noinherit reverse",
        "completion-menu.meta.completion": "noinherit dim",
        "completion-menu.meta.completion.current": "noinherit reverse",
        "incsearch": "noinherit underline",
        "incsearch.current": "noinherit reverse",
        "search-toolbar": "noinherit",
    }
)


MAX_ENTRIES = 5000
"""The number of entries in the file, at most."""

MAX_ENTRY_BYTES = 64 * 1024
"""The longest line in bytes; a longer entry is not written."""

MAX_BYTES = 16 * 1024 * 1024
"""Only this many bytes at the end of the file are read."""

_SLACK = 500


class HistoryFile:
    """Entries of earlier runs: a private file with one entry a line, shared by every `qwq chat`.

    A line is a JSON array in ASCII: typed text and pasted text in turns, typed text first. Lines that cannot
    be read, for example after a crash, are skipped. An entry is appended with one write, behind an empty line
    in case a crash cut the one before. A file that has grown too long is rewritten with the newest entries. A
    disk error loses history, nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[list[str]]:
        """Every entry as its parts, oldest first. Shortens a file that has grown too long."""
        entries: list[list[str]] = []
        with suppress(OSError, QwqError), self._open() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_BYTES))
            lines = b"".join(iter(lambda: file.read(1 << 20), b"")).split(b"\n")
            lines = [line for line in lines if line]
            newest = lines[-MAX_ENTRIES - _SLACK :]
            entries = [parts for line in newest if (parts := _parts(line)) is not None][-MAX_ENTRIES:]
            if len(lines) > MAX_ENTRIES + _SLACK or size > MAX_BYTES:
                with atomic_file(self._path, mode=0o600, sync=False) as new:
                    new.writelines(json.dumps(parts).encode() + b"\n" for parts in entries)
        return entries

    def append(self, parts: list[str]) -> None:
        """Append an entry, given as its parts."""
        line = json.dumps(parts).encode() + b"\n"
        if len(line) <= MAX_ENTRY_BYTES:
            with suppress(OSError, QwqError), self._open() as file:
                file.write(b"\n" + line)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, locked, open for reading and appending. It is created for its owner only."""
        make_private(self._path.parent)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a+b", buffering=0) as file:  # noqa: PTH123
                if not lock_open_file(descriptor, self._path, wait=True):
                    continue  # rewritten by another process while this one waited for the lock
                if os.name == "posix" and os.fstat(descriptor).st_mode & 0o077:
                    os.fchmod(descriptor, 0o600)
                yield file
                return


def _parts(line: bytes) -> list[str] | None:
    """The parts of a line, or None if it is not an entry."""
    if not 2 < len(line) <= MAX_ENTRY_BYTES:
        return None
    try:
        parts = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
        return parts
    return None


class _EntryHistory(History):
    """Entries of this run and of earlier ones, with pastes as markers."""

    def __init__(self, pastes: Pastes, path: Path | None) -> None:
        super().__init__()
        self._pastes = pastes
        self._file = HistoryFile(path) if path else None

    def load_history_strings(self) -> Iterable[str]:
        entries = self._file.load() if self._file else []
        return [self._pastes.joined(parts) for parts in reversed(entries)]

    def store_string(self, string: str) -> None:
        if self._file:
            self._file.append(self._pastes.parts(string))


class _MarkedPastes(Processor):
    """Shows the character of a paste as a marker."""

    def __init__(self, pastes: Pastes) -> None:
        self._pastes = pastes

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        """The line with its markers written out, and the new place of each character."""
        fragments = transformation_input.fragments
        if not any(has_marker(fragment[1]) for fragment in fragments):
            return Transformation(fragments)
        shown: StyleAndTextTuples = []
        places = [0]
        for fragment in explode_text_fragments(fragments):
            style, character = fragment[0], fragment[1]
            marked = has_marker(character)
            text = self._pastes.label(character) if marked else character
            shown.append((f"{style} class:paste" if marked else style, text))
            places.append(places[-1] + len(text))
        end = len(places) - 1

        def to_display(source: int) -> int:
            return places[source] if source <= end else places[end] + source - end

        def to_source(display: int) -> int:
            return next((index - 1 for index, place in enumerate(places) if place > display), end)

        return Transformation(shown, to_display, to_source)


class InputLine:
    """The input line and its layout."""

    def __init__(
        self,
        output: Output,
        pastes: Pastes,
        history: Path | None,
        complete: Callable[[str], Sequence[Completion]],
    ) -> None:
        self.is_steering = False
        self._output = output
        self._pastes = pastes
        self.buffer = Buffer(
            name="input",
            multiline=True,
            history=_EntryHistory(pastes, history),
            auto_suggest=AutoSuggestFromHistory(),
            completer=ThreadedCompleter(_TalkCompleter(complete)),
            complete_while_typing=Condition(self._is_command),
        )
        self.steering = Buffer(name="steer", multiline=False)
        self._search = SearchToolbar(ignore_case=True, backward_search_prompt="search: ")
        self._windows = self._window(self.buffer, "❯ "), self._window(self.steering, "steer ❯ ")
        self.layout = self._layout()

    @property
    def text(self) -> str:
        """The text of the line, with each large paste as one character."""
        return self.buffer.text

    @property
    def is_choosing(self) -> bool:
        """Whether one of several completions is marked."""
        state = self.buffer.complete_state
        return state is not None and state.complete_index is not None and len(state.completions) > 1

    def put(self, text: str) -> None:
        """Replace the text of the line. Undo restores the old one."""
        self.buffer.save_to_undo_stack()
        # This is a new entry, even if an old one was shown.
        self.buffer.history_forward(count=sys.maxsize)
        self.buffer.document = Document(text)

    def take(self) -> str:
        """Empty the line. Returns its text, which goes into the history."""
        text = self.buffer.text
        self.buffer.append_to_history()
        self.buffer.reset()
        return text

    def paste(self, pasted: str) -> None:
        """Insert a paste."""
        if self.is_steering:
            self.steering.insert_text(" ".join(incoming(pasted[:STEER_CHARACTERS]).split()))
            return
        self.buffer.save_to_undo_stack()
        self.buffer.insert_text(self._pastes.take_in(pasted, len(self.buffer.text)))

    def complete(self) -> None:
        """Offer completions; take the only one, or mark the next one."""
        state = self.buffer.complete_state
        if self.is_steering:
            return
        if state is None:
            self.buffer.start_completion(insert_common_part=True)
        elif len(state.completions) == 1:
            self.buffer.go_to_completion(0)
            self.buffer.complete_state = None
        else:
            self.buffer.complete_next()

    def steer(self, is_on: bool) -> None:
        """Show the empty line for a sentence, or the usual line as it was."""
        self.is_steering = is_on
        self.steering.reset()
        self.layout.focus(self._windows[is_on])

    def _height(self) -> Dimension:
        """A third of the window, but three rows where there is room."""
        window_rows = self._output.size()[1]
        return Dimension(min=1, max=max(1, window_rows // 3, min(3, window_rows - 2)))

    def _is_command(self) -> bool:
        return self.buffer.text.startswith("/") and "\n" not in self.buffer.text

    def _window(self, buffer: Buffer, prompt: str) -> Window:
        control = BufferControl(
            buffer,
            input_processors=[
                HighlightIncrementalSearchProcessor(),
                HighlightSelectionProcessor(),
                AppendAutoSuggestion(),
                TabsProcessor(tabstop=TAB, char1=" ", char2=" "),
                _MarkedPastes(self._pastes),
            ],
            include_default_input_processors=False,
            search_buffer_control=self._search.control if buffer is self.buffer else None,
            preview_search=True,
        )
        return Window(
            control,
            height=self._height,
            wrap_lines=True,
            get_line_prefix=lambda line, wraps: [("class:prompt", "  " if line or wraps else prompt)],
            dont_extend_height=True,
        )

    def _layout(self) -> Layout:
        menu = Window(
            CompletionsMenuControl(), height=Dimension(min=1, max=MENU_ROWS), dont_extend_height=True
        )
        return Layout(
            HSplit(
                [
                    DynamicContainer(lambda: self._windows[self.is_steering]),
                    ConditionalContainer(menu, has_completions),
                    self._search,
                ]
            ),
            focused_element=self._windows[0],
        )
