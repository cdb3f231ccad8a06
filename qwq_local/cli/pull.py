"""`qwq pull`: flags in, a model on this machine out. What it does is in pulling.py and weights.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwq_local.cli import completing


def command(
    file_type: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="The quantization, such as Q4_K_M; the best that fits if left out.",
            autocompletion=completing.types,
        ),
    ] = "",
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Another repository on the hub.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="NAME", help="This very file of the repository.")
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the types, their sizes, and which fit here.")
    ] = False,
    convert: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Make this type from the original weights, shard by shard.",
            autocompletion=completing.types,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --convert: an importance matrix.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="With --convert: where the GGUF goes.")
    ] = None,
    keep_weights: Annotated[
        bool,
        typer.Option("--keep-weights", help="With --convert: keep the weights in the Hugging Face cache."),
    ] = False,
) -> int:
    """Bring a model: resumed where it was left, verified by sha256, shared with other Hugging Face tools.

    Without an argument, the best quantization of QwQ-32B that fits this machine.
    """
    from qwq_local.cli.pulling import Asked, pull

    asked = Asked(
        file_type=file_type,
        repo=repo,
        file=file,
        show_list=show_list,
        convert=convert,
        imatrix=imatrix,
        out=out,
        keep_weights=keep_weights,
    )
    return pull(asked)
