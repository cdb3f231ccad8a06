"""How `qwq ask` works: what was asked in, events to the screen, the files and the pipes, exit status out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TextIO

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.question import Question
from qwq_local.cli.backends import local_backend, meant_model
from qwq_local.cli.each import answer_each
from qwq_local.cli.endings import STATUS, ending, final_ledger
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.inputs import read_attachments, read_schema, read_stdin
from qwq_local.cli.interrupts import interrupts_to
from qwq_local.cli.pipes import closed_pipes_end_it, finish_stdout, forgiving
from qwq_local.cli.sinks import JsonLines, Remembering, Sink, Traced
from qwq_local.cli.splitting import Showing, answer_in_parts, check_schema, show_split_plan
from qwq_local.dialogue.conversation import Framing, fence
from qwq_local.engine.api import Aborted, AbortFlag
from qwq_local.engine.devices import can_offload
from qwq_local.engine.library import divert_stderr, show_log
from qwq_local.errors import EngineError, ExitStatus, SchemaError, UsageError
from qwq_local.events import Event, Finished, FinishReason, Notice, Planned
from qwq_local.machine.files import read_machine
from qwq_local.machine.here import idle_gpu_notice, present_gpu
from qwq_local.paths import Directories, directories
from qwq_local.planning.devices import Machine
from qwq_local.planning.words import stats_line
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import Profile, ResolvedProfile, profile_folders, resolve
from qwq_local.reading import checked
from qwq_local.splitting.plan import SplitRequest, plan_split
from qwq_local.terminal.ask_screen import AskScreen
from qwq_local.terminal.output import Output
from qwq_local.terminal.plan_view import planned_lines
from qwq_local.terminal.sanitizer import one_line
from qwq_local.wire import event_line, write_line


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of `qwq ask`."""

    question: str = ""
    files: tuple[Path, ...] = ()
    system: str | None = None
    model: str = DEFAULT_MODEL
    profile: str = "chat"
    settings: tuple[str, ...] = ()
    seed: int | None = None
    think: Literal["show", "hide"] | None = None
    think_to: Path | None = None
    json_schema: Path | None = None
    jsonl: bool = False
    each: bool = False
    split: bool = False
    private: bool = False
    dry_run: bool = False
    machine: str | None = None
    stats: bool = False
    verbose: bool = False


def ask(asked: Asked) -> int:
    """Answer what was asked, in the real surroundings; the exit status."""
    if asked.verbose:
        show_log()
    else:
        # What llama.cpp's C code prints goes nowhere; ours goes to a copy of the descriptor.
        sys.stderr = forgiving(divert_stderr())
    with closed_pipes_end_it():
        return ask_in(process_environment(), asked)


@dataclass(frozen=True, slots=True)
class _Read:
    """What was asked, read and checked."""

    profile: Profile
    framing: Framing
    question: str = ""
    stdin_text: str = ""
    schema: Mapping[str, object] | None = None
    trace: TextIO | None = None


def ask_in(environment: Environment, asked: Asked) -> int:
    """Answer what was asked with these streams and variables; the exit status.

    What was asked is read and checked before the model is looked for, and that before it is loaded.
    """
    places = directories(environment.variables)
    asked = replace(asked, model=meant_model(asked.model, places))
    resolved = _resolve(environment, asked, places)
    machine = _machine(asked, places)
    read = _read(environment, asked, resolved.profile)
    with ExitStack() as stack:
        if read.trace is not None:
            stack.enter_context(read.trace)
        sink = stack.enter_context(closing(_sink(environment, asked)))
        for notice in resolved.notices:
            sink.show(Notice(notice))
        backend, abort = local_backend(asked.model, resolved, places, machine, is_private=asked.private)
        stack.enter_context(closing(backend))
        stack.enter_context(interrupts_to(abort))
        if (idle := idle_gpu_notice(present_gpu(), can_offload=can_offload())) is not None:
            sink.show(Notice(idle))
        if asked.each:
            status = answer_each(environment, read.framing, read.schema, backend, sink)
            if status is not ExitStatus.INTERRUPTED:
                _keep(environment, backend, sink)
            return status
        if asked.split and (done := _split(environment, asked, read, (backend, abort), sink)) is not None:
            return done
        return _answer(environment, asked, read, backend, sink)


def _read(environment: Environment, asked: Asked, profile: Profile) -> _Read:
    """Everything that is read before a model is looked for. Raises UsageError, SchemaError."""
    system = checked(profile.system if asked.system is None else asked.system, "the system prompt")
    schema = read_schema(asked.json_schema) if asked.json_schema else None
    if asked.each:
        _refuse_with_each(asked)
    trace = _open_trace(asked)
    framing = Framing(system, tuple(read_attachments(asked.files)), profile.question_suffix)
    if asked.each:
        return _Read(profile, framing, schema=schema)
    question, stdin_text = checked(asked.question, "the question"), read_stdin(environment)
    framing.messages(question, stdin_text)
    return _Read(profile, framing, question, stdin_text, schema, trace)


