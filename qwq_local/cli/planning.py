"""How `qwq plan` works: a model, files and a machine in, table, bars and choice out, exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_convert.file_types import find_file_type

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.provision import model_window, planned_event, request_for
from qwq_local.backend.question import Question
from qwq_local.cli.backends import meant_model
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.inputs import read_attachments
from qwq_local.cli.pipes import closed_pipes_end_it, forgiving
from qwq_local.dialogue.conversation import Framing, fence
from qwq_local.engine.api import AbortFlag
from qwq_local.engine.library import divert_stderr
from qwq_local.errors import ConvertError, DoesNotFit, ExitStatus, ModelNotFound, QwqError, UsageError
from qwq_local.events import Ledger, Planned
from qwq_local.machine.files import read_machine
from qwq_local.machine.here import physical_cores, this_machine
from qwq_local.models.known_sizes import known_sizes
from qwq_local.models.store import Catalog, find_model
from qwq_local.paths import Directories, directories
from qwq_local.planning.alternatives import plan_or_explain
from qwq_local.planning.compute import described_compute
from qwq_local.planning.devices import Machine
from qwq_local.planning.plan import Request
from qwq_local.planning.shape import ModelSizes
from qwq_local.planning.table import Row, context_table
from qwq_local.planning.window import RopeScaling
from qwq_local.planning.words import choice_lines
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import ProfileFolders, ResolvedProfile, profile_folders, resolve
from qwq_local.reading import checked
from qwq_local.terminal.output import Output
from qwq_local.terminal.plan_view import device_lines, table_lines
from qwq_local.wire import json_line, readable, write_line

QUESTION = "?"


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of `qwq plan`."""

    model: str
    files: tuple[Path, ...] = ()
    machine: str | None = None
    profile: str = "chat"
    settings: tuple[str, ...] = ()
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class _Shown:
    """What is to be shown; `problem` is set where nothing can be chosen."""

    model: str
    machine: Machine
    rows: tuple[Row, ...]
    n_offloadable: int
    planned: Planned | None
    problem: QwqError | None = None


def plan(asked: Asked) -> int:
    """Plan in the real surroundings; the exit status."""
    sys.stderr = forgiving(divert_stderr())
    with closed_pipes_end_it():
        return plan_in(process_environment(), asked)


def plan_in(environment: Environment, asked: Asked) -> int:
    """Show the plan. Raises DoesNotFit after the table when nothing can be chosen."""
    places = directories(environment.variables)
    asked = replace(asked, model=meant_model(asked.model, places))
    folders = profile_folders(places)
    resolved = resolve(asked.model, asked.profile, folders, environment.variables, list(asked.settings))
    machine = described_machine(asked.machine, folders)
    shown = _shown(asked, resolved, places, machine)
    if asked.as_json:
        write_line(environment.stdout, _plan_line(shown))
    else:
        out = Output.of(environment.stdout, environment.variables)
        for line in _lines(shown, out):
            write_line(environment.stdout, f"{line}\n")
    if shown.problem is not None:
        raise shown.problem
    return ExitStatus.ANSWERED


def described_machine(name: str | None, folders: ProfileFolders) -> Machine | None:
    """The machine of that name, or None for the one at hand."""
    return read_machine(name, folders) if name else None


def _shown(asked: Asked, resolved: ResolvedProfile, places: Directories, machine: Machine | None) -> _Shown:
    profile = resolved.profile
    catalog = Catalog(resolved.model, profile.repo, profile.files)
    try:
        path = find_model(asked.model, catalog, places.cache, places.data)
    except ModelNotFound as error:
        sizes = _known_sizes(asked, catalog)
        if sizes is None:
            raise
        if asked.files:
            raise ModelNotFound(f"to count the tokens of a file the model must be here. {error}") from None
        return _shown_by_formula(sizes, profile, machine or this_machine())
    backend = LocalBackend(path, profile, physical_cores(), AbortFlag())
    backend.plan_for(machine)
    with closing(backend):
        rows = context_table(backend.provision.request(0))
        planned, problem = None, None
        try:
            planned = backend.dry_run(_question(asked, profile))
        except DoesNotFit as error:
            problem = error
        facts = backend.provision
        return _Shown(facts.name, facts.machine, rows, facts.sizes.n_offloadable, planned, problem)


def _known_sizes(asked: Asked, catalog: Catalog) -> ModelSizes | None:
    """The bytes of a file of QwQ-32B that is not here; None when it is another model.

    Raises UsageError that lists the types for one that there is not.
    """
    stem, _, file_type = asked.model.partition(":")
    if stem.lower() != catalog.name or catalog.name != DEFAULT_MODEL:
        return None
    try:
        wanted = find_file_type(file_type or next(iter(catalog.files), "Q4_K_M"))
    except ConvertError as error:
        raise UsageError(str(error)) from None
    return known_sizes(wanted.name)


def _shown_by_formula(sizes: ModelSizes, profile: Profile, machine: Machine) -> _Shown:
    """For a file that is not here: exact weights, compute buffers by the formula."""
    name = f"QwQ 32B {sizes.file_type} (not on this machine)"
    window = model_window(profile, RopeScaling())
    compute = described_compute(sizes, machine)
    request: Request = request_for(profile, window, sizes, machine, compute)
    rows = context_table(request)
    try:
        chosen = plan_or_explain(request)
    except DoesNotFit as error:
        return _Shown(name, machine, rows, sizes.n_offloadable, None, error)
    planned = planned_event(name, chosen, seed=0, ledger=Ledger(free=chosen.n_ctx))
    return _Shown(name, machine, rows, sizes.n_offloadable, planned)


def _question(asked: Asked, profile: Profile) -> Question:
    attachments = tuple(read_attachments(asked.files))
    framing = Framing(checked(profile.system, "the system prompt"), attachments, profile.question_suffix)
    return Question(framing.messages(QUESTION), files=tuple(map(fence, attachments)))


def _plan_line(shown: _Shown) -> str:
    """The line of `--json`: model, machine, the table, and the plan or why there is none."""
    error = None if shown.problem is None else str(shown.problem)
    values = {"machine": shown.machine, "table": tuple(shown.rows), "plan": shown.planned, "error": error}
    return json_line({"model": shown.model, **{name: readable(value) for name, value in values.items()}})


def _lines(shown: _Shown, out: Output) -> Iterator[str]:
    has_color = out.is_live and out.has_color
    columns = out.size()[0]
    where = shown.machine.name
    if shown.machine.is_described and shown.machine.gpus:
        where += " (GPU figures unverified)"
    yield f"{shown.model} on {where}"
    yield ""
    yield from table_lines(shown.rows, shown.n_offloadable, has_color=has_color)
    if shown.planned is not None:
        yield ""
        yield from device_lines(shown.planned.devices, columns, has_color=has_color)
        yield ""
        yield from choice_lines(shown.planned)
