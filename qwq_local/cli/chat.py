"""`qwq chat`: a conversation in the terminal, thinking apart from the answers, every turn kept."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import chain

from qwq_local.backend.api import Backend
from qwq_local.backend.make import LIBRARY, BackendRequest, chosen_model, hardware_notice
from qwq_local.chat.chat import Chat
from qwq_local.chat.events import Said, Shown, Talk, ThinkView
from qwq_local.chat.model import ChatSetup
from qwq_local.cli.environment import Environment, interrupts_call
from qwq_local.cli.flags import DEFAULT_PROFILE, ChatFlags
from qwq_local.cli.local import local_model_names
from qwq_local.cli.output import write_note
from qwq_local.errors import ExitStatus, UsageError
from qwq_local.history.archive import FILE, Archive
from qwq_local.models.store import MINIATURE
from qwq_local.paths import Directories, directories, make_private
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import ProfileKind, ResolvedProfile, list_profiles, profile_folders, resolve
from qwq_local.terminal.chat_lines import lines_of
from qwq_local.terminal.output import Output
from qwq_local.terminal.plain_chat import PlainChat, ReadLine
from qwq_local.utf8 import MAX_TEXT_BYTES, check_utf8, decode_utf8


def chat(environment: Environment, flags: ChatFlags) -> int:
    """Talks over these streams: with key bindings on a terminal that can draw, line by line elsewhere."""
    places = directories(environment.variables)
    out = Output.of(environment.stdout, environment.variables)
    err = Output.of(environment.stderr, environment.variables)
    with closing(_archive(flags, places)) as archive:
        talk = Chat(_setup(environment, flags, places, archive))
        if flags.dry_run:
            return _show_plan(environment, talk)
        if (notice := hardware_notice(talk.backend)) is not None:
            write_note(environment.stderr, notice)
        if environment.stdin_is_terminal and out.is_live:
            from qwq_local.terminal.repl.app import Repl, ReplOptions

            options = ReplOptions(
                output=out,
                stdin=sys.stdin,
                environ=environment.variables,
                clock=time.monotonic,
                history=None if flags.private else make_private(places.data) / "chat_history",
                view=ThinkView(flags.think or ThinkView.TAIL),
            )
            return Repl(talk, options).run()
        view = ThinkView(flags.think) if flags.think else None
        plain = PlainChat(talk, _line_reader(environment, err), out, err, time.monotonic, view)
        with interrupts_call(plain.interrupt):
            is_fine = plain.run()
        return ExitStatus.ANSWERED if is_fine else ExitStatus.FAILED


def _archive(flags: ChatFlags, places: Directories) -> Archive:
    if flags.private:
        if flags.goes_on or flags.resume:
            raise UsageError("--private has no past: leave it out to go on with a conversation.")
        return Archive.private()
    return Archive.open(make_private(places.data) / FILE)


def _setup(environment: Environment, flags: ChatFlags, places: Directories, archive: Archive) -> ChatSetup:
    resumed = archive.find(flags.resume) if flags.resume else archive.latest() if flags.goes_on else None
    if flags.goes_on and resumed is None:
        raise UsageError("there is no conversation yet to go on with. Leave out --continue.")
    folders = profile_folders(places)

    def resolved(model: str, profile: str | None, settings: Sequence[str]) -> ResolvedProfile:
        return resolve(model, profile, folders, environment.variables, settings)

    def made(model: str, resolved: ResolvedProfile) -> Backend:
        request = BackendRequest(model, resolved, places, is_private=flags.private, takes_largest=True)
        return environment.make_backend(request)

    settings = list(flags.settings or ())
    if flags.system is not None:
        settings.append(f"system={check_utf8(flags.system, 'the system prompt')}")
    if flags.seed is not None:
        settings.append(f"seed={flags.seed}")

    return ChatSetup(
        archive=archive,
        make_backend=made,
        resolve=resolved,
        model=chosen_model(flags.model or (resumed.model if resumed else "") or DEFAULT_MODEL, places),
        profile=flags.profile or (resumed.profile if resumed else "") or DEFAULT_PROFILE,
        settings=tuple(settings),
        resume=resumed.id if resumed else None,
        entered=tuple(f"/file {shlex.quote(str(path))}" for path in flags.files or ()),
        library=LIBRARY,
        model_names=lambda: [MINIATURE, *local_model_names(environment.variables)],
        profile_names=lambda: [
            entry.name for entry in list_profiles(folders) if entry.kind is ProfileKind.TASK
        ],
    )


def _show_plan(environment: Environment, talk: Talk) -> int:
    """Writes what `/plan` says of the first question to stdout."""
    status = ExitStatus.ANSWERED
    with closing(talk):
        for event in chain(talk.start(), talk.submit("/plan")):
            if isinstance(event, Said) and event.is_error:
                status = ExitStatus.FAILED
            if isinstance(event, Shown):
                environment.print(*lines_of(event))
    return status


def _line_reader(environment: Environment, err: Output) -> ReadLine:
    """Reads lines of standard input, with a prompt at a terminal."""
    stdin = environment.stdin

    def read_line(prompt: str) -> str | None:
        if stdin is None:
            return None
        if environment.stdin_is_terminal:
            err.write(prompt)
        raw = stdin.readline(MAX_TEXT_BYTES + 1)
        if not raw and environment.stdin_is_terminal:
            err.write("\n")  # ends the line of the prompt
        return decode_utf8(raw, "a line of standard input").rstrip("\r\n") if raw else None

    return read_line