def _answer(environment: Environment, asked: Asked, read: _Read, backend: LocalBackend, sink: Sink) -> int:
    """Ask everything in one pass; the exit status."""
    messages = read.framing.messages(read.question, read.stdin_text)
    question = Question(messages, read.schema, files=tuple(map(fence, read.framing.attachments)))
    if asked.dry_run:
        return _show_plan(environment, asked, backend.dry_run(question))
    remembering = Remembering(sink if read.trace is None else Traced(sink, read.trace))
    try:
        finished = _finished(backend.reply(question), remembering)
    except SchemaError as error:
        raise SchemaError(f"{asked.json_schema}{error}") from None
    if finished is None:
        return ExitStatus.INTERRUPTED
    if not asked.jsonl and (line := ending(finished.reason, read.profile)):
        sink.show(Notice(line))
    if finished.reason is not FinishReason.INTERRUPTED:
        _keep(environment, backend, sink)
    sink.close()
    if asked.stats:
        write_line(environment.stderr, stats_line(finished.stats) + "\n")
        if remembering.planned is not None:
            write_line(environment.stderr, final_ledger(remembering.planned, finished.stats) + "\n")
    return STATUS[finished.reason]


def _split(
    environment: Environment, asked: Asked, read: _Read, model: tuple[LocalBackend, AbortFlag], sink: Sink
) -> int | None:
    """Ask in parts what does not fit; the exit status, or nothing when it fits and that was said."""
    backend, abort = model
    check_schema(read.schema, asked.json_schema)
    n_ctx = read.profile.n_ctx or backend.provision.window.largest
    request = SplitRequest(read.framing, read.stdin_text, read.question, n_ctx, read.schema)
    try:
        plan = plan_split(backend, request, abort)
    except Aborted:
        return ExitStatus.INTERRUPTED
    if not plan.excerpts:
        sink.show(Notice(f"the text fits: {plan.planned.prompt_tokens:,} tokens, asked in one pass."))
        return None
    sink.close()
    showing = Showing(environment, read.profile, asked.jsonl, asked.think, read.trace, asked.stats)
    if asked.dry_run:
        return show_split_plan(plan, showing)
    return answer_in_parts(backend, request, plan, showing)


def _resolve(environment: Environment, asked: Asked, places: Directories) -> ResolvedProfile:
    settings = list(asked.settings)
    if asked.seed is not None:
        settings.append(f"seed={asked.seed}")
    folders = profile_folders(places)
    return resolve(asked.model, asked.profile, folders, environment.variables, settings)


def _machine(asked: Asked, places: Directories) -> Machine | None:
    """The described machine of --machine. Raises UsageError where nothing could be done with it."""
    if asked.dry_run and asked.each:
        raise UsageError("--dry-run plans for one question: leave out --each.")
    if asked.machine and not asked.dry_run:
        raise UsageError("--machine describes another computer: add --dry-run, or see `qwq plan`.")
    return read_machine(asked.machine, profile_folders(places)) if asked.machine else None


def _show_plan(environment: Environment, asked: Asked, planned: Planned) -> int:
    """The plan for the prompt, for a person or as its event, on stdout: it is what was asked for."""
    if asked.jsonl:
        write_line(environment.stdout, event_line(planned))
        return ExitStatus.ANSWERED
    out = Output.of(environment.stdout, environment.variables)
    for line in planned_lines(planned, out):
        write_line(environment.stdout, f"{line}\n")
    return ExitStatus.ANSWERED


def _keep(environment: Environment, backend: LocalBackend, sink: Sink) -> None:
    """Let go of the answer, then keep what was prefilled; who reads the answer does not wait for that."""
    sink.close()
    finish_stdout(environment.stdout)
    for notice in backend.keep():
        write_line(environment.stderr, f"note: {one_line(notice.text, 500)}\n")


def _sink(environment: Environment, asked: Asked) -> Sink:
    if asked.jsonl:
        return JsonLines(environment.stdout)
    out = Output.of(environment.stdout, environment.variables)
    err = Output.of(environment.stderr, environment.variables)
    return AskScreen(out, err, time.monotonic, asked.think)


def _refuse_with_each(asked: Asked) -> None:
    if asked.split:
        raise UsageError("--split asks one question of a long text: leave out --each.")
    if asked.question or asked.jsonl or asked.think_to:
        raise UsageError(
            "with --each the questions come as lines of JSON on standard input, and the answers likewise: "
            "leave out the question, --jsonl and --think-to."
        )


def _open_trace(asked: Asked) -> TextIO | None:
    """The file of --think-to, emptied. Raises UsageError when it cannot be written or is an input."""
    path = asked.think_to
    if path is None:
        return None
    try:
        if path.exists() and any(path.samefile(file) for file in asked.files):
            raise UsageError(f"--think-to {path} would overwrite a file that is to be read.")
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--think-to {path} cannot be written: {error.strerror}.") from None


def _finished(events: Iterator[Event], sink: Sink) -> Finished | None:
    """Show every event; the last one, or None when loading was interrupted."""
    try:
        for event in events:
            sink.show(event)
            if isinstance(event, Finished):
                return event
    except Aborted:
        return None
    raise EngineError("the turn ended without saying why.")
