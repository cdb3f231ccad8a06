"""The command line: arguments in, exit status out. The one place that catches QwqError and prints it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated
from urllib.parse import urlsplit

import typer

from qwq_local import __version__
from qwq_local.cli import (
    ask,
    cache,
    chat,
    convert,
    history,
    imatrix,
    models,
    plan,
    profiles,
    pull,
    verify,
)
from qwq_local.cli.pipes import ClosedPipe, end_quietly, silence_stdout
from qwq_local.errors import ExitStatus, QwqError, UsageError

COMMANDS: Mapping[str, tuple[Callable[..., object] | typer.Typer, str]] = {
    "ask": (ask.command, "Ask one question; the answer alone comes on stdout."),
    "chat": (chat.command, "Talk with QwQ: fold, end or steer its thinking."),
    "convert": (convert.command, "Convert weights to a GGUF of any type, in one pass."),
    "imatrix": (imatrix.command, "Collect an importance matrix for `qwq convert`."),
    "plan": (plan.command, "Show what fits on this machine, or on another one."),
    "pull": (pull.command, "Bring a model: resumed, verified, shared."),
    "verify": (verify.command, "Check a GGUF, and how far it is from its source."),
    "models": (models.app, "List the models here, or add, show, verify, remove one."),
    "profiles": (profiles.app, "List profiles, or show what one comes to."),
    "cache": (cache.app, "List what was prefilled and is kept, or clear it."),
    "history": (history.app, "List conversations, or search, show, export them."),
}


def _application(arguments: Sequence[str]) -> typer.Typer:
    """What these arguments are read by: of the commands that are not named only what help lists.

    Reading the flags of all of them takes Typer longer than everything else together.
    """
    app = typer.Typer(
        name="qwq",
        help="Run QwQ-32B on your own computer, its thinking apart from its answer.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    needs_all = any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ)
    for name, (command, what) in COMMANDS.items():
        if not (needs_all or name in arguments):
            app.command(name, short_help=what)(_listed)
        elif isinstance(command, typer.Typer):
            app.add_typer(command, name=name, short_help=what)
        else:
            app.command(name, short_help=what)(command)
    return app


def _listed() -> None:
    """A command in the list of all; it is never called."""


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
    _check_hub_address(os.environ.get("HF_ENDPOINT", ""))


def _check_hub_address(address: str) -> None:
    """UsageError for one that no URL can have: huggingface_hub ends in a traceback when it is imported."""
    try:
        urlsplit(address).port  # noqa: B018
    except ValueError as error:
        raise UsageError(f"HF_ENDPOINT is {address[:100]!r} ({error}): give it as https://HOST.") from None


def main(arguments: Sequence[str]) -> int:
    """Run one command; the exit status is one of ExitStatus, or 141 when a pipe was closed."""
    try:
        status = _application(arguments)(args=list(arguments), prog_name="qwq", standalone_mode=False)
        sys.stdout.flush()
    except QwqError as error:
        return _complain(str(error), error.exit_status)
    except (ClosedPipe, SystemExit):
        # The parser itself ends the process where its help has no reader; nothing else here does.
        return end_quietly()
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except OSError as error:
        # What a command writes itself: standard output, --think-to. Reading is reported where it happens.
        where = error.filename or "standard output"
        return _complain(f"cannot write {where}: {error.strerror or error}.", ExitStatus.FAILED)
    except Exception as error:
        shown = _usage_error(error)
        if shown is None:
            raise
        return shown
    return status if isinstance(status, int) else ExitStatus.ANSWERED


def _usage_error(error: Exception) -> int | None:
    """Show an error of the argument parser as it shows them; None for anything else, which is a bug."""
    show = getattr(error, "show", None)
    if show is None:
        return ExitStatus.INTERRUPTED if type(error).__name__ == "Abort" else None
    show(file=sys.stderr)
    return ExitStatus.USAGE


def _complain(message: str, status: ExitStatus) -> ExitStatus:
    from qwq_local.terminal.sanitizer import one_line

    try:
        print(f"qwq: {one_line(message, 2000)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    return status
