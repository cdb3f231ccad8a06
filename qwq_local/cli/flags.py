"""The flags of the commands, each command's as a frozen dataclass whose docstring is its help.

A field is an option or argument: `name: Annotated[TYPE, Option(...)] = DEFAULT`. Nothing slow is
imported here: help and usage errors come at once, and the module of a command is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from qwq_local.cli import completion
from qwq_local.profiles import DEFAULT_MODEL

DEFAULT_PROFILE = "chat"

_MODEL = Option(
    "--model",
    "-m",
    metavar="MODEL",
    envvar="QWQ_MODEL",
    help="A model's name or a GGUF file.",
    autocompletion=completion.models,
)
_TASK = Option(
    "--profile",
    "-p",
    metavar="NAME",
    envvar="QWQ_PROFILE",
    help="The task: see `qwq profiles`.",
    autocompletion=completion.tasks,
)
Model = Annotated[str, _MODEL]
Task = Annotated[str, _TASK]
# None where a conversation that is continued has its own.
ModelIfGiven = Annotated[str | None, _MODEL]
TaskIfGiven = Annotated[str | None, _TASK]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Set a profile key; may be repeated.",
        autocompletion=completion.settings,
    ),
]
Seed = Annotated[int | None, Option(metavar="N", min=0, max=2**32 - 2, help="Seed of the sampler.")]
SystemPrompt = Annotated[str | None, Option(metavar="TEXT", help="The system prompt.")]
Continue = Annotated[bool, Option("--continue", "-c", help="Go on with the last conversation.")]
Verbose = Annotated[bool, Option("--verbose", help="Show what llama.cpp logs.")]


@dataclass(frozen=True, slots=True)
class AskFlags:
    """Ask QwQ one question; the answer comes on stdout, the thinking on stderr.

    Files come first, then standard input, the question last: `qwq ask -f report.txt "What is missing?"`.
    """

    question: Annotated[
        str, Argument(metavar="QUESTION", help="The question; it comes after files and standard input.")
    ] = ""
    files: Annotated[
        list[Path] | None,
        Option("--file", "-f", metavar="FILE", help="A text file to read first; may be repeated."),
    ] = None
    goes_on: Continue = False
    system: SystemPrompt = None
    model: ModelIfGiven = None
    profile: TaskIfGiven = None
    settings: Settings = None
    seed: Seed = None
    think: Annotated[
        Literal["show", "hide"] | None,
        Option(help="Show the thinking on stderr or hide it; shown on a terminal."),
    ] = None
    think_to: Annotated[Path | None, Option(metavar="FILE", help="Write the thinking to a file.")] = None
    json_schema: Annotated[
        Path | None, Option(metavar="FILE", help="Make the answer obey this JSON schema.")
    ] = None
    regex: Annotated[
        str | None, Option(metavar="TEXT", help="Make the answer match this regular expression.")
    ] = None
    grammar: Annotated[
        Path | None, Option(metavar="FILE", help="Make the answer obey this Lark grammar.")
    ] = None
    jsonl: Annotated[bool, Option("--jsonl", help="Write every event as a line of JSON.")] = False
    each: Annotated[
        bool,
        Option(
            "--each",
            help="Answer each line of JSON on standard input with a line of JSON; not kept in the history.",
        ),
    ] = False
    split: Annotated[
        bool,
        Option(
            "--split",
            help="Ask a text that no context holds in parts, then their answers; the history keeps the last.",
        ),
    ] = False
    private: Annotated[
        bool, Option("--private", help="Keep nothing of this on disk, no history and no cache.")
    ] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan for this prompt and stop.")] = False
    machine: Annotated[
        str | None,
        Option(
            "--machine",
            metavar="NAME|FILE.toml",
            help="With --dry-run: plan for another computer.",
            autocompletion=completion.machines,
        ),
    ] = None
    stats: Annotated[bool, Option("--stats", help="Print tokens and speed on stderr.")] = False
    verbose: Verbose = False


@dataclass(frozen=True, slots=True)
class ChatFlags:
    """Talk with QwQ: read, fold, end or steer its thinking; every conversation can be gone on with.

    /help lists the commands. In pipes each line is a question and stdout carries the answers alone.
    """

    files: Annotated[
        list[Path] | None,
        Option("--file", "-f", metavar="FILE", help="A text file for the first question; may be repeated."),
    ] = None
    goes_on: Continue = False
    resume: Annotated[
        str | None, Option(metavar="NAME|ID", help="Go on with a conversation: see `qwq history`.")
    ] = None
    system: SystemPrompt = None
    model: ModelIfGiven = None
    profile: TaskIfGiven = None
    settings: Settings = None
    seed: Seed = None
    think: Annotated[
        Literal["off", "excerpt", "tail", "full"] | None,
        Option(help="How the thinking is shown while it comes; Ctrl-T changes it."),
    ] = None
    private: Annotated[bool, Option("--private", help="Write nothing to disk.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan for the first question and stop.")] = (
        False
    )
    verbose: Verbose = False


@dataclass(frozen=True, slots=True)
class ConvertFlags:
    """Convert weights to a GGUF of any type, in one pass, byte for byte what llama-quantize makes.

    An interrupted conversion goes on from its last whole tensor when the same command is run again.
    """

    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            help="A checkpoint folder, a downloaded repository (Qwen/QwQ-32B), or a float GGUF.",
        ),
    ]
    file_type: Annotated[
        str,
        Argument(
            metavar="TYPE",
            help="Q4_K_M, Q8_0 …; `--types` lists them with their sizes.",
            autocompletion=completion.types,
        ),
    ] = ""
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="FILE", help="The file to write; NAME-TYPE.gguf if left out."),
    ] = None
    types: Annotated[
        bool, Option("--types", help="List every type: size for this source, imatrix, whether it fits here.")
    ] = False
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print each tensor's type, the size and the time; write nothing.")
    ] = False
    imatrix: Annotated[
        Path | None, Option(metavar="FILE", help="An importance matrix (see `qwq imatrix`).")
    ] = None
    tensor_types: Annotated[
        list[str] | None,
        Option("--tensor-type", metavar="REGEX=TYPE", help="The type of matching tensors; may be repeated."),
    ] = None
    output_type: Annotated[
        str | None, Option("--output-tensor-type", metavar="TYPE", help="The type of output.weight.")
    ] = None
    embedding_type: Annotated[
        str | None, Option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight.")
    ] = None
    pure: Annotated[bool, Option("--pure", help="Give every tensor the same type.")] = False
    leave_output: Annotated[
        bool, Option("--leave-output-tensor", help="Leave output.weight as it is in the source.")
    ] = False
    overrides: Annotated[
        list[str] | None,
        Option("--override-key", metavar="KEY=VALUE", help="Set a key-value; may be repeated."),
    ] = None
    yarn: Annotated[
        float | None,
        Option(metavar="FACTOR", help="Write YaRN keys (4: 131,072 tokens), for tools that cannot set it."),
    ] = None
    split: Annotated[
        str | None,
        Option("--split-max-size", metavar="SIZE", help="Split into files of at most SIZE (4G, 500M)."),
    ] = None
    threads: Annotated[
        int | None, Option(metavar="N", min=1, max=512, help="Threads; all cores if left out.")
    ] = None
    allow_nonfinite: Annotated[
        bool, Option("--allow-nonfinite", help="Go on where a weight is no number (0 in quantized tensors).")
    ] = False
    jsonl: Annotated[bool, Option("--jsonl", help="Write every step as a line of JSON.")] = False


@dataclass(frozen=True, slots=True)
class ImatrixFlags:
    """Collect an importance matrix: which columns of each weight matter, over some text.

    A run that is cut off goes on where it was last saved when the same command is given again. With --in and
    no text, files are merged.
    """

    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="A GGUF, best BF16 or F16, or a model's name.",
            autocompletion=completion.models,
        ),
    ]
    texts: Annotated[
        list[Path] | None,
        Argument(metavar="TEXT", help="Texts to read, in this order as one; - is standard input."),
    ] = None
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="FILE", help="By default MODEL.imatrix.gguf here.")
    ] = None
    chunks: Annotated[int | None, Option(metavar="N", min=1, help="Stop after this many chunks.")] = None
    ctx: Annotated[int, Option(metavar="N", min=32, max=1 << 20, help="Tokens of a chunk.")] = 512
    process_output: Annotated[bool, Option("--process-output", help="Collect for the output layer too.")] = (
        False
    )
    parse_special: Annotated[
        bool, Option("--parse-special", help="Read <|im_start|> and its like as the tokens they name.")
    ] = False
    threads: Annotated[
        int | None, Option(metavar="N", min=1, help="Threads; as many as there are cores by default.")
    ] = None
    save_every: Annotated[int, Option(metavar="N", min=1, help="Save after this many chunks.")] = 10
    earlier: Annotated[
        list[Path] | None, Option("--in", metavar="FILE", help="Add the sums of this file; may be repeated.")
    ] = None
    settings: Annotated[
        list[str] | None,
        Option("--set", "-s", metavar="KEY=VALUE", help="Set a profile key, such as n_gpu_layers."),
    ] = None
    verbose: Verbose = False


@dataclass(frozen=True, slots=True)
class PlanFlags:
    """Show what fits: context against KV type, what fills the memory, and what would be chosen."""

    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="As for --model of `qwq ask`; qwq-32b:TYPE needs no file.",
            autocompletion=completion.models,
        ),
    ] = DEFAULT_MODEL
    files: Annotated[
        list[Path] | None,
        Option("--file", "-f", metavar="FILE", help="A text file to plan for; may be repeated."),
    ] = None
    machine: Annotated[
        str | None,
        Option(
            "--machine",
            metavar="NAME|FILE.toml",
            help="Another computer: a name, or its file.",
            autocompletion=completion.machines,
        ),
    ] = None
    profile: Task = DEFAULT_PROFILE
    settings: Settings = None
    as_json: Annotated[bool, Option("--json", help="Write one object of JSON.")] = False


@dataclass(frozen=True, slots=True)
class PullFlags:
    """Bring a model: resumed where it was left, verified by sha256, shared with other Hugging Face tools.

    Without an argument, the best quantization of QwQ-32B that fits this machine.
    """

    file_type: Annotated[
        str,
        Argument(
            metavar="TYPE",
            help="The quantization, such as Q4_K_M; the best that fits if left out.",
            autocompletion=completion.types,
        ),
    ] = ""
    repo: Annotated[str | None, Option(metavar="OWNER/NAME", help="Another repository on the hub.")] = None
    file: Annotated[
        str | None, Option("--file", metavar="NAME", help="This very file of the repository.")
    ] = None
    show_list: Annotated[bool, Option("--list", help="List the types, their sizes, and which fit here.")] = (
        False
    )
    convert: Annotated[
        str | None,
        Option(
            metavar="TYPE",
            help="Make this type from the original weights, shard by shard.",
            autocompletion=completion.types,
        ),
    ] = None
    imatrix: Annotated[Path | None, Option(metavar="FILE", help="With --convert: an importance matrix.")] = (
        None
    )
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="FILE", help="With --convert: where the GGUF goes.")
    ] = None
    keep_weights: Annotated[
        bool, Option("--keep-weights", help="With --convert: keep the weights in the Hugging Face cache.")
    ] = False


@dataclass(frozen=True, slots=True)
class VerifyFlags:
    """Check a GGUF: header, keys, tensors, every block.

    With SOURCE also how far each quantization type is from the weights it was made of, and whether llama.cpp
    splits text into the same tokens as the `tokenizers` library does.
    """

    file: Annotated[
        Path,
        Argument(
            metavar="FILE",
            help="A GGUF, of a split model the first part; or a model's name.",
            show_default=False,
        ),
    ]
    source: Annotated[
        Path | None,
        Argument(
            metavar="SOURCE",
            help="The checkpoint folder, downloaded repository or float GGUF it was made from.",
            show_default=False,
        ),
    ] = None
    threads: Annotated[
        int | None,
        Option(metavar="N", min=1, max=256, help="Threads; as many as there are cores by default."),
    ] = None
    jsonl: Annotated[bool, Option("--jsonl", help="Write every result as a line of JSON.")] = False


def command_group(name: str, help_text: str) -> typer.Typer:
    """A command with commands of its own; its callback runs when none of them is given."""
    return typer.Typer(
        name=name,
        help=help_text,
        invoke_without_command=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


FLAGS: Mapping[str, type] = {
    "ask": AskFlags,
    "chat": ChatFlags,
    "convert": ConvertFlags,
    "imatrix": ImatrixFlags,
    "plan": PlanFlags,
    "pull": PullFlags,
    "verify": VerifyFlags,
}
