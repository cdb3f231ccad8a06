"""Which key does what.

Comes in: what keys can do. Goes out: prompt_toolkit's key bindings. Editing keys are
prompt_toolkit's own, those of Emacs and readline.
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

from qwq_local.terminal.repl.hands import Hands
from qwq_local.terminal.repl.input import RUN
from qwq_local.terminal.repl.paste import incoming

ESCAPE_S = 0.1
"""How long an Escape waits for the rest of a key: a terminal sends it at once."""

SEQUENCE_S = 0.5
"""How long Ctrl-X waits for its second half, which a person types."""


def waits_s(held: Sequence[KeyPress]) -> float:
    """Seconds that key presses wait for those that may follow them."""
    return ESCAPE_S if held and held[0].key is Keys.Escape else SEQUENCE_S


def bindings(hands: Hands) -> KeyBindingsBase:
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
