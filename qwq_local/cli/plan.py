"""`qwq plan`: what would run here, or on another computer, before anything is loaded or bought."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from qwq_convert.file_types import find_file_type

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.provision import model_window, planned_event, request_for
from qwq_local.backend.question import Question
from qwq_local.cli.ask import read_attachments
from qwq_local.cli.backends import meant_model
from qwq_local.cli.environment import Environment
from qwq_local.cli.flags import PlanFlags
from qwq_local.dialogue.conversation import Framing, fence
from qwq_local.engine.api import AbortFlag
from qwq_local.errors import ConvertError, DoesNotFit, ExitStatus, ModelNotFound, QwqError, UsageError
from qwq_local.events import Ledger, Planned
from qwq_local.machine.description import read_machine
from qwq_local.machine.hardware import physical_cores, this_machine
from qwq_local.models.catalog import Catalog
from qwq_local.models.known_sizes import known_sizes
from qwq_local.models.store import find_model
from qwq_local.paths import Directories, directories
from qwq_local.planning.alternatives import TableRow, context_table, plan_or_explain
from qwq_local.planning.compute import described_compute
from qwq_local.planning.memory import Machine
from qwq_local.planning.plan import Request
from qwq_local.planning.shape import ModelSizes
from qwq_local.planning.summary import choice_lines
from qwq_local.planning.window import RopeScaling
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import ProfileFolders, ResolvedProfile, profile_folders, resolve
from qwq_local.terminal.output import Output
from qwq_local.terminal.plan_view import device_lines, table_lines
from qwq_local.utf8 import check_utf8
from qwq_local.wire import json_line, readable, write_line

QUESTION = "?"


@dataclass(frozen=True, slots=True)
class _PlanReport:
    """What is report. `problem` is set where no plan fits."""

    model: str
    machine: Machine
    rows: tuple[TableRow, ...]
    n_offloadable: int
    planned: Planned | None
    problem: QwqError | None = None


def plan(environment: Environment, flags: PlanFlags) -> int:
    """Shows the plan. Raises DoesNotFit after the table when no plan fits."""
    places = directories(environment.variables)
    flags = replace(flags, model=meant_model(flags.model, places))
    folders = profile_folders(places)
    resolved = resolve(flags.model, flags.profile, folders, environment.variables, flags.settings or ())
    machine = described_machine(flags.machine, folders)
    report = _report(flags, resolved, places, machine)
    if flags.as_json:
        write_line(environment.stdout, _plan_line(report))
    else:
        out = Output.of(environment.stdout, environment.variables)
        for line in _lines(report, out):
            write_line(environment.stdout, f"{line}\n")
    if report.problem is not None:
        raise report.problem
    return ExitStatus.ANSWERED


def _plan_line(report: _PlanReport) -> str:
    """The line of `--json`: model, machine, the table, and the plan or why there is none."""
    error = None if report.problem is None else str(report.problem)
    values = {"machine": report.machine, "table": report.rows, "plan": report.planned, "error": error}
    return json_line({"model": report.model, **{name: readable(value) for name, value in values.items()}})


def described_machine(name: str | None, folders: ProfileFolders) -> Machine | None:
    """The machine of that name; None for this one."""
    return read_machine(name, folders) if name else None


def _report(
    flags: PlanFlags, resolved: ResolvedProfile, places: Directories, machine: Machine | None
) -> _PlanReport:
    profile = resolved.profile
    catalog = Catalog(resolved.model, profile.repo, profile.files)
    try:
        path = find_model(flags.model, catalog, places.cache, places.data)
    except ModelNotFound as error:
        sizes = _known_sizes(flags, catalog)
        if sizes is None:
            raise
        if flags.files:
            raise ModelNotFound(f"to count the tokens of a file the model must be here. {error}") from None
        return _estimated_report(sizes, profile, machine or this_machine())
    backend = LocalBackend(path, profile, physical_cores(), AbortFlag())
    backend.plan_for(machine)
    with closing(backend):
        rows = context_table(backend.provision.request(0))
        planned, problem = None, None
        try:
            planned = backend.dry_run(_question(flags, profile))
        except DoesNotFit as error:
            problem = error
        facts = backend.provision
        return _PlanReport(facts.name, facts.machine, rows, facts.sizes.n_offloadable, planned, problem)


def _known_sizes(flags: PlanFlags, catalog: Catalog) -> ModelSizes | None:
    """The sizes of a file of QwQ-32B that is not on this machine; None for another model.

    Raises UsageError with the list of types for an unknown type.
    """
    stem, _, file_type = flags.model.partition(":")
    if stem.lower() != catalog.name or catalog.name != DEFAULT_MODEL:
        return None
    try:
        wanted = find_file_type(file_type or next(iter(catalog.files), "Q4_K_M"))
    except ConvertError as error:
        raise UsageError(str(error)) from None
    return known_sizes(wanted.name)


def _estimated_report(sizes: ModelSizes, profile: Profile, machine: Machine) -> _PlanReport:
    """For a file that is not on this machine: exact weights, compute buffers by the formula."""
    name = f"QwQ 32B {sizes.file_type} (not on this machine)"
    window = model_window(profile, RopeScaling())
    compute = described_compute(sizes, machine)
    request: Request = request_for(profile, window, sizes, machine, compute)
    rows = context_table(request)
    try:
        chosen = plan_or_explain(request)
    except DoesNotFit as error:
        return _PlanReport(name, machine, rows, sizes.n_offloadable, None, error)
    planned = planned_event(name, chosen, seed=0, ledger=Ledger(free=chosen.n_ctx))
    return _PlanReport(name, machine, rows, sizes.n_offloadable, planned)


def _question(flags: PlanFlags, profile: Profile) -> Question:
    attachments = tuple(read_attachments(flags.files))
    framing = Framing(check_utf8(profile.system, "the system prompt"), attachments, profile.question_suffix)
    return Question(framing.messages(QUESTION), files=tuple(map(fence, attachments)))


def _lines(report: _PlanReport, out: Output) -> Iterator[str]:
    has_color = out.is_live and out.has_color
    columns = out.size()[0]
    where = report.machine.name
    if report.machine.is_described and report.machine.gpus:
        where += " (GPU figures unverified)"
    yield f"{report.model} on {where}"
    yield ""
    yield from table_lines(report.rows, report.n_offloadable, has_color=has_color)
    if report.planned is not None:
        yield ""
        yield from device_lines(report.planned.devices, columns, has_color=has_color)
        yield ""
        yield from choice_lines(report.planned)
