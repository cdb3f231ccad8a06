"""How `qwq ask` works: what was asked in, events to the screen, the files and the pipes, exit status out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TextIO

from qwq_local.backend import LocalBackend
from qwq_local.cli.each import answer_each
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.inputs import Framing, checked, read_attachments, read_schema, read_stdin
from qwq_local.cli.interrupts import interrupts_to
from qwq_local.cli.jsonl import event_line, write_line
from qwq_local.cli.pipes import closed_pipes_end_it, finish_stdout, forgiving
from qwq_local.cli.sinks import JsonLines, Remembering, Sink, Traced
from qwq_local.dialogue.conversation import fence
from qwq_local.engine.api import Aborted, AbortFlag
from qwq_local.engine.devices import can_offload
from qwq_local.engine.library import divert_stderr, show_log
from qwq_local.errors import EngineError, ExitStatus, SchemaError, UsageError
from qwq_local.events import Event, Finished, FinishReason, Notice, Planned, TurnStats
from qwq_local.machine import idle_gpu_notice, physical_cores, present_gpu
from qwq_local.machine_files import read_machine
from qwq_local.models.store import Catalog, find_model
from qwq_local.paths import Directories, directories
from qwq_local.planning.devices import Machine
from qwq_local.planning.window import Window, larger_factor
from qwq_local.prefill_once import PrefillOnce
from qwq_local.profiles import Profile, ResolvedProfile, profile_folders, resolve
from qwq_local.question import Question
from qwq_local.terminal.output import Output
from qwq_local.terminal.plan_view import ledger_line, planned_lines
from qwq_local.terminal.sanitize import one_line
from qwq_local.terminal.screen import AskScreen

_STATUS = {
    FinishReason.STOP: ExitStatus.ANSWERED,
    FinishReason.MAX_TOKENS: ExitStatus.CUT,
    FinishReason.CONTEXT: ExitStatus.CUT,
    FinishReason.LOOP: ExitStatus.CUT,
    FinishReason.NO_ANSWER: ExitStatus.NO_ANSWER,
    FinishReason.INTERRUPTED: ExitStatus.INTERRUPTED,
}

_ENDINGS = {
    FinishReason.MAX_TOKENS: "the answer was cut at max_tokens. Raise it: --set max_tokens=N (0: no limit).",
    FinishReason.LOOP: "the answer was ended: it repeated itself. Another --seed may do better.",
    FinishReason.NO_ANSWER: "no answer came out of the thinking. Another --seed may do better.",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of `qwq ask`."""

    question: str = ""
    files: tuple[Path, ...] = ()
    system: str | None = None
    model: str = "qwq-32b"
    profile: str = "chat"
    settings: tuple[str, ...] = ()
    seed: int | None = None
    think: Literal["show", "hide"] | None = None
    think_to: Path | None = None
    json_schema: Path | None = None
    jsonl: bool = False
    each: bool = False
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


def ask_in(environment: Environment, asked: Asked) -> int:
    """Answer what was asked with these streams and variables; the exit status.

    What was asked is read and checked before the model is looked for, and that before it is loaded.
    """
    places = directories(environment.variables)
    resolved = _resolve(environment, asked, places)
    profile = resolved.profile
    machine = _machine(asked, places)
    system = checked(profile.system if asked.system is None else asked.system, "the system prompt")
    schema = read_schema(asked.json_schema) if asked.json_schema else None
    trace = _open_trace(asked)
    framing = Framing(system, tuple(read_attachments(asked.files)), profile.question_suffix)
    if asked.each:
        _refuse_with_each(asked)
        messages = []
    else:
        messages = framing.messages(checked(asked.question, "the question"), read_stdin(environment))
    with ExitStack() as stack:
        sink = stack.enter_context(closing(_sink(environment, asked)))
        for notice in resolved.notices:
            sink.show(Notice(notice))
        backend, abort = _backend(asked, resolved, places, machine)
        stack.enter_context(closing(backend))
        stack.enter_context(interrupts_to(abort))
        if (idle := idle_gpu_notice(present_gpu(), can_offload=can_offload())) is not None:
            sink.show(Notice(idle))
        if asked.each:
            status = answer_each(environment, framing, schema, backend, sink)
            if status is not ExitStatus.INTERRUPTED:
                _keep(environment, backend, sink)
            return status
        question = Question(messages, schema, files=tuple(map(fence, framing.attachments)))
        if asked.dry_run:
            return _show_plan(environment, asked, backend.dry_run(question))
        if trace is not None:
            sink = stack.enter_context(closing(Traced(sink, stack.enter_context(trace))))
        sink = Remembering(sink)
        try:
            finished = _finished(backend.reply(question), sink)
        except SchemaError as error:
            raise SchemaError(f"{asked.json_schema}{error}") from None
        if finished is None:
            return ExitStatus.INTERRUPTED
        if not asked.jsonl and (ending := _ending(finished.reason, profile)):
            sink.show(Notice(ending))
        if finished.reason is not FinishReason.INTERRUPTED:
            _keep(environment, backend, sink)
    if asked.stats:
        write_line(environment.stderr, stats_line(finished.stats) + "\n")
        if sink.planned is not None:
            write_line(environment.stderr, _final_ledger(sink.planned, finished.stats) + "\n")
    return _STATUS[finished.reason]


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


def _final_ledger(planned: Planned, stats: TurnStats) -> str:
    """The ledger after the turn: what was thought and said is no longer free."""
    said = stats.thinking_tokens + stats.answer_tokens
    ledger = replace(planned.ledger, free=max(0, planned.ledger.free - said))
    return f"{ledger_line(ledger, planned.n_ctx)} · this turn {said:,}"


def _backend(
    asked: Asked, resolved: ResolvedProfile, places: Directories, machine: Machine | None
) -> tuple[LocalBackend, AbortFlag]:
    profile = resolved.profile
    path = find_model(
        asked.model, Catalog(resolved.model, profile.repo, profile.files), places.cache, places.data
    )
    abort = AbortFlag()
    once = PrefillOnce(places.cache, profile, is_private=asked.private)
    return LocalBackend(path, profile, physical_cores(), abort, machine, once), abort


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


def _ending(reason: FinishReason, profile: Profile) -> str:
    """Why there is less of an answer than there should be and what would help, or nothing."""
    if reason is not FinishReason.CONTEXT:
        return _ENDINGS.get(reason, "")
    window = Window(profile.native_window, profile.yarn_factors, profile.yarn)
    if profile.n_ctx is not None and profile.n_ctx < window.largest:
        return f"the answer was cut: the context of {profile.n_ctx:,} tokens is full. Leave out n_ctx."
    mend = larger_factor(window.largest + 1, window) or (
        " Raise answer_reserve, or shorten the prompt." if window.yarn is None else " Shorten the prompt."
    )
    return f"the answer was cut: its context is full.{mend}"


def stats_line(stats: TurnStats) -> str:
    """The figures of a turn on one line."""
    return (
        f"prompt {stats.prompt_tokens:,} tok ({stats.cached_tokens:,} cached) in {stats.prefill_s:.2f} s, "
        f"{stats.prefill_rate:.1f} tok/s · thinking {stats.thinking_tokens:,} + answer "
        f"{stats.answer_tokens:,} tok in {stats.decode_s:.2f} s, {stats.decode_rate:.1f} tok/s"
    )
