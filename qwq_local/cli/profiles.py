"""`qwq profiles`: lists the profiles, or shows the values of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import typer

from qwq_local.cli.local import local_model_names
from qwq_local.errors import ModelNotFound
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import RULES, nearest
from qwq_local.profiles.layers import (
    ProfileFolders,
    ProfileKind,
    ResolvedProfile,
    list_profiles,
    own_model_profile,
    profile_folders,
    resolve,
)
from qwq_local.terminal.sanitizer import aligned_lines, one_line

_VALUE_WIDTH = 32

app = typer.Typer(invoke_without_command=True, help="List profiles, or show what one comes to.")


@app.callback()
def list_command(context: typer.Context) -> None:
    """List the model and task profiles; `qwq profiles show NAME` prints one with the origin of each value."""
    if context.invoked_subcommand is None:
        for line in listing_lines(_folders()):
            typer.echo(line)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A task (math) or a model (qwq-32b).")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", envvar="QWQ_MODEL", help="The model that a task is shown for.")
    ] = DEFAULT_MODEL,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key; may be repeated.")
    ] = None,
) -> None:
    """Print every key of a profile, its value, and where that came from."""
    folders = _folders()
    task: str | None = name
    if folders.has(ProfileKind.MODEL, name) and not folders.has(ProfileKind.TASK, name):
        model, task = name, None
    check_model(model, folders, lambda: local_model_names(os.environ))
    resolved = resolve(model, task, folders, os.environ, settings or ())
    for notice in resolved.notices:
        typer.echo(notice, err=True)
    for line in profile_lines(resolved):
        typer.echo(line)


def check_model(model: str, folders: ProfileFolders, local_names: Callable[[], Sequence[str]]) -> None:
    """Raises ModelNotFound, with the nearest name, for a model without a profile that is not on this machine.

    A path, a GGUF and a repository may name a model that is fetched later; these use QwQ-32B's profile.
    """
    may_come = "/" in model or os.sep in model or model.lower().endswith(".gguf")
    if may_come or own_model_profile(model, folders) is not None:
        return
    here = local_names()
    if any(name.lower().startswith(model.lower()) or _is_type_of(model, name) for name in here):
        return
    known = [*folders.names(ProfileKind.MODEL), *here]
    near = nearest(model, known)
    meant = f"Did you mean {near}?" if near else f"There are {', '.join(known)}."
    raise ModelNotFound(f"no model {model[:60]!r} has a profile or is on this machine. {meant}")


def _is_type_of(model: str, name: str) -> bool:
    """Whether the model is a part of the name: `Q4_K_M` of `qwq-32b:Q4_K_M`, `QwQ-32B` of `Qwen/QwQ-32B`."""
    wanted, known = model.lower(), name.lower()
    return known.partition(":")[2].startswith(wanted) or known.rpartition("/")[2].startswith(wanted)


def listing_lines(folders: ProfileFolders) -> Iterator[str]:
    """The list as aligned lines: name, kind, source, and the description or what is wrong with the file."""
    rows = [("NAME", "KIND", "SOURCE", "DESCRIPTION")]
    for entry in list_profiles(folders):
        text = f"cannot be read: {entry.problem}" if entry.problem else entry.description
        rows.append((entry.name, entry.kind.value, entry.source, one_line(text, 1000)))
    yield from aligned_lines(rows)
    yield ""
    yield f"Your own: {folders.own / 'models'} and {folders.own / 'tasks'}, NAME.toml in either."


def profile_lines(resolved: ResolvedProfile) -> Iterator[str]:
    """The profile as lines, one for each key: key, value, origin. A long value widens no column."""
    yield f"{resolved.task} on {resolved.model}" if resolved.task else resolved.model
    yield ""
    width = max(map(len, RULES))
    yield f"{'KEY':<{width}}  {'VALUE':<{_VALUE_WIDTH}}  FROM"
    for key, rule in RULES.items():
        value = rule.show(getattr(resolved.profile, key))
        yield f"{key:<{width}}  {value:<{_VALUE_WIDTH}}  {resolved.origins[key]}"


def _folders() -> ProfileFolders:
    return profile_folders(directories(os.environ))
