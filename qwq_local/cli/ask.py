"""`qwq ask`: one question from files, standard input and the argument; the answer alone on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, TypeVar

from qwq_local.backend.api import Backend, Identified, Keeps, Plans, ReplyRequest
from qwq_local.backend.make import LIBRARY, BackendRequest, check_constraint, chosen_model, hardware_notice
from qwq_local.backend.split import (
    Joining,
    PartDone,
    PartStarted,
    SplitBackend,
    SplitEvent,
    SplitRequest,
    answer_split,
    plan_split,
    summed,
)
from qwq_local.chat.conversation import history_messages
from qwq_local.chat.model import value_text
from qwq_local.cli.each import answer_each
from qwq_local.cli.environment import Environment, ReplyInterrupt, finish_stdout, interrupts_stop
from qwq_local.cli.flags import DEFAULT_PROFILE, AskFlags
from qwq_local.cli.output import (
    STATUS,
    EventWriter,
    JsonLines,
    ending,
    final_ledger,
    write_note,
    write_plan,
)
from qwq_local.dialogue.conversation import Attachment, Framing, fence
from qwq_local.engine.api import AnswerConstraint, JsonSchema, LarkGrammar, Regex
from qwq_local.errors import Aborted, ConstraintError, ExitStatus, QwqError, UsageError
from qwq_local.events import Finished, FinishReason, Notice, Planned, Thinking, TurnStats
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.background import AskedTurn, BackgroundRecorder
from qwq_local.history.records import ConversationRecord, TurnOrigin, TurnRecord
from qwq_local.machine.description import read_machine
from qwq_local.paths import Directories, directories, make_private
from qwq_local.planning.summary import stats_line
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import RECORDED_KEYS, Profile
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.terminal.ask_screen import AskScreen, SplitScreen, place_of, plan_line
from qwq_local.terminal.output import Output
from qwq_local.utf8 import MAX_TEXT_BYTES, check_utf8, decode_utf8, read_text
from qwq_local.wire import event_line, write_line

E = TypeVar("E", bound=SplitEvent)
MAX_CONSTRAINT_BYTES = 1 << 20
MAX_QUESTION_CHARS = 4000


@dataclass(frozen=True, slots=True)
class _Continued:
    """The conversation that `-c` continues, in its open history."""

    archive: Archive
    conversation: ConversationRecord
    turns: tuple[TurnRecord, ...]


@dataclass(frozen=True, slots=True)
class _Input:
    """What was read and checked: the prompt's parts, the constraint, the open file of `--think-to`."""

    model: str
    task: str
    profile: Profile
    framing: Framing
    continued: _Continued | None
    constraint: AnswerConstraint | None
    trace: TextIO | None
    question: str = ""
    stdin_text: str = ""


@dataclass(frozen=True, slots=True)
class _AskRun:
    """One run of the command: what was asked, who answers, where the events go.

    `recorder` keeps the answer in the history; None with `--private`. `interrupt` is what Ctrl-C does.
    """

    environment: Environment
    flags: AskFlags
    given: _Input
    backend: Backend
    writer: EventWriter
    recorder: BackgroundRecorder | None
    interrupt: ReplyInterrupt


