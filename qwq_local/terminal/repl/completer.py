"""prompt_toolkit's completions and suggestions out of a Talk's and the history's.

What is offered comes from the Talk: commands, files, models. It is asked in a thread; what it cannot read
offers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Offer
from prompt_toolkit.document import Document

from qwq_local.chat.events import Completion
from qwq_local.errors import QwqError
from qwq_local.terminal.repl.paste import incoming
from qwq_local.terminal.sanitize import drop_special, one_line

MAX_OFFERS = 200
"""Completions that are looked at: more than anybody reads."""

MEANING_CELLS = 60


class TalkCompleter(Completer):
    """Offers what may stand at the cursor."""

    def __init__(self, complete: Callable[[str], Sequence[Completion]]) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Offer]:
        """The offers for the text before the cursor, the likeliest first."""
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
