"""`qwq ask`: one question from files, standard input and the argument; the answer alone on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.question import Question
from qwq_local.cli.backends import local_backend, meant_model
from qwq_local.cli.each import answer_each
from qwq_local.cli.environment import (
    Environment,
    finish_stdout,
    interrupts_to,
)
from qwq_local.cli.flags import AskFlags
from qwq_local.cli.output import STATUS, EventWriter, ending, event_writer, final_ledger, write_plan
from qwq_local.cli.split import SplitOutput, answer_in_parts, check_schema, show_split_plan
from qwq_local.dialogue.conversation import Attachment, Framing, fence
from qwq_local.engine.api import Aborted, AbortFlag
from qwq_local.engine.devices import can_offload
from qwq_local.errors import EngineError, ExitStatus, SchemaError, UsageError
from qwq_local.events import Finished, FinishReason, Notice, Planned, Thinking
from qwq_local.machine.files import read_machine
from qwq_local.machine.here import idle_gpu_notice, present_gpu
from qwq_local.paths import Directories, directories
from qwq_local.planning.devices import Machine
from qwq_local.planning.words import stats_line
from qwq_local.profiles.layers import Profile, ResolvedProfile, profile_folders, resolve
from qwq_local.reading import MAX_TEXT_BYTES, checked, decoded, read_text
from qwq_local.split.plan import SplitRequest, plan_split
from qwq_local.terminal.sanitizer import one_line
from qwq_local.wire import write_line

MAX_SCHEMA_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Input:
    """What was read and checked: the prompt's parts, the schema, the open file of `--think-to`."""

    profile: Profile
    framing: Framing
    question: str = ""
    stdin_text: str = ""
    schema: Mapping[str, object] | None = None
    trace: TextIO | None = None


def ask(environment: Environment, flags: AskFlags) -> int:
    """Answers the question; the exit status.

    All input is read and checked before the model is looked up, and the model is looked up before it is
    loaded.
    """
    places = directories(environment.variables)
    flags = replace(flags, model=meant_model(flags.model, places))
    resolved = _resolve(environment, flags, places)
    machine = _machine(flags, places)
    given = _read(environment, flags, resolved.profile)
    with ExitStack() as stack:
        if given.trace is not None:
            stack.enter_context(given.trace)
        writer = stack.enter_context(closing(event_writer(environment, flags.think, jsonl=flags.jsonl)))
        for notice in resolved.notices:
            writer.show(Notice(notice))
        backend, abort = local_backend(flags.model, resolved, places, machine, is_private=flags.private)
        stack.enter_context(closing(backend))
        stack.enter_context(interrupts_to(abort))
        if (idle := idle_gpu_notice(present_gpu(), can_offload=can_offload())) is not None:
            writer.show(Notice(idle))
        if flags.each:
            status = answer_each(environment, given.framing, given.schema, backend, writer)
            if status is not ExitStatus.INTERRUPTED:
                _keep(environment, backend, writer)
            return status
        if flags.split and (done := _split(environment, flags, given, backend, abort, writer)) is not None:
            return done
        return _answer(environment, flags, given, backend, writer)


def _read(environment: Environment, flags: AskFlags, profile: Profile) -> _Input:
    """Reads everything that is needed before the model is looked up. Raises UsageError, SchemaError."""
    system = checked(profile.system if flags.system is None else flags.system, "the system prompt")
    schema = _read_schema(flags.json_schema) if flags.json_schema else None
    if flags.each:
        _refuse_with_each(flags)
    trace = _open_trace(flags)
    framing = Framing(system, tuple(read_attachments(flags.files)), profile.question_suffix)
    if flags.each:
        return _Input(profile, framing, schema=schema)
    question, stdin_text = checked(flags.question, "the question"), _read_stdin(environment)
    framing.messages(question, stdin_text)
    return _Input(profile, framing, question, stdin_text, schema, trace)


def read_attachments(paths: list[Path] | None) -> list[Attachment]:
    """The text of each file, under the name it was given by. Raises UsageError with the file and the byte."""
    paths = paths or []
    if Path("-") in paths:
        raise UsageError("-f -: standard input is read without being named. Leave it out.")
    return [Attachment(str(path), read_text(path)) for path in paths]


def _read_stdin(environment: Environment) -> str:
    """What was piped in; empty when a person is at the terminal or there is no standard input."""
    if environment.stdin_is_terminal:
        return ""
    return decoded(environment.read_stdin(MAX_TEXT_BYTES + 1), "standard input")


