"""`qwq ask`: one question from files, standard input and the argument; the answer alone on stdout.

Flags in, exit status out. What is shown where is decided by terminal/; how text is made by the backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwq_local.cli import completing
from qwq_local.cli.options import Model, Seed, Settings, Task, Verbose
from qwq_local.profiles import DEFAULT_MODEL

DEFAULT_PROFILE = "chat"


Think = Literal["show", "hide"]


def command(
    question: Annotated[
        str,
        typer.Argument(metavar="QUESTION", help="The question; it comes after files and standard input."),
    ] = "",
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="A text file to read first; may be repeated."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    model: Model = DEFAULT_MODEL,
    profile: Task = DEFAULT_PROFILE,
    settings: Settings = None,
    seed: Seed = None,
    think: Annotated[
        Think | None, typer.Option(help="Show the thinking on stderr or hide it; shown on a terminal.")
    ] = None,
    think_to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the thinking to a file.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make the answer obey this JSON schema.")
    ] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Write every event as a line of JSON.")] = False,
    each: Annotated[
        bool, typer.Option("--each", help="Answer each line of JSON on standard input with a line of JSON.")
    ] = False,
    split: Annotated[
        bool, typer.Option("--split", help="Ask a text that no context holds in parts, then their answers.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Keep nothing of this on disk for the next question.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan for this prompt and stop.")
    ] = False,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="NAME|FILE.toml",
            help="With --dry-run: plan for another computer.",
            autocompletion=completing.machines,
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print tokens and speed on stderr.")] = False,
    verbose: Verbose = False,
) -> int:
    """Ask QwQ one question; the answer comes on stdout, the thinking on stderr.

    Files come first, then standard input, the question last: `qwq ask -f report.txt "What is missing?"`.
    """
    from qwq_local.cli.asking import Asked, ask

    asked = Asked(
        question=question,
        files=tuple(files or ()),
        system=system,
        model=model,
        profile=profile,
        settings=tuple(settings or ()),
        seed=seed,
        think=think,
        think_to=think_to,
        json_schema=json_schema,
        jsonl=jsonl,
        each=each,
        split=split,
        private=private,
        dry_run=dry_run,
        machine=machine,
        stats=stats,
        verbose=verbose,
    )
    return ask(asked)
