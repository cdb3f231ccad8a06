"""`qwq plan`: what runs on this computer or on another, before the model is loaded or the computer bought."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.make import BackendRequest, PlanReport, chosen_model, plan_report
from qwq_local.cli.ask import read_attachments
from qwq_local.cli.environment import Environment
from qwq_local.cli.flags import PlanFlags
from qwq_local.dialogue.conversation import Framing, fence
from qwq_local.errors import ExitStatus
from qwq_local.machine.description import read_machine
from qwq_local.paths import directories
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.terminal.chat_lines import choice_lines, device_lines, table_lines
from qwq_local.terminal.output import Output
from qwq_local.utf8 import check_utf8
from qwq_local.wire import json_line, readable, write_line

QUESTION = "?"


def plan(environment: Environment, flags: PlanFlags) -> int:
    """Shows the plan. Raises DoesNotFit after the table when no plan fits."""
    places = directories(environment.variables)
    flags = replace(flags, model=chosen_model(flags.model, places))
    folders = profile_folders(places)
    resolved = resolve(flags.model, flags.profile, folders, environment.variables, flags.settings or ())
    machine = read_machine(flags.machine, folders) if flags.machine else None
    request = BackendRequest(flags.model, resolved, places, machine)
    attachments, profile = tuple(read_attachments(flags.files)), resolved.profile
    framing = Framing(check_utf8(profile.system, "the system prompt"), attachments, profile.question_suffix)
    question = ReplyRequest(framing.messages(QUESTION), files=tuple(map(fence, attachments)))
    report = plan_report(request, question)
    if flags.as_json:
        write_line(environment.stdout, _plan_line(report))
    else:
        environment.print(*_lines(report, Output.of(environment.stdout, environment.variables)))
    if report.problem is not None:
        raise report.problem
    return ExitStatus.ANSWERED


def _plan_line(report: PlanReport) -> str:
    """The line of `--json`: model, machine, the table, and the plan or why there is none."""
    return json_line(
        {
            "model": report.model,
            "machine": readable(report.machine),
            "table": readable(report.rows),
            "plan": readable(report.planned),
            "error": report.problem and str(report.problem),
        }
    )


def _lines(report: PlanReport, out: Output) -> Iterator[str]:
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
