"""`qwq rerun`: whether a turn of the history comes out the same again.

Flags in, exit status out: 0 when the text is identical, 1 when it differs. How it is done is in rerunning.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qwq_local.cli.options import Verbose


def command(
    turn: Annotated[
        str, typer.Argument(metavar="ID", help="A turn's id, or CONVERSATION:NUMBER by name or id.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Where the model is now, if not under its name.")
    ] = "",
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Compare even if these are other weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
    verbose: Verbose = False,
) -> int:
    """Repeat a turn of a chat from its tokens, plan, sampler and seed, and say whether it is the same.

    The prompt is prefilled anew, whatever is cached. It ends at the first difference.
    """
    from qwq_local.cli.rerunning import Asked, rerun

    return rerun(Asked(turn, model, any_model=any_model, as_json=as_json, verbose=verbose))
