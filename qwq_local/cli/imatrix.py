"""`qwq imatrix`: calibration texts and a model in, an importance matrix for `qwq convert --imatrix` out.

Flags in, exit status out. How it is collected is qwq_convert's business, what is shown that of collecting.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwq_local.cli import completing
from qwq_local.cli.options import Verbose


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF, best BF16 or F16, or a model's name.",
            autocompletion=completing.models,
        ),
    ],
    texts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="TEXT", help="Texts to read, in this order as one; - is standard input."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="By default MODEL.imatrix.gguf here.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop after this many chunks.")
    ] = None,
    ctx: Annotated[int, typer.Option(metavar="N", min=32, max=1 << 20, help="Tokens of a chunk.")] = 512,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Collect for the output layer too.")
    ] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read <|im_start|> and its like as the tokens they name.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads; as many as there are cores by default.")
    ] = None,
    save_every: Annotated[int, typer.Option(metavar="N", min=1, help="Save after this many chunks.")] = 10,
    earlier: Annotated[
        list[Path] | None,
        typer.Option("--in", metavar="FILE", help="Add the sums of this file; may be repeated."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set a profile key, such as n_gpu_layers."),
    ] = None,
    verbose: Verbose = False,
) -> int:
    """Collect an importance matrix: which columns of each weight matter, over some text.

    A run that is cut off goes on where it was last saved when the same command is given again. With --in and
    no text, files are merged.
    """
    from qwq_local.engine.library import library

    library()  # what imports llama_cpp itself would not say in one line that it is missing
    from qwq_local.cli.collecting import Asked, collect_in, prepared_process

    asked = Asked(
        model=model,
        texts=tuple(texts or ()),
        out=out,
        chunks=chunks,
        ctx=ctx,
        process_output=process_output,
        parse_special=parse_special,
        threads=threads,
        save_every=save_every,
        earlier=tuple(earlier or ()),
        settings=tuple(settings or ()),
    )
    return collect_in(prepared_process(verbose=verbose), asked)
