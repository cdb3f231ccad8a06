"""The keys of the chat and what they do.

EditorProcess keys are prompt_toolkit's own, those of Emacs and readline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from prompt_toolkit.filters import Condition, Filter, has_completions, is_searching
from prompt_toolkit.key_binding import (
    KeyBindings,
    KeyBindingsBase,
    KeyPress,
    KeyPressEvent,
    merge_key_bindings,
)
from prompt_toolkit.key_binding.bindings.auto_suggest import load_auto_suggest_bindings
from prompt_toolkit.key_binding.bindings.named_commands import get_by_name
from prompt_toolkit.keys import Keys

from qwq_local.chat.events import ThinkView
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.repl.input_line import InputLine, is_block_open
from qwq_local.terminal.repl.keyboard import RUN
from qwq_local.terminal.repl.paste import incoming
from qwq_local.terminal.repl.queue import EntryRunner
from qwq_local.terminal.repl.renderer import HINT_S, BottomArea
from qwq_local.terminal.repl.turn_view import TurnView

VIEW_HINT_S = 1.0


class ReplActions(Protocol):
    """What the hands need of the application."""

    def leave(self, status: int) -> None:
        """End the chat."""

    def edit_input(self) -> None:
        """Open the editor with what stands in the input line."""

    def redraw(self) -> None:
        """Draw the live rows and the input line anew."""

    def suspend(self) -> None:
        """Give the terminal back to the shell until the person returns."""


class KeyActions:
    """Does what keys ask for; `is_*` and `can_*` say which keys mean anything now."""

    def __init__(
        self,
        line: InputLine,
        conversing: EntryRunner,
        view: TurnView,
        bottom: BottomArea,
        screen: ReplActions,
        clock: Clock,
    ) -> None:
        self._line = line
        self._conversing = conversing
        self._view = view
        self._bottom = bottom
        self._screen = screen
        self._clock = clock
        self._leaves_until = 0.0

    @property
    def is_steering(self) -> bool:
        """Whether a sentence for the thinking is being typed."""
        return self._line.is_steering

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in the line that is being typed into."""
        return not (self._line.steering.text if self.is_steering else self._line.text)

    @property
    def can_take_back(self) -> bool:
        """Whether the line is empty and entries wait."""
        return not self.is_steering and self.is_empty and self._conversing.has_waiting

    def enter(self) -> None:
        """Send what was typed, take the completion that is marked, or begin a new line in an open block."""
        if self.is_steering:
            self.end_steering(self._line.steering.text)
        elif self._line.is_choosing:
            self._line.buffer.complete_state = None
        elif is_block_open(self._line.text):
            self.newline()
        elif self._line.text.strip():
            self._conversing.enter(self._line.take())

    def newline(self) -> None:
        """Begin a new line in the entry."""
        if not self.is_steering:
            self._line.buffer.insert_text("\n")

    def paste(self, text: str) -> None:
        """Put in what was pasted."""
        self._line.paste(text)

    def interrupt(self) -> None:
        """Stop what runs; else clear the line; else, the second time, leave."""
        if self.is_steering:
            self.end_steering()
        elif self._conversing.can_stop:
            came_back = self._conversing.stop()
            if came_back:
                self._line.put("\n\n".join(text for text in (came_back, self._line.text) if text))
        elif self._line.text:
            self._line.put("")
        elif self._clock() < self._leaves_until:
            self._screen.leave(0)
        else:
            self._leaves_until = self._clock() + HINT_S
            self._bottom.hint("Ctrl-C again leaves", HINT_S)

    def leave(self) -> None:
        """Leave; a turn that runs is stopped first."""
        self._screen.leave(0)

    def answer_now(self) -> None:
        """End the thinking and answer."""
        self._conversing.answer_now()

    def steer(self) -> None:
        """Pause the thinking and ask for a sentence."""
        if not self.is_steering and self._conversing.pause():
            self._line.steer(True)
            self._bottom.hint("Esc: go on without · Enter: put it into the thought", float("inf"))

    def end_steering(self, sentence: str = "") -> None:
        """Go on, with a sentence or without."""
        self._line.steer(False)
        self._bottom.end_hint()
        self._conversing.go_on(sentence)

    def change_view(self) -> None:
        """Show the thinking the next way, or open the last thought."""
        if self._view.is_thinking:
            view = self._view.cycle_view()
            is_later = self._view.is_full and view is not ThinkView.FULL
            self._bottom.hint(f"thinking: {view}{' from the next thought on' * is_later}", VIEW_HINT_S)
        else:
            self._conversing.look_up("/think last")

    def take_back(self) -> None:
        """Bring the entry that waits last back into the line."""
        entry = self._conversing.take_back()
        if entry is not None:
            self._line.put(entry)

    def complete(self) -> None:
        """Complete what stands before the cursor."""
        if not self.is_steering:
            self._line.complete()

    def close_menu(self) -> None:
        """Offer no completions for now; what was taken of them is taken back."""
        self._line.buffer.cancel_completion()

    def edit(self) -> None:
        """Edit the line in the editor."""
        if not self.is_steering:
            self._screen.edit_input()

    def redraw(self) -> None:
        """Draw everything anew."""
        self._screen.redraw()

    def suspend(self) -> None:
        """Let the shell have the terminal."""
        self._screen.suspend()


ESCAPE_S = 0.1
"""How long an Escape waits for the rest of a key: a terminal sends it at once."""

SEQUENCE_S = 0.5
"""How long Ctrl-X waits for its second half, which a person types."""


def waits_s(held: Sequence[KeyPress]) -> float:
    """Seconds that key presses wait for those that may follow them."""
    return ESCAPE_S if held and held[0].key is Keys.Escape else SEQUENCE_S


def bindings(hands: KeyActions) -> KeyBindingsBase:
    """The keys of the chat, before those that edit."""
    keys = KeyBindings()
    usual = ~is_searching
    can_take_back = Condition(lambda: hands.can_take_back) & usual
    is_steering = Condition(lambda: hands.is_steering)
    is_empty = Condition(lambda: hands.is_empty)

    def on(*sequence: Keys | str, does: Callable[[], None], when: Filter = usual) -> None:
        keys.add(*sequence, filter=when)(lambda _: does())

    on("enter", does=hands.enter)
    on("escape", "enter", does=hands.newline)
    on("c-j", does=hands.newline)
    on("c-c", does=hands.interrupt)
    on("c-d", does=hands.leave, when=is_empty & usual)
    on("c-g", does=hands.answer_now)
    on("c-s", does=hands.steer)
    on("c-t", does=hands.change_view)
    on("c-x", "c-e", does=hands.edit)
    on("c-i", does=hands.complete)
    on("c-l", does=hands.redraw)
    on("c-z", does=hands.suspend)
    on("up", does=hands.take_back, when=can_take_back)
    on("escape", does=hands.take_back, when=can_take_back)
    on("escape", does=hands.end_steering, when=is_steering)
    on("escape", does=hands.close_menu, when=has_completions)

    @keys.add(Keys.Any, filter=usual, save_before=lambda event: not event.is_repeat)
    def _insert(event: KeyPressEvent) -> None:
        if len(event.data) >= RUN or incoming(event.data) != event.data:
            hands.paste(event.data)
        elif not isinstance(event.key_sequence[0].key, Keys):  # a key without a meaning is no text
            get_by_name("self-insert").call(event)

    @keys.add(Keys.BracketedPaste, filter=usual)
    def _paste(event: KeyPressEvent) -> None:
        hands.paste(event.data)

    return merge_key_bindings([load_auto_suggest_bindings(), keys])
