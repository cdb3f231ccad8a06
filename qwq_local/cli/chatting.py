"""How `qwq chat` begins: flags and surroundings in, a Talk and its screen out, exit status at the end."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from qwq_local.chat.chat import Chat
from qwq_local.chat.events import Said, Shown, Talk, ThinkView
from qwq_local.chat.setup import ChatBackend, ChatSetup
from qwq_local.cli.backends import local_backend, meant_model
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.interrupts import interrupts_call
from qwq_local.cli.pipes import closed_pipes_end_it, forgiving
from qwq_local.engine.devices import can_offload
from qwq_local.engine.library import TESTED_VERSION, divert_stderr, show_log
from qwq_local.errors import ExitStatus, UsageError
from qwq_local.history.archive import Archive
from qwq_local.history.records import ConversationRecord
from qwq_local.hub.cache import HubCache
from qwq_local.machine.here import idle_gpu_notice, present_gpu
from qwq_local.models.inventory import Places, local_models
from qwq_local.models.store import MINIATURE, Catalog
from qwq_local.paths import Directories, directories, make_private
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.files import Kind
from qwq_local.profiles.layers import ResolvedProfile, list_profiles, profile_folders, resolve
from qwq_local.reading import MAX_TEXT_BYTES, checked, decoded
from qwq_local.terminal.chat_lines import lines_of
from qwq_local.terminal.output import Output
from qwq_local.terminal.plain_chat import PlainChat, ReadLine
from qwq_local.terminal.sanitizer import one_line
from qwq_local.wire import write_line

DEFAULT_PROFILE = "chat"


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of `qwq chat`; None means what the conversation had, or the default."""

    files: tuple[Path, ...] = ()
    goes_on: bool = False
    resume: str | None = None
    system: str | None = None
    model: str | None = None
    profile: str | None = None
    settings: tuple[str, ...] = ()
    seed: int | None = None
    think: Literal["off", "excerpt", "tail", "full"] | None = None
    private: bool = False
    dry_run: bool = False
    verbose: bool = False


def chat(asked: Asked) -> int:
    """Talk in the real surroundings; the exit status."""
    if asked.verbose:
        show_log()
    else:
        sys.stderr = forgiving(divert_stderr())
    with closed_pipes_end_it():
        return chat_in(process_environment(), asked)


def chat_in(environment: Environment, asked: Asked) -> int:
    """Talk over these streams: with keys where both ends are a terminal that can draw, else line by line."""
    places = directories(environment.variables)
    out = Output.of(environment.stdout, environment.variables)
    err = Output.of(environment.stderr, environment.variables)
    with closing(_archive(asked, places)) as archive:
        talk = Chat(_setup(environment, asked, places, archive))
        if asked.dry_run:
            return _show_plan(environment, talk)
        if (idle := idle_gpu_notice(present_gpu(), can_offload=can_offload())) is not None:
            err.write(f"note: {one_line(idle, 500)}\n")
        if environment.stdin_is_terminal and out.is_live:
            return _draw(environment, talk, out, asked, places)
        view = ThinkView(asked.think) if asked.think else None
        plain = PlainChat(talk, _line_reader(environment, err), out, err, time.monotonic, view)
        with interrupts_call(plain.interrupt):
            is_fine = plain.run()
        return ExitStatus.ANSWERED if is_fine else ExitStatus.FAILED


def _archive(asked: Asked, places: Directories) -> Archive:
    if asked.private:
        if asked.goes_on or asked.resume:
            raise UsageError("--private has no past: leave it out to go on with a conversation.")
        return Archive.private()
    return Archive.open(make_private(places.data) / "history.sqlite3")


def _resumed(asked: Asked, archive: Archive) -> ConversationRecord | None:
    """The conversation to go on with, None for a new one."""
    if asked.resume:
        return archive.find(asked.resume)
    if not asked.goes_on:
        return None
    if (latest := archive.latest()) is None:
        raise UsageError("there is no conversation yet to go on with. Leave out --continue.")
    return latest


def _setup(environment: Environment, asked: Asked, places: Directories, archive: Archive) -> ChatSetup:
    resumed = _resumed(asked, archive)
    folders = profile_folders(places)

    def resolved(model: str, profile: str | None, settings: Sequence[str]) -> ResolvedProfile:
        return resolve(model, profile, folders, environment.variables, settings)

    def made(model: str, resolved: ResolvedProfile) -> ChatBackend:
        return local_backend(model, resolved, places, is_private=asked.private, is_roomy=True)[0]

    def model_names() -> list[str]:
        profile = resolve(DEFAULT_MODEL, None, folders, environment.variables).profile
        here = Places(places, Catalog(DEFAULT_MODEL, profile.repo, profile.files), HubCache.here())
        return [MINIATURE, *(model.name for model in local_models(here))]

    return ChatSetup(
        archive=archive,
        make_backend=made,
        resolve=resolved,
        model=meant_model(asked.model or (resumed.model if resumed else "") or DEFAULT_MODEL, places),
        profile=asked.profile or (resumed.profile if resumed else "") or DEFAULT_PROFILE,
        settings=asked.settings,
        system=asked.system if asked.system is None else checked(asked.system, "the system prompt"),
        seed=asked.seed,
        resume=resumed.id if resumed else None,
        entered=tuple(f"/file {shlex.quote(str(path))}" for path in asked.files),
        library=f"llama-cpp-python {TESTED_VERSION}",
        model_names=model_names,
        profile_names=lambda: [entry.name for entry in list_profiles(folders) if entry.kind is Kind.TASK],
    )


def _show_plan(environment: Environment, talk: Talk) -> int:
    """What `/plan` says of the first question, on stdout: it is what was asked for."""
    status = ExitStatus.ANSWERED
    with closing(talk):
        for event in chain(talk.start(), talk.submit("/plan")):
            if isinstance(event, Said) and event.is_error:
                status = ExitStatus.FAILED
            if isinstance(event, Shown):
                for text in lines_of(event):
                    write_line(environment.stdout, f"{text}\n")
    return status


def _draw(environment: Environment, talk: Talk, out: Output, asked: Asked, places: Directories) -> int:
    """The screen with keys."""
    from qwq_local.terminal.repl.app import Repl, ReplOptions

    place = ReplOptions(
        output=out,
        stdin=sys.stdin,
        environ=environment.variables,
        clock=time.monotonic,
        history=None if asked.private else make_private(places.data) / "chat_history",
        view=ThinkView(asked.think or ThinkView.TAIL),
    )
    return Repl(talk, place).run()


def _line_reader(environment: Environment, err: Output) -> ReadLine:
    """Lines of standard input; a person at a terminal is asked for them."""
    stdin = environment.stdin

    def read_line(prompt: str) -> str | None:
        if stdin is None:
            return None
        if environment.stdin_is_terminal:
            err.write(prompt)
        raw = stdin.readline(MAX_TEXT_BYTES + 1)
        if not raw and environment.stdin_is_terminal:
            err.write("\n")  # what comes after is not to stand behind the prompt
        return decoded(raw, "a line of standard input").rstrip("\r\n") if raw else None

    return read_line
