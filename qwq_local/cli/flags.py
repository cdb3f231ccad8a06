"""The flags of the commands, each command's as a frozen dataclass whose docstring is its help.

A field is an option or argument: `name: TYPE = _option(...)`; cli/main.py makes Typer's parameters of them.
Nothing slow is imported here: help and usage errors come at once, and the module of a command is imported
when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import typer
from typer.models import ParameterInfo

from qwq_local.cli import completion
from qwq_local.profiles import DEFAULT_MODEL

DEFAULT_PROFILE = "chat"


def _flag(parameter: ParameterInfo, default: Any = None) -> Any:
    return field(default=default, metadata={"parameter": parameter})


def _option(*names: str, default: Any = None, **settings: Any) -> Any:
    return _flag(typer.Option(*names, **settings), default)


def _switch(name: str, help_text: str) -> Any:
    return _option(name, default=False, help=help_text)


def _argument(metavar: str, help_text: str, default: Any = MISSING, **settings: Any) -> Any:
    return _flag(typer.Argument(metavar=metavar, help=help_text, **settings), default)


# Flags of several commands. Without a value, a conversation that is continued has its own model and task.
_MODEL = typer.Option(
    "--model",
    "-m",
    metavar="MODEL",
    envvar="QWQ_MODEL",
    help="A model's name or a GGUF file.",
    autocompletion=completion.models,
)
_TASK = typer.Option(
    "--profile",
    "-p",
    metavar="NAME",
    envvar="QWQ_PROFILE",
    help="The task: see `qwq profiles`.",
    autocompletion=completion.tasks,
)
_SETTINGS = typer.Option(
    "--set",
    "-s",
    metavar="KEY=VALUE",
    help="Set a profile key; may be repeated.",
    autocompletion=completion.settings,
)
_SEED = typer.Option(metavar="N", min=0, max=2**32 - 2, help="Seed of the sampler.")
_SYSTEM = typer.Option(metavar="TEXT", help="The system prompt.")
_CONTINUE = typer.Option("--continue", "-c", help="Go on with the last conversation.")
_VERBOSE = typer.Option("--verbose", help="Show what llama.cpp logs.")


@dataclass(frozen=True, slots=True)
class AskFlags:
    """Ask QwQ one question; the answer comes on stdout, the thinking on stderr.

    Files come first, then standard input, the question last: `qwq ask -f report.txt "What is missing?"`.
    """

    question: str = _argument("QUESTION", "The question; it comes after files and standard input.", "")
    files: list[Path] | None = _option(
        "--file", "-f", metavar="FILE", help="A text file to read first; may be repeated."
    )
    goes_on: bool = _flag(_CONTINUE, default=False)
    system: str | None = _flag(_SYSTEM)
    model: str | None = _flag(_MODEL)
    profile: str | None = _flag(_TASK)
    settings: list[str] | None = _flag(_SETTINGS)
    seed: int | None = _flag(_SEED)
    think: Literal["show", "hide"] | None = _option(
        help="Show the thinking on stderr or hide it; shown on a terminal."
    )
    think_to: Path | None = _option(metavar="FILE", help="Write the thinking to a file.")
    json_schema: Path | None = _option(metavar="FILE", help="Make the answer obey this JSON schema.")
    regex: str | None = _option(metavar="TEXT", help="Make the answer match this regular expression.")
    grammar: Path | None = _option(metavar="FILE", help="Make the answer obey this Lark grammar.")
    jsonl: bool = _switch("--jsonl", "Write every event as a line of JSON.")
    each: bool = _switch(
        "--each", "Answer each line of JSON on standard input with a line of JSON; not kept in the history."
    )
    split: bool = _switch(
        "--split",
        "Ask a text that no context holds in parts, then their answers; the history keeps the last.",
    )
    private: bool = _switch("--private", "Keep nothing of this on disk, no history and no cache.")
    dry_run: bool = _switch("--dry-run", "Print the plan for this prompt and stop.")
    machine: str | None = _option(
        metavar="NAME|FILE.toml",
        help="With --dry-run: plan for another computer.",
        autocompletion=completion.machines,
    )
    stats: bool = _switch("--stats", "Print tokens and speed on stderr.")
    verbose: bool = _flag(_VERBOSE, default=False)


@dataclass(frozen=True, slots=True)
class ChatFlags:
    """Talk with QwQ: read, fold, end or steer its thinking; every conversation can be gone on with.

    /help lists the commands. In pipes each line is a question and stdout carries the answers alone.
    """

    files: list[Path] | None = _option(
        "--file", "-f", metavar="FILE", help="A text file for the first question; may be repeated."
    )
    goes_on: bool = _flag(_CONTINUE, default=False)
    resume: str | None = _option(metavar="NAME|ID", help="Go on with a conversation: see `qwq history`.")
    system: str | None = _flag(_SYSTEM)
    model: str | None = _flag(_MODEL)
    profile: str | None = _flag(_TASK)
    settings: list[str] | None = _flag(_SETTINGS)
    seed: int | None = _flag(_SEED)
    think: Literal["off", "excerpt", "tail", "full"] | None = _option(
        help="How the thinking is shown while it comes; Ctrl-T changes it."
    )
    private: bool = _switch("--private", "Write nothing to disk.")
    dry_run: bool = _switch("--dry-run", "Print the plan for the first question and stop.")
    verbose: bool = _flag(_VERBOSE, default=False)


@dataclass(frozen=True, slots=True)
class ConvertFlags:
    """Convert weights to a GGUF of any type, in one pass, byte for byte what llama-quantize makes.

    An interrupted conversion goes on from its last whole tensor when the same command is run again.
    """

    source: str = _argument(
        "SOURCE", "A checkpoint folder, a downloaded repository (Qwen/QwQ-32B), or a float GGUF."
    )
    file_type: str = _argument(
        "TYPE", "Q4_K_M, Q8_0 …; `--types` lists them with their sizes.", "", autocompletion=completion.types
    )
    out: Path | None = _option(
        "--out", "-o", metavar="FILE", help="The file to write; NAME-TYPE.gguf if left out."
    )
    types: bool = _switch("--types", "List every type: size for this source, imatrix, whether it fits here.")
    dry_run: bool = _switch("--dry-run", "Print each tensor's type, the size and the time; write nothing.")
    imatrix: Path | None = _option(metavar="FILE", help="An importance matrix (see `qwq imatrix`).")
    tensor_types: list[str] | None = _option(
        "--tensor-type", metavar="REGEX=TYPE", help="The type of matching tensors; may be repeated."
    )
    output_type: str | None = _option(
        "--output-tensor-type", metavar="TYPE", help="The type of output.weight."
    )
    embedding_type: str | None = _option(
        "--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight."
    )
    pure: bool = _switch("--pure", "Give every tensor the same type.")
    leave_output: bool = _switch("--leave-output-tensor", "Leave output.weight as it is in the source.")
    overrides: list[str] | None = _option(
        "--override-key", metavar="KEY=VALUE", help="Set a key-value; may be repeated."
    )
    yarn: float | None = _option(
        metavar="FACTOR", help="Write YaRN keys (4: 131,072 tokens), for tools that cannot set it."
    )
    split: str | None = _option(
        "--split-max-size", metavar="SIZE", help="Split into files of at most SIZE (4G, 500M)."
    )
    threads: int | None = _option(metavar="N", min=1, max=512, help="Threads; all cores if left out.")
    allow_nonfinite: bool = _switch(
        "--allow-nonfinite", "Go on where a weight is no number (0 in quantized tensors)."
    )
    jsonl: bool = _switch("--jsonl", "Write every step as a line of JSON.")


@dataclass(frozen=True, slots=True)
class ImatrixFlags:
    """Collect an importance matrix: which columns of each weight matter, over some text.

    A run that is cut off goes on where it was last saved when the same command is given again. With --in and
    no text, files are merged.
    """

    model: str = _argument(
        "MODEL", "A GGUF, best BF16 or F16, or a model's name.", autocompletion=completion.models
    )
    texts: list[Path] | None = _argument(
        "TEXT", "Texts to read, in this order as one; - is standard input.", None
    )
    out: Path | None = _option("--out", "-o", metavar="FILE", help="By default MODEL.imatrix.gguf here.")
    chunks: int | None = _option(metavar="N", min=1, help="Stop after this many chunks.")
    ctx: int = _option(default=512, metavar="N", min=32, max=1 << 20, help="Tokens of a chunk.")
    process_output: bool = _switch("--process-output", "Collect for the output layer too.")
    parse_special: bool = _switch(
        "--parse-special", "Read <|im_start|> and its like as the tokens they name."
    )
    threads: int | None = _option(metavar="N", min=1, help="Threads; as many as there are cores by default.")
    save_every: int = _option(default=10, metavar="N", min=1, help="Save after this many chunks.")
    earlier: list[Path] | None = _option(
        "--in", metavar="FILE", help="Add the sums of this file; may be repeated."
    )
    settings: list[str] | None = _option(
        "--set", "-s", metavar="KEY=VALUE", help="Set a profile key, such as n_gpu_layers."
    )
    verbose: bool = _flag(_VERBOSE, default=False)


@dataclass(frozen=True, slots=True)
class PlanFlags:
    """Show what fits: context against KV type, what fills the memory, and what would be chosen."""

    model: str = _argument(
        "MODEL",
        "As for --model of `qwq ask`; qwq-32b:TYPE needs no file.",
        DEFAULT_MODEL,
        autocompletion=completion.models,
    )
    files: list[Path] | None = _option(
        "--file", "-f", metavar="FILE", help="A text file to plan for; may be repeated."
    )
    machine: str | None = _option(
        metavar="NAME|FILE.toml",
        help="Another computer: a name, or its file.",
        autocompletion=completion.machines,
    )
    profile: str = _flag(_TASK, DEFAULT_PROFILE)
    settings: list[str] | None = _flag(_SETTINGS)
    as_json: bool = _switch("--json", "Write one object of JSON.")


@dataclass(frozen=True, slots=True)
class PullFlags:
    """Bring a model: resumed where it was left, verified by sha256, shared with other Hugging Face tools.

    Without an argument, the best quantization of QwQ-32B that fits this machine.
    """

    file_type: str = _argument(
        "TYPE",
        "The quantization, such as Q4_K_M; the best that fits if left out.",
        "",
        autocompletion=completion.types,
    )
    repo: str | None = _option(metavar="OWNER/NAME", help="Another repository on the hub.")
    file: str | None = _option(metavar="NAME", help="This very file of the repository.")
    show_list: bool = _switch("--list", "List the types, their sizes, and which fit here.")
    convert: str | None = _option(
        metavar="TYPE",
        help="Make this type from the original weights, shard by shard.",
        autocompletion=completion.types,
    )
    imatrix: Path | None = _option(metavar="FILE", help="With --convert: an importance matrix.")
    out: Path | None = _option("--out", "-o", metavar="FILE", help="With --convert: where the GGUF goes.")
    keep_weights: bool = _switch(
        "--keep-weights", "With --convert: keep the weights in the Hugging Face cache."
    )


@dataclass(frozen=True, slots=True)
class VerifyFlags:
    """Check a GGUF: header, keys, tensors, every block.

    With SOURCE also how far each quantization type is from the weights it was made of, and whether llama.cpp
    splits text into the same tokens as the `tokenizers` library does.
    """

    file: Path = _argument("FILE", "A GGUF, of a split model the first part; or a model's name.")
    source: Path | None = _argument(
        "SOURCE", "The checkpoint folder, downloaded repository or float GGUF it was made from.", None
    )
    threads: int | None = _option(
        metavar="N", min=1, max=256, help="Threads; as many as there are cores by default."
    )
    jsonl: bool = _switch("--jsonl", "Write every result as a line of JSON.")


FLAGS: Mapping[str, type] = {
    "ask": AskFlags,
    "chat": ChatFlags,
    "convert": ConvertFlags,
    "imatrix": ImatrixFlags,
    "plan": PlanFlags,
    "pull": PullFlags,
    "verify": VerifyFlags,
}
