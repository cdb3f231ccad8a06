"""The command line: runs the command that the arguments name, and prints the QwqError that ends it."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

import typer

from qwq_local import __version__
from qwq_local.cli.environment import Environment, engine_environment, silence_stdout
from qwq_local.errors import ExitStatus, QwqError, UsageError

# Each command: the function that runs it or the Typer application, and its line in the list of commands.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "ask": ("qwq_local.cli.ask:ask", "Ask one question; the answer alone comes on stdout."),
    "chat": ("qwq_local.cli.chat:chat", "Talk with QwQ: fold, end or steer its thinking."),
    "convert": ("qwq_local.cli.convert:convert", "Convert weights to a GGUF of any type, in one pass."),
    "imatrix": ("qwq_local.cli.imatrix:collect_matrix", "Collect an importance matrix for `qwq convert`."),
    "plan": ("qwq_local.cli.plan:plan", "Show what fits on this machine, or on another one."),
    "pull": ("qwq_local.cli.pull:pull", "Bring a model: resumed, verified, shared."),
    "verify": ("qwq_local.cli.verify:verify", "Check a GGUF, and how far it is from its source."),
    "models": ("qwq_local.cli.models:app", "List the models here, or add, show, verify, remove one."),
    "profiles": ("qwq_local.cli.profiles:app", "List profiles, or show what one comes to."),
    "cache": ("qwq_local.cli.cache:app", "List what was prefilled and is kept, or clear it."),
    "history": ("qwq_local.cli.history:app", "List conversations, or search, show, export them."),
}
# The words on the command line that a shell completes: bash, then zsh and fish.
_COMPLETED_WORDS = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")


def _application(arguments: Sequence[str], environment: Environment | None) -> typer.Typer:
    """The application that reads these arguments; it has the flags only of the commands they name.

    To read the flags of all commands takes Typer longer than everything else together.
    """
    app = typer.Typer(
        name="qwq",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    completed = " ".join(os.environ.get(name, "") for name in _COMPLETED_WORDS).split()
    for name, (place, summary) in COMMANDS.items():
        if name not in arguments and name not in completed:
            app.command(name, short_help=summary)(_unnamed)
            continue
        from qwq_local.cli.flags import FLAGS

        if name in FLAGS:
            app.command(name, short_help=summary)(_command(place, FLAGS[name], environment))
        else:
            app.add_typer(_imported(place), name=name, short_help=summary)
    return app


def _command(place: str, flags: type, environment: Environment | None) -> Callable[..., int]:
    """The command at MODULE:NAME, with the fields of a dataclass as its parameters.

    The module is imported when the command runs, so that help and usage errors come at once.
    """

    def run(**values: Any) -> int:
        given = flags(**values)
        own = environment or engine_environment(shows_log=getattr(given, "verbose", False))
        status: int = _imported(place)(own, given)
        return status

    hints, signature = get_type_hints(flags), inspect.signature(flags)
    types = {each.name: Annotated[hints[each.name], each.metadata["parameter"]] for each in fields(flags)}
    parameters = [one.replace(annotation=types[name]) for name, one in signature.parameters.items()]
    run.__doc__ = flags.__doc__
    run.__annotations__ = types
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    return run


def _imported(place: str) -> Any:
    """What MODULE:NAME names.

    Raises EngineError where llama_cpp does not load, and UsageError where HF_ENDPOINT is no URL: importing
    huggingface_hub would end in a traceback.
    """
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(address).port  # noqa: B018
    except ValueError as error:
        raise UsageError(f"HF_ENDPOINT is {address[:100]!r} ({error}): give it as https://HOST.") from None
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, OSError, RuntimeError):
        # The converter imports llama_cpp itself; this says in one line what is wrong with it.
        from qwq_local.engine.library import library

        library()
        raise


def _unnamed() -> None:
    """Stands in the list of commands for one that is not named; it is never called."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwq {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run QwQ-32B on your own computer, its thinking apart from its answer."""


def main(arguments: Sequence[str], environment: Environment | None = None) -> int:
    """Runs one command. Returns its exit status, one of ExitStatus.

    A test passes an environment of its own; help, usage errors and the commands that are groups use the
    process's all the same.
    """
    try:
        app = _application(arguments, environment)
        status = app(args=list(arguments), prog_name="qwq", standalone_mode=False)
        sys.stdout.flush()
    except QwqError as error:
        return _report(str(error), error.exit_status)
    except (BrokenPipeError, SystemExit):
        # The reader of stdout is gone. Typer makes SystemExit of that error, and of no other.
        silence_stdout()
        return ExitStatus.READER_GONE
    except (KeyboardInterrupt, typer.Abort):
        return ExitStatus.INTERRUPTED
    except OSError as error:
        # A command could not write: to stdout, or to --think-to. Read errors are reported where they occur.
        where = error.filename or "standard output"
        return _report(f"cannot write {where}: {error.strerror or error}.", ExitStatus.FAILED)
    except Exception as error:
        # The argument parser's errors show themselves; any other is a bug.
        if (show := getattr(error, "show", None)) is None:
            raise
        show(file=sys.stderr)
        return ExitStatus.USAGE
    return status if isinstance(status, int) else ExitStatus.ANSWERED


def _report(message: str, status: ExitStatus) -> ExitStatus:
    from qwq_local.terminal.sanitizer import one_line

    try:
        print(f"qwq: {one_line(message, 2000)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    return status