def ask(environment: Environment, flags: AskFlags) -> int:
    """Answers the question. Returns the exit status.

    All input is read and checked before the model is looked up, and the model is looked up before it is
    loaded.
    """
    _check_together(flags)
    places = directories(environment.variables)
    folders = profile_folders(places)
    with ExitStack() as stack:
        continued = _continued(flags, places, stack)
        machine = read_machine(flags.machine, folders) if flags.machine else None
        before = continued.conversation if continued else None
        model = chosen_model(flags.model or (before.model if before else "") or DEFAULT_MODEL, places)
        task = flags.profile or (before.profile if before else "") or DEFAULT_PROFILE
        seed = [] if flags.seed is None else [f"seed={flags.seed}"]
        settings = [*(flags.settings or ()), *seed]
        resolved = resolve(model, task, folders, environment.variables, settings)
        given = _read(environment, flags, model, task, resolved.profile, continued)
        if given.trace is not None:
            stack.enter_context(given.trace)
        out = Output.of(environment.stdout, environment.variables)
        err = Output.of(environment.stderr, environment.variables)
        screen = AskScreen(out, err, time.monotonic, flags.think)
        writer = stack.enter_context(closing(JsonLines(environment.stdout) if flags.jsonl else screen))
        request = BackendRequest(model, resolved, places, machine, is_private=flags.private)
        for notice in resolved.notices:
            writer.show(Notice(notice))
        backend = stack.enter_context(closing(environment.make_backend(request)))
        interrupt = stack.enter_context(interrupts_stop(backend.stop))
        if (idle_gpu := hardware_notice(backend)) is not None:
            writer.show(Notice(idle_gpu))
        keeps_turn = not (flags.private or flags.dry_run or flags.each)
        recorder = _recorder(given, backend, places) if keeps_turn else None
        if recorder is not None:
            stack.callback(_finish, recorder, environment)
        run = _AskRun(environment, flags, given, backend, writer, recorder, interrupt)
        if flags.each:
            status = answer_each(environment, given.framing, given.constraint, backend, writer, interrupt)
            if status is not ExitStatus.INTERRUPTED:
                _keep(run)
            return status
        if flags.split and (done := _split(run)) is not None:
            return done
        return _answer(run)


def _check_together(flags: AskFlags) -> None:
    """Raises UsageError for flags that do not go together."""
    if flags.goes_on and flags.private:
        raise UsageError("--private has no past: leave it out to go on with a conversation.")
    if flags.goes_on and (flags.each or flags.split):
        raise UsageError("--continue asks one question: leave out --each and --split.")
    if flags.dry_run and flags.each:
        raise UsageError("--dry-run plans for one question: leave out --each.")
    if flags.machine and not flags.dry_run:
        raise UsageError("--machine describes another computer: add --dry-run, or see `qwq plan`.")
    if flags.each and flags.split:
        raise UsageError("--split asks one question of a long text: leave out --each.")
    if flags.each and (flags.question or flags.jsonl or flags.think_to):
        raise UsageError(
            "with --each the questions come as lines of JSON on standard input, and the answers likewise: "
            "leave out the question, --jsonl and --think-to."
        )


def _continued(flags: AskFlags, places: Directories, stack: ExitStack) -> _Continued | None:
    """The last conversation for `-c`; the stack closes its history. Raises UsageError, HistoryError."""
    if not flags.goes_on:
        return None
    path = places.data / FILE
    archive = stack.enter_context(Archive.to_read(path)) if path.exists() else None
    if archive is None or (latest := archive.latest()) is None:
        raise UsageError("there is no conversation yet to go on with. Leave out --continue.")
    return _Continued(archive, latest, tuple(archive.path(latest.id, with_tokens=False)))


def _recorder(given: _Input, backend: Backend, places: Directories) -> BackgroundRecorder:
    """Keeps the question and its answer in the history."""
    names = [attachment.name for attachment in given.framing.attachments]
    if given.question and given.stdin_text:
        names.append("standard input")
    # For the lists and the search of the history; the message that is kept holds all of the text.
    beginning = given.stdin_text[:MAX_QUESTION_CHARS] + "…" * (len(given.stdin_text) > MAX_QUESTION_CHARS)
    continued = given.continued
    asked = AskedTurn(
        command="ask",
        question=given.question or beginning or ", ".join(names),
        content=given.framing.messages(given.question, given.stdin_text)[-1].content,
        system=given.framing.system,
        files=tuple(names),
        conversation=continued.conversation.id if continued else None,
        parent=continued.turns[-1].id if continued and continued.turns else None,
    )

    def origin() -> TurnOrigin:
        return TurnOrigin(
            model=given.model,
            identity=backend.identity() if isinstance(backend, Identified) else "",
            library=LIBRARY if isinstance(backend, Identified) else "",
            profile=given.task,
            settings={key: value_text(given.profile, key) for key in RECORDED_KEYS},
            seed=given.profile.seed or 0,
        )

    def opened() -> Archive:
        return continued.archive if continued else Archive.open(make_private(places.data) / FILE)

    return BackgroundRecorder(opened, asked, origin)


