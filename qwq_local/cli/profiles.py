"""`qwq profiles`: which profiles there are, and what one of them comes to.

Flags in, lines of plain text out on stdout. `app` is the sub-application that the main command registers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from qwq_local.cli.groups import command_group
from qwq_local.profiles import DEFAULT_MODEL

if TYPE_CHECKING:
    from qwq_local.profiles.layers import ProfileFolders, ResolvedProfile

# A value longer than this gets its origin right after it rather than widening the whole column.
MAX_VALUE_COLUMN = 32

app = command_group("profiles", "List profiles, or show what one comes to.")


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
    from qwq_local.profiles.layers import resolve

    folders = _folders()
    model_shown, task = shown_names(name, model, folders)
    check_model(model_shown, folders, local_model_names)
    resolved = resolve(model_shown, task, folders, os.environ, settings or ())
    for notice in resolved.notices:
        typer.echo(notice, err=True)
    for line in profile_lines(resolved):
        typer.echo(line)


def shown_names(name: str, model: str, folders: ProfileFolders) -> tuple[str, str | None]:
    """The model and the task that `show NAME --model MODEL` means; a model's own name leaves out the task."""
    from qwq_local.profiles.layers import Kind

    if folders.has(Kind.MODEL, name) and not folders.has(Kind.TASK, name):
        return name, None
    return model, name


def check_model(model: str, folders: ProfileFolders, local_names: Callable[[], Sequence[str]]) -> None:
    """Raises ModelNotFound, with the nearest name, for a model that has no profile and is not here either.

    A path, a GGUF and a repository may be of a model that is still to come: they have QwQ-32B's profile.
    """
    from qwq_local.errors import ModelNotFound
    from qwq_local.profiles.keys import nearest
    from qwq_local.profiles.layers import Kind, own_model_profile

    may_come = "/" in model or os.sep in model or model.lower().endswith(".gguf")
    if may_come or own_model_profile(model, folders) is not None:
        return
    here = local_names()
    if any(name.lower().startswith(model.lower()) or _is_type_of(model, name) for name in here):
        return
    known = [*folders.names(Kind.MODEL), *here]
    near = nearest(model, known)
    meant = f"Did you mean {near}?" if near else f"There are {', '.join(known)}."
    raise ModelNotFound(f"no model {model[:60]!r} has a profile or is on this machine. {meant}")


def _is_type_of(model: str, name: str) -> bool:
    """Whether `Q4_K_M` is meant as the name of `qwq-32b:Q4_K_M`, or `QwQ-32B` as that of an owner's."""
    wanted, known = model.lower(), name.lower()
    return known.partition(":")[2].startswith(wanted) or known.rpartition("/")[2].startswith(wanted)


def listing_lines(folders: ProfileFolders) -> Iterator[str]:
    """The list as aligned lines: name, kind, where it comes from, description or what is wrong with it."""
    from qwq_local.profiles.layers import list_profiles

    rows = [("NAME", "KIND", "SOURCE", "DESCRIPTION")]
    for entry in list_profiles(folders):
        text = f"cannot be read: {entry.problem}" if entry.problem else entry.description
        rows.append((entry.name, entry.kind.value, entry.source, _on_one_line(text)))
    yield from aligned(rows)
    yield ""
    yield f"Your own: {folders.own / 'models'} and {folders.own / 'tasks'}, NAME.toml in either."


def profile_lines(resolved: ResolvedProfile) -> Iterator[str]:
    """The profile as aligned lines, one key each: key, value, origin."""
    from qwq_local.profiles.keys import RULES

    rows = [("KEY", "VALUE", "FROM")]
    for key, rule in RULES.items():
        value = getattr(resolved.profile, key)
        rows.append((key, rule.show(value), resolved.origins[key]))
    yield f"{resolved.task} on {resolved.model}" if resolved.task else resolved.model
    yield ""
    yield from aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows of cells as lines, the columns under one another; none is wider than it may be."""
    columns = range(len(rows[0]) - 1)
    widths = [min(max(len(row[i]) for row in rows), MAX_VALUE_COLUMN) for i in columns]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        yield "  ".join([*cells, row[-1]]).rstrip()


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def local_model_names() -> Sequence[str]:
    """The models on this machine."""
    from qwq_local.hub.cache import HubCache
    from qwq_local.models.catalog import Catalog
    from qwq_local.models.inventory import Places, local_models
    from qwq_local.paths import directories
    from qwq_local.profiles.layers import resolve

    places = directories(os.environ)
    profile = resolve(DEFAULT_MODEL, None, _folders()).profile
    catalog = Catalog(DEFAULT_MODEL, profile.repo, profile.files)
    return [model.name for model in local_models(Places(places, catalog, HubCache.here()))]


def _folders() -> ProfileFolders:
    from qwq_local.paths import directories
    from qwq_local.profiles.layers import profile_folders

    return profile_folders(directories(os.environ))
