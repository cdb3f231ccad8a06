"""`qwq ask`: one question from files, standard input and the argument; the answer alone on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
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
from qwq_local.cli.split import SplitOutput, answer_in_parts, show_split_plan
from qwq_local.dialogue.conversation import Attachment, Framing, fence
from qwq_local.engine.api import Aborted, AbortFlag, AnswerConstraint, JsonSchema, LarkGrammar, Regex
from qwq_local.engine.constraint import check_constraint
from qwq_local.engine.devices import can_offload
from qwq_local.errors import ConstraintError, EngineError, ExitStatus, UsageError
from qwq_local.events import Finished, FinishReason, Notice, Planned, Thinking
from qwq_local.machine.description import read_machine
from qwq_local.machine.hardware import idle_gpu_notice, present_gpu
from qwq_local.paths import Directories, directories
from qwq_local.planning.memory import Machine
from qwq_local.planning.summary import stats_line
from qwq_local.profiles.layers import Profile, ResolvedProfile, profile_folders, resolve
from qwq_local.split.plan import SplitRequest, plan_split
from qwq_local.terminal.sanitizer import one_line
from qwq_local.utf8 import MAX_TEXT_BYTES, check_utf8, decode_utf8, read_text
from qwq_local.wire import write_line

MAX_CONSTRAINT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Input:
    """What was read and checked: the prompt's parts, the constraint, the open file of `--think-to`."""

    profile: Profile
    framing: Framing
    question: str = ""
    stdin_text: str = ""
    constraint: AnswerConstraint | None = None
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
            status = answer_each(environment, given.framing, given.constraint, backend, writer)
            if status is not ExitStatus.INTERRUPTED:
                _keep(environment, backend, writer)
            return status
        if flags.split and (done := _split(environment, flags, given, backend, abort, writer)) is not None:
            return done
        return _answer(environment, flags, given, backend, writer)


def _read(environment: Environment, flags: AskFlags, profile: Profile) -> _Input:
    """Reads everything that is needed before the model is looked up. Raises UsageError."""
    system = check_utf8(profile.system if flags.system is None else flags.system, "the system prompt")
    constraint = read_constraint(flags.json_schema, flags.regex, flags.grammar)
    if flags.each:
        _refuse_with_each(flags)
    trace = _open_trace(flags)
    framing = Framing(system, tuple(read_attachments(flags.files)), profile.question_suffix)
    if flags.each:
        return _Input(profile, framing, constraint=constraint)
    question, stdin_text = check_utf8(flags.question, "the question"), _read_stdin(environment)
    framing.messages(question, stdin_text)
    return _Input(profile, framing, question, stdin_text, constraint, trace)


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
    return decode_utf8(environment.read_stdin(MAX_TEXT_BYTES + 1), "standard input")


def read_constraint(
    json_schema: Path | None, regex: str | None, grammar: Path | None
) -> AnswerConstraint | None:
    """What the answer must obey by these flags, checked. Raises UsageError when there are two of them."""
    if sum(flag is not None for flag in (json_schema, regex, grammar)) > 1:
        raise UsageError(
            "--json-schema, --regex and --grammar: an answer obeys one of them. Leave out the rest."
        )
    constraint: AnswerConstraint
    if json_schema is not None:
        constraint = JsonSchema(_read_schema(json_schema))
    elif grammar is not None:
        constraint = LarkGrammar(read_text(grammar, MAX_CONSTRAINT_BYTES))
    elif regex is not None:
        constraint = Regex(check_utf8(regex, "--regex"))
    else:
        return None
    with constraint_errors_name(str(json_schema or grammar or "--regex")):
        check_constraint(constraint)
    return constraint


@contextmanager
def constraint_errors_name(source: str) -> Iterator[None]:
    """Let a ConstraintError begin with the file or flag that it is about."""
    try:
        yield
    except ConstraintError as error:
        colon = "" if str(error).startswith("#") else ": "
        raise ConstraintError(f"{source}{colon}{error}") from None


def _read_schema(path: Path) -> Mapping[str, object]:
    """The JSON schema in a file. Raises ConstraintError when it is not a JSON object."""
    raw = read_text(path, MAX_CONSTRAINT_BYTES)
    try:
        schema = json.loads(raw, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise ConstraintError(f"{path} holds {json.dumps(schema)[:40]}; a JSON schema is an object.")
    return schema


def _unique_names(members: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(members)
    if len(unique) < len(members):
        names = [name for name, _ in members]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has two members named {json.dumps(twice)}")
    return unique


def _answer(
    environment: Environment, flags: AskFlags, given: _Input, backend: LocalBackend, writer: EventWriter
) -> int:
    """Asks everything at once; the exit status."""
    messages = given.framing.messages(given.question, given.stdin_text)
    question = Question(messages, given.constraint, files=tuple(map(fence, given.framing.attachments)))
    if flags.dry_run:
        write_plan(environment, backend.dry_run(question), jsonl=flags.jsonl)
        return ExitStatus.ANSWERED
    planned: Planned | None = None
    finished: Finished | None = None
    try:
        with constraint_errors_name(str(flags.json_schema or flags.grammar or "--regex")):
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
    n_ctx = given.profile.n_ctx or backend.provision.window.largest
    request = SplitRequest(given.framing, given.stdin_text, given.question, n_ctx, given.constraint)
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
