"""A command with commands of its own: its name and help in, the Typer application for them out."""

from __future__ import annotations

import typer


def command_group(name: str, help_text: str) -> typer.Typer:
    """An application whose callback runs when no command of it is given; errors keep their plain form."""
    return typer.Typer(
        name=name,
        help=help_text,
        invoke_without_command=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
