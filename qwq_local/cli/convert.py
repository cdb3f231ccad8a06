"""`qwq convert`: Hugging Face weights, or a float GGUF, to a GGUF of any type in one pass.

Flags in, exit status out. What is done lies in qwq_convert, how it is shown in converting.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwq_local.cli import completing


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A checkpoint folder, a downloaded repository (Qwen/QwQ-32B), or a float GGUF.",
        ),
    ],
    file_type: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="Q4_K_M, Q8_0 …; `--types` lists them with their sizes.",
            autocompletion=completing.types,
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write; NAME-TYPE.gguf if left out."),
    ] = None,
    types: Annotated[
        bool,
        typer.Option("--types", help="List every type: size for this source, imatrix, whether it fits here."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print each tensor's type, the size and the time; write nothing."),
    ] = False,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An importance matrix (see `qwq imatrix`).")
    ] = None,
    tensor_types: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type", metavar="REGEX=TYPE", help="The type of matching tensors; may be repeated."
        ),
    ] = None,
    output_type: Annotated[
        str | None, typer.Option("--output-tensor-type", metavar="TYPE", help="The type of output.weight.")
    ] = None,
    embedding_type: Annotated[
        str | None,
        typer.Option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight."),
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="Give every tensor the same type.")] = False,
    leave_output: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Leave output.weight as it is in the source.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--override-key", metavar="KEY=VALUE", help="Set a key-value; may be repeated."),
    ] = None,
    yarn: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR", help="Write YaRN keys (4: 131,072 tokens), for tools that cannot set it."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split-max-size", metavar="SIZE", help="Split into files of at most SIZE (4G, 500M)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=512, help="Threads; all cores if left out.")
    ] = None,
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Go on where a weight is no number (0 in quantized tensors)."),
    ] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Write every step as a line of JSON.")] = False,
) -> int:
    """Convert weights to a GGUF of any type, in one pass, byte for byte what llama-quantize makes.

    An interrupted conversion goes on from its last whole tensor when the same command is run again.
    """
    from qwq_local.engine.library import library

    library()  # what imports llama_cpp itself would not say in one line that it is missing
    from qwq_local.cli.converting import Asked, convert

    asked = Asked(
        source=source,
        file_type=file_type,
        out=out,
        types=types,
        dry_run=dry_run,
        imatrix=imatrix,
        tensor_types=tuple(tensor_types or ()),
        output_type=output_type,
        embedding_type=embedding_type,
        pure=pure,
        leave_output=leave_output,
        overrides=tuple(overrides or ()),
        yarn=yarn,
        split=split,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
        jsonl=jsonl,
    )
    return convert(asked)
