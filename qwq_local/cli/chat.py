"""`qwq chat`: a conversation in the terminal, thinking apart from the answers, every turn kept.

Flags in, exit status out. What is shown is decided by terminal/; what lines mean by chat/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwq_local.cli.options import ModelIfGiven, Seed, Settings, TaskIfGiven, Verbose

DEFAULT_PROFILE = "chat"

Think = Literal["off", "excerpt", "tail", "full"]


def command(
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "-f", metavar="FILE", help="A text file for the first question; may be repeated."
        ),
    ] = None,
    goes_on: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME|ID", help="Go on with a conversation: see `qwq history`.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    model: ModelIfGiven = None,
    profile: TaskIfGiven = None,
    settings: Settings = None,
    seed: Seed = None,
    think: Annotated[
        Think | None, typer.Option(help="How the thinking is shown while it comes; Ctrl-T changes it.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Write nothing to disk.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan for the first question and stop.")
    ] = False,
    verbose: Verbose = False,
) -> int:
    """Talk with QwQ: read, fold, end or steer its thinking; every conversation can be gone on with.

    /help lists the commands. In pipes each line is a question and stdout carries the answers alone.
    """
    from qwq_local.cli.chatting import Asked, chat

    asked = Asked(
        files=tuple(files or ()),
        goes_on=goes_on,
        resume=resume,
        system=system,
        model=model,
        profile=profile,
        settings=tuple(settings or ()),
        seed=seed,
        think=think,
        private=private,
        dry_run=dry_run,
        verbose=verbose,
    )
    return chat(asked)
