"""Flags that several commands have, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

from qwq_local.cli import completing

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set a profile key; may be repeated.",
        autocompletion=completing.settings,
    ),
]
_MODEL = typer.Option(
    "--model",
    "-m",
    metavar="MODEL",
    envvar="QWQ_MODEL",
    help="A model's name or a GGUF file.",
    autocompletion=completing.models,
)
_TASK = typer.Option(
    "--profile",
    "-p",
    metavar="NAME",
    envvar="QWQ_PROFILE",
    help="The task: see `qwq profiles`.",
    autocompletion=completing.tasks,
)
Model = Annotated[str, _MODEL]
Task = Annotated[str, _TASK]
# Where a conversation that is gone on with has its own.
ModelIfGiven = Annotated[str | None, _MODEL]
TaskIfGiven = Annotated[str | None, _TASK]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, max=2**32 - 2, help="Seed of the sampler.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what llama.cpp logs.")]
