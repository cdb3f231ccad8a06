"""Flags that several commands have, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set a profile key; may be repeated."),
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 2, help="Seed of the sampler.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what llama.cpp logs.")]
