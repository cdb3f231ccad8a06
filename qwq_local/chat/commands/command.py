"""What a /command is: its name, its help, its handler and its completion, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwq_local.chat.events import ChatEvent, Completion
from qwq_local.chat.model import ChatModel
from qwq_local.chat.session import Session

Handler = Callable[[Session, str], Iterator[ChatEvent]]
"""Runs a command on what follows its name. Raises QwqError, which the chat shows."""

Complete = Callable[[Session, str], Iterator[Completion]]
"""Completes what follows the name and a space, up to the cursor; quick, for any thread."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    `arguments` is how /help writes what may follow the name, `help` its line there; `details` are further
    lines of /help NAME. A command whose backend lacks what it `needs` is not there: not listed, not offered.
    """

    name: str
    arguments: str
    help: str
    handler: Handler
    details: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    complete: Complete | None = None
    needs: Callable[[ChatModel], bool] | None = None

    @property
    def usage(self) -> str:
        """How it is written."""
        return f"/{self.name} {self.arguments}".rstrip()

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return (self.name, *self.aliases)