def _finish(recorder: BackgroundRecorder, environment: Environment) -> None:
    for line in recorder.close():
        write_note(environment.stderr, line)


def _read(
    environment: Environment,
    flags: AskFlags,
    model: str,
    task: str,
    profile: Profile,
    continued: _Continued | None,
) -> _Input:
    """Reads everything that is needed before the model is looked up. Raises UsageError."""
    own = continued.conversation.system if continued else profile.system
    system = check_utf8(own if flags.system is None else flags.system, "the system prompt")
    constraint = read_constraint(flags.json_schema, flags.regex, flags.grammar)
    trace = _open_trace(flags)
    framing = Framing(system, tuple(read_attachments(flags.files)), profile.question_suffix)
    given = _Input(model, task, profile, framing, continued, constraint, trace)
    if flags.each:
        return given
    question = check_utf8(flags.question, "the question")
    raw = b"" if environment.stdin_is_terminal else environment.read_stdin(MAX_TEXT_BYTES + 1)
    stdin_text = decode_utf8(raw, "standard input")
    framing.messages(question, stdin_text)
    return replace(given, question=question, stdin_text=stdin_text)


def read_attachments(paths: list[Path] | None) -> list[Attachment]:
    """The text of each file, under the name it was given by. Raises UsageError with the file and the byte."""
    paths = paths or []
    if Path("-") in paths:
        raise UsageError("-f -: standard input is read without being named. Leave it out.")
    return [Attachment(str(path), read_text(path)) for path in paths]


def read_constraint(
    json_schema: Path | None, regex: str | None, grammar: Path | None
) -> AnswerConstraint | None:
    """The constraint that these flags put on the answer, checked. Raises UsageError for more than one."""
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
    """Within the block, a ConstraintError gets the file or flag it is about in front."""
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


class _PassTotals:
    """The passes so far: how many, their tokens and seconds, how the last one ended.

    With `--split` there are several; else the first one is the last.
    """

    def __init__(self, *, is_split: bool) -> None:
        self.is_split = is_split
        self.is_last = not is_split
        self.reason = FinishReason.INTERRUPTED
        self.count = 0
        self.spent = self.last = TurnStats()
        self.planned: Planned | None = None

    def take(self, event: SplitEvent) -> None:
        """Counts the pass that the event ends."""
        match event:
            case Planned():
                self.planned = event
            case PartDone():
                self._count(event.stats)
            case Joining():
                self.is_last = True
            case Finished():
                self.reason = event.reason
                if self.is_last:
                    self._count(event.stats)

    def _count(self, stats: TurnStats) -> None:
        self.count += 1
        self.last, self.spent = stats, summed(self.spent, stats)


def _answer(run: _AskRun) -> int:
    """Asks everything at once. Returns the exit status."""
    environment, flags, given, writer = run.environment, run.flags, run.given, run.writer
    shows_tokens = flags.jsonl and given.profile.logprobs is not None
    question = replace(_question(given), wants_tokens=run.recorder is not None or shows_tokens)
    if flags.dry_run:
        if not isinstance(run.backend, Plans):
            raise UsageError(f"--dry-run: {given.model} makes no plan.")
        write_plan(environment, run.backend.dry_run(question), jsonl=flags.jsonl)
        return ExitStatus.ANSWERED
    passes = _PassTotals(is_split=False)
    try:
        _show(run, run.backend.reply(question), writer.show, passes)
    except Aborted:
        return ExitStatus.INTERRUPTED
    if passes.reason is not FinishReason.INTERRUPTED:
        _keep(run)
    writer.close()
    return _status(run, passes)


def _show(run: _AskRun, events: Iterable[E], show: Callable[[E | Notice], None], passes: _PassTotals) -> None:
    """Shows, traces and records the events, then says why the answer is not whole."""
    flags, given = run.flags, run.given
    with constraint_errors_name(str(flags.json_schema or flags.grammar or "--regex")):
        for event in run.interrupt.watch(events):
            passes.take(event)
            if run.recorder is not None and passes.is_last:
                run.recorder.feed(event)
            show(event)
            if given.trace is not None:
                _write_trace(given.trace, event)
    if not flags.jsonl and (line := ending(passes.reason, given.profile)):
        show(Notice(line))


