"""The keys of the chat and what they do.

Editing keys are prompt_toolkit's own, those of Emacs and readline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from qwq_local.terminal.repl.paste import RUN, incoming
from qwq_local.terminal.repl.queue import EntryQueue
from qwq_local.terminal.repl.renderer import HINT_S, BottomArea
from qwq_local.terminal.repl.turn_view import TurnView

VIEW_HINT_S = 1.0


class KeyActions:
    """What keys do. `is_*` and `can_*` say which keys have a meaning now."""

    def __init__(
        self,
        line: InputLine,
        queue: EntryQueue,
        view: TurnView,
        bottom: BottomArea,
        clock: Clock,
        leave: Callable[[int], None],
        edit_input: Callable[[], None],
    ) -> None:
        self.line = line
        self.queue = queue
        self.leave = leave
        self._edit_input = edit_input
        self._view = view
        self._bottom = bottom
        self._clock = clock
        self._leaves_until = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether the line that is being typed is empty."""
        return not (self.line.steering.text if self.line.is_steering else self.line.text)

    @property
    def can_take_back(self) -> bool:
        """Whether the line is empty and entries wait."""
        return not self.line.is_steering and self.is_empty and bool(self.queue.waiting)

    def enter(self) -> None:
        """Send the entry, take the marked completion, or begin a new line in an open block."""
        if self.line.is_steering:
            self.end_steering(self.line.steering.text)
        elif self.line.is_choosing:
            self.line.buffer.complete_state = None
        elif is_block_open(self.line.text):
            self.newline()
        elif self.line.text.strip():
            self.queue.enter(self.line.take())

    def newline(self) -> None:
        """Begin a new line in the entry."""
        if not self.line.is_steering:
            self.line.buffer.insert_text("\n")

    def interrupt(self) -> None:
        """Stop what runs; else clear the line; else, the second time, leave."""
        if self.line.is_steering:
            self.end_steering()
        elif self.queue.can_stop:
            if waited := self.queue.stop():
                self.line.put("\n\n".join(filter(None, (waited, self.line.text))))
        elif self.line.text:
            self.line.put("")
        elif self._clock() < self._leaves_until:
            self.leave(0)
        else:
            self._leaves_until = self._clock() + HINT_S
            self._bottom.hint("Ctrl-C again leaves", HINT_S)

    def steer(self) -> None:
        """Pause the thinking and ask for a sentence."""
        if not self.line.is_steering and self.queue.pause():
            self.line.steer(True)
            self._bottom.hint("Esc: go on without · Enter: put it into the thought", float("inf"))

    def end_steering(self, sentence: str = "") -> None:
        """Continue the thinking, with a sentence or without."""
        self.line.steer(False)
        self._bottom.end_hint()
        self.queue.resume(sentence)

    def change_view(self) -> None:
        """Show the thinking in the next view, or open the last thought."""
        if self._view.is_thinking:
            view = self._view.cycle_view()
            is_later = self._view.is_full and view is not ThinkView.FULL
            self._bottom.hint(f"thinking: {view}{' from the next thought on' * is_later}", VIEW_HINT_S)
        else:
            self.queue.look_up("/think last")

    def take_back(self) -> None:
        """Move the entry that waits last back into the line."""
        self.line.put(self.queue.waiting.pop())

    def edit(self) -> None:
        """Edit the line in the editor."""
        if not self.line.is_steering:
            self._edit_input()


ESCAPE_S = 0.1
"""How long an Escape waits for the rest of a key: a terminal sends it at once."""

SEQUENCE_S = 0.5
"""How long Ctrl-X waits for its second half, which a person types."""


def waits_s(held: Sequence[KeyPress]) -> float:
    """Seconds that key presses wait for the rest of a sequence."""
    return ESCAPE_S if held and held[0].key is Keys.Escape else SEQUENCE_S


def bindings(actions: KeyActions) -> KeyBindingsBase:
    """The keys of the chat; they go before the keys that edit."""
    keys = KeyBindings()
    usual = ~is_searching
    can_take_back = Condition(lambda: actions.can_take_back) & usual
    is_steering = Condition(lambda: actions.line.is_steering)
    is_empty = Condition(lambda: actions.is_empty)

    def on(*sequence: Keys | str, does: Callable[[], None], when: Filter = usual) -> None:
        keys.add(*sequence, filter=when)(lambda _: does())

    on("enter", does=actions.enter)
    on("escape", "enter", does=actions.newline)
    on("c-j", does=actions.newline)
    on("c-c", does=actions.interrupt)
    on("c-d", does=lambda: actions.leave(0), when=is_empty & usual)
    on("c-g", does=actions.queue.answer_now)
    on("c-s", does=actions.steer)
    on("c-t", does=actions.change_view)
    on("c-x", "c-e", does=actions.edit)
    on("c-i", does=actions.line.complete)
    on("up", does=actions.take_back, when=can_take_back)
    on("escape", does=actions.take_back, when=can_take_back)
    on("escape", does=actions.end_steering, when=is_steering)
    on("escape", does=actions.line.buffer.cancel_completion, when=has_completions)

    @keys.add("c-l", filter=usual)
    def _redraw(event: KeyPressEvent) -> None:
        event.app.renderer.clear()
        event.app.invalidate()

    @keys.add("c-z", filter=usual)
    def _suspend(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    @keys.add(Keys.Any, filter=usual, save_before=lambda event: not event.is_repeat)
    def _insert(event: KeyPressEvent) -> None:
        if len(event.data) >= RUN or incoming(event.data) != event.data:
            actions.line.paste(event.data)
        elif not isinstance(event.key_sequence[0].key, Keys):  # a key without a meaning inserts nothing
            get_by_name("self-insert").call(event)

    @keys.add(Keys.BracketedPaste, filter=usual)
    def _paste(event: KeyPressEvent) -> None:
        actions.line.paste(event.data)

    return merge_key_bindings([load_auto_suggest_bindings(), keys])
