"""`qwq history`: the conversations that are kept; listing, searching, reading, exporting, removing them.

Flags in, plain text or JSON out on stdout. What the commands do is in recalling.py; main registers `app`.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="history",
    help="List the conversations that are kept, or search, show, export, remove them.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
Which = Annotated[str, typer.Argument(metavar="ID|NAME", help="A conversation, as `qwq history` lists it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.callback()
def list_command(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="How many at most; 0 for all.")] = 30,
    as_json: AsJson = False,
) -> None:
    """List the conversations that are kept, the last one first."""
    if context.invoked_subcommand is None:
        from qwq_local.cli.recalling import list_conversations

        list_conversations(limit, as_json=as_json)


@app.command("search")
def search_command(
    words: Annotated[list[str], typer.Argument(metavar="WORDS…", help="All of them occur in what is found.")],
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="How many places at most.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Find where words occur, in questions, thoughts and answers; parts of words are found too."""
    from qwq_local.cli.recalling import search

    search(words, limit, as_json=as_json)


@app.command("show")
def show_command(
    which: Which,
    thinking: Annotated[bool, typer.Option("--thinking", help="With the thoughts unfolded.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="With the turns that were undone or answered anew.")
    ] = False,
) -> None:
    """Print a conversation."""
    from qwq_local.cli.recalling import show

    show(which, with_thinking=thinking, with_all=everything)


@app.command("export")
def export_command(
    which: Which,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="NAME.md, .json or .html; - for Markdown on stdout.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a conversation to a file: Markdown, JSON, or a page of HTML."""
    from qwq_local.cli.recalling import export

    export(which, file, force=force)


@app.command("rm")
def rm_command(
    which: Annotated[
        list[str], typer.Argument(metavar="ID|NAME…", help="Conversations, as `qwq history` lists them.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove conversations for good, their thoughts and answers too; says which, and asks."""
    from qwq_local.cli.recalling import remove

    remove(which, yes=yes)