def _status(run: _AskRun, passes: _PassTotals) -> int:
    """Prints what `--stats` asks for. Returns the exit status."""
    if run.flags.stats:
        all_passes, last_pass = (f"{passes.count:,} passes: ", "last pass: ") if passes.is_split else ("", "")
        write_line(run.environment.stderr, f"{all_passes}{stats_line(passes.spent)}\n")
        if passes.planned is not None:
            line = f"{last_pass}{final_ledger(passes.planned, passes.last)}"
            write_line(run.environment.stderr, f"{line}\n")
    return STATUS[passes.reason]


def _write_trace(trace: TextIO, event: SplitEvent) -> None:
    """Writes the thinking; that of each pass of `--split` under a line that names the pass."""
    match event:
        case PartStarted():
            write_line(trace, f"--- {place_of(event)} ---\n")
        case Joining():
            write_line(trace, "--- the last pass ---\n")
        case PartDone():
            write_line(trace, "\n\n")
        case Thinking(text):
            write_line(trace, text)


def _question(given: _Input) -> ReplyRequest:
    """The question after the answered turns of the conversation."""
    turns = [turn for turn in given.continued.turns if turn.answer.strip()] if given.continued else []
    new = given.framing.messages(given.question, given.stdin_text)[-1]
    return ReplyRequest(
        [*history_messages(given.framing.system, turns), new],
        given.constraint,
        files=tuple(map(fence, given.framing.attachments)),
        dropped_thinking=sum(turn.stats.thinking_tokens for turn in turns),
    )


def _split(run: _AskRun) -> int | None:
    """Asks a text that does not fit in parts. Returns the exit status, or None when it fits after all.

    The answers of the parts are never lost: they are lines of JSON, stand on the terminal, or go to stderr
    when the run ends without a last answer.
    """
    environment, flags, given, writer = run.environment, run.flags, run.given, run.writer
    if not isinstance(backend := run.backend, SplitBackend):
        raise UsageError(f"--split: the tokens of {given.model} are not counted here. Leave it out.")
    request = SplitRequest(given.framing, given.stdin_text, given.question, given.constraint)
    try:
        plan = plan_split(backend, request, run.interrupt.is_stopped)
    except Aborted:
        return ExitStatus.INTERRUPTED
    if not plan.excerpts:
        writer.show(Notice(f"the text fits: {plan.planned.prompt_tokens:,} tokens, asked in one pass."))
        return None
    if flags.dry_run:
        planned = plan.event
        text = event_line(planned) if flags.jsonl else f"{plan_line(planned)}\nThe largest part:\n"
        write_line(environment.stdout, text)
        write_plan(environment, plan.planned, jsonl=flags.jsonl)
        return ExitStatus.ANSWERED
    writer.close()
    if run.recorder is not None:  # the text is too long to be sent again
        run.recorder.asked = replace(run.recorder.asked, content=given.question)
    out = Output.of(environment.stdout, environment.variables)
    err = Output.of(environment.stderr, environment.variables)
    screen = writer if isinstance(writer, JsonLines) else SplitScreen(out, err, time.monotonic, flags.think)
    passes = _PassTotals(is_split=True)
    try:
        _show(run, answer_split(backend, request, plan), screen.show, passes)
    except Aborted:
        passes.reason = FinishReason.INTERRUPTED
    except (QwqError, KeyboardInterrupt):
        screen.close()
        screen.show_hidden()
        raise
    screen.close()
    if passes.reason in (FinishReason.INTERRUPTED, FinishReason.NO_ANSWER):
        screen.show_hidden()
    return _status(run, passes)


def _keep(run: _AskRun) -> None:
    """Ends the output, then keeps what was prefilled, so that the reader of the answer does not wait."""
    run.writer.close()
    finish_stdout(run.environment.stdout)
    if isinstance(run.backend, Keeps):
        for notice in run.backend.keep():
            write_note(run.environment.stderr, notice.text)


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