def _read_schema(path: Path) -> Mapping[str, object]:
    """The JSON schema in a file. Raises SchemaError when it is not a JSON object."""
    raw = read_text(path, MAX_SCHEMA_BYTES)
    try:
        schema = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise SchemaError(f"{path} holds {json.dumps(schema)[:40]}; a JSON schema is an object.")
    return schema


def _answer(
    environment: Environment, flags: AskFlags, given: _Input, backend: LocalBackend, writer: EventWriter
) -> int:
    """Asks everything at once; the exit status."""
    messages = given.framing.messages(given.question, given.stdin_text)
    question = Question(messages, given.schema, files=tuple(map(fence, given.framing.attachments)))
    if flags.dry_run:
        write_plan(environment, backend.dry_run(question), jsonl=flags.jsonl)
        return ExitStatus.ANSWERED
    planned: Planned | None = None
    finished: Finished | None = None
    try:
        for event in backend.reply(question):
            writer.show(event)
            match event:
                case Planned():
                    planned = event
                case Thinking(text) if given.trace is not None:
                    write_line(given.trace, text)
                case Finished():
                    finished = event
    except Aborted:
        return ExitStatus.INTERRUPTED
    except SchemaError as error:
        raise SchemaError(f"{flags.json_schema}{error}") from None
    if finished is None:
        raise EngineError("the turn ended without saying why.")
    if not flags.jsonl and (line := ending(finished.reason, given.profile)):
        writer.show(Notice(line))
    if finished.reason is not FinishReason.INTERRUPTED:
        _keep(environment, backend, writer)
    writer.close()
    if flags.stats:
        write_line(environment.stderr, f"{stats_line(finished.stats)}\n")
        if planned is not None:
            write_line(environment.stderr, f"{final_ledger(planned, finished.stats)}\n")
    return STATUS[finished.reason]


def _split(
    environment: Environment,
    flags: AskFlags,
    given: _Input,
    backend: LocalBackend,
    abort: AbortFlag,
    writer: EventWriter,
) -> int | None:
    """Asks a text that does not fit in parts; the exit status. None when it fits, after saying so."""
    check_schema(given.schema, flags.json_schema)
    n_ctx = given.profile.n_ctx or backend.provision.window.largest
    request = SplitRequest(given.framing, given.stdin_text, given.question, n_ctx, given.schema)
    try:
        plan = plan_split(backend, request, abort)
    except Aborted:
        return ExitStatus.INTERRUPTED
    if not plan.excerpts:
        writer.show(Notice(f"the text fits: {plan.planned.prompt_tokens:,} tokens, asked in one pass."))
        return None
    writer.close()
    output = SplitOutput(environment, given.profile, flags.jsonl, flags.think, given.trace, flags.stats)
    if flags.dry_run:
        return show_split_plan(plan, output)
    return answer_in_parts(backend, request, plan, output)


def _resolve(environment: Environment, flags: AskFlags, places: Directories) -> ResolvedProfile:
    settings = list(flags.settings or ())
    if flags.seed is not None:
        settings.append(f"seed={flags.seed}")
    folders = profile_folders(places)
    return resolve(flags.model, flags.profile, folders, environment.variables, settings)


def _machine(flags: AskFlags, places: Directories) -> Machine | None:
    """The described machine of --machine. Raises UsageError for flags that do not go together."""
    if flags.dry_run and flags.each:
        raise UsageError("--dry-run plans for one question: leave out --each.")
    if flags.machine and not flags.dry_run:
        raise UsageError("--machine describes another computer: add --dry-run, or see `qwq plan`.")
    return read_machine(flags.machine, profile_folders(places)) if flags.machine else None


def _keep(environment: Environment, backend: LocalBackend, writer: EventWriter) -> None:
    """Ends the output, then keeps what was prefilled, so that the reader of the answer does not wait."""
    writer.close()
    finish_stdout(environment.stdout)
    for notice in backend.keep():
        write_line(environment.stderr, f"note: {one_line(notice.text, 500)}\n")


def _refuse_with_each(flags: AskFlags) -> None:
    if flags.split:
        raise UsageError("--split asks one question of a long text: leave out --each.")
    if flags.question or flags.jsonl or flags.think_to:
        raise UsageError(
            "with --each the questions come as lines of JSON on standard input, and the answers likewise: "
            "leave out the question, --jsonl and --think-to."
        )


def _open_trace(flags: AskFlags) -> TextIO | None:
    """The file of --think-to, emptied. Raises UsageError when it cannot be written or is an input."""
    path = flags.think_to
    if path is None:
        return None
    try:
        if path.exists() and any(path.samefile(file) for file in flags.files or ()):
            raise UsageError(f"--think-to {path} would overwrite a file that is to be read.")
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--think-to {path} cannot be written: {error.strerror}.") from None
