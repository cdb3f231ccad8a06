"""`qwq models`: what is on this machine, and adding, removing, showing, verifying and choosing among it.

Flags in, plain text or JSON out on stdout. What the commands do is in managing.py; main registers `app`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwq_local.cli import completing
from qwq_local.cli.groups import command_group

app = command_group("models", "List the models on this machine, or add, show, verify, remove, choose one.")
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A model as `qwq models` lists it.", autocompletion=completing.models
    ),
]


@app.callback()
def list_command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """List the models that qwq can use: its own, the Hugging Face cache's, ollama's and LM Studio's."""
    if context.invoked_subcommand is None:
        from qwq_local.cli.managing import list_models

        list_models(as_json=as_json)


@app.command("add")
def add_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A GGUF; it stays where it is.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call it, if not as the file.")] = "",
) -> None:
    """Add a GGUF under a name of its own."""
    from qwq_local.cli.managing import add_model

    add_model(path, name)


@app.command("rm")
def rm_command(
    name: Name, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Remove a model that qwq brought, or forget one that was added; says what it frees, and asks."""
    from qwq_local.cli.managing import remove_model

    remove_model(name, yes=yes)


@app.command("show")
def show_command(name: Name) -> None:
    """Print what a model is: architecture, window, template, tensors by type, KV cache per token, sha256."""
    from qwq_local.cli.managing import show_model

    show_model(name)


@app.command("default")
def default_command(name: Name) -> None:
    """Choose the model that `qwq ask` uses when none is named; qwq-32b: the one pulled last, as at first."""
    from qwq_local.cli.managing import choose_default

    choose_default(name)


@app.command("verify")
def verify_command(name: Name) -> None:
    """Hash a model's files and compare with what the hub, or the name of the blob, states."""
    from qwq_local.cli.managing import verify_model

    verify_model(name)
