"""`qwq plan`: what would run here, or on another computer, before anything is loaded or bought."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwq_local.cli import completing
from qwq_local.cli.ask import DEFAULT_PROFILE
from qwq_local.cli.options import Settings, Task
from qwq_local.profiles import DEFAULT_MODEL


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As for --model of `qwq ask`; qwq-32b:TYPE needs no file.",
            autocompletion=completing.models,
        ),
    ] = DEFAULT_MODEL,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="A text file to plan for; may be repeated."),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="NAME|FILE.toml",
            help="Another computer: a name, or its file.",
            autocompletion=completing.machines,
        ),
    ] = None,
    profile: Task = DEFAULT_PROFILE,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one object of JSON.")] = False,
) -> int:
    """Show what fits: context against KV type, what fills the memory, and what would be chosen."""
    from qwq_local.cli.planning import Asked, plan

    return plan(Asked(model, tuple(files or ()), machine, profile, tuple(settings or ()), as_json))
