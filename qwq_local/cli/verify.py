"""`qwq verify`: a GGUF, and where it was made from, in; what was checked, or the damage in one line, out.

Flags in, exit status out. What is checked is decided in verifying.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A GGUF, of a split model the first part; or a model's name.",
            show_default=False,
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="SOURCE",
            help="The checkpoint folder, downloaded repository or float GGUF it was made from.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=256, help="Threads; as many as there are cores by default."),
    ] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Write every result as a line of JSON.")] = False,
) -> int:
    """Check a GGUF: header, keys, tensors, every block.

    With SOURCE also how far each quantization type is from the weights it was made of, and whether llama.cpp
    splits text into the same tokens as the `tokenizers` library does.
    """
    from qwq_local.engine.library import library

    library()  # what imports llama_cpp itself would not say in one line that it is missing
    from qwq_local.cli.verifying import Asked, verify

    return verify(Asked(file, source, threads, jsonl))
