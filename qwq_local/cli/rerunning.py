"""How `qwq rerun` works: a turn of the history in, the same turn anew beside it, and where they part out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

from qwq_local.backend.local import LocalBackend
from qwq_local.chat.repeating import Compared, Comparison, Here, Resumed, Side, Stage, repeat, stages_of
from qwq_local.cli.backends import local_backend
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.interrupts import interrupts_to
from qwq_local.cli.jsonl import VERSION, write_line
from qwq_local.cli.pipes import closed_pipes_end_it, forgiving
from qwq_local.dialogue.difference import AROUND
from qwq_local.engine.api import Aborted
from qwq_local.engine.library import TESTED_VERSION, divert_stderr, show_log
from qwq_local.errors import ExitStatus, HistoryError, QwqError
from qwq_local.events import Prefill
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.records import TurnRecord
from qwq_local.models.content_hash import hash_file
from qwq_local.models.identity import header_sha256
from qwq_local.paths import Directories, directories
from qwq_local.profiles.layers import ResolvedProfile, profile_folders, resolve
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import StatusLine
from qwq_local.terminal.sanitize import one_line

LIBRARY = f"llama-cpp-python {TESTED_VERSION}"
# The settings that the plan of a turn decides over the profile's.
_PLANNED = ("n_ctx", "thinking_budget", "answer_reserve", "n_batch", "n_ubatch", "n_gpu_layers", "kv_type")


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of `qwq rerun`."""

    turn: str
    model: str = ""
    any_model: bool = False
    as_json: bool = False
    verbose: bool = False


def rerun(asked: Asked) -> int:
    """Repeat a turn, in the real surroundings; the exit status."""
    if asked.verbose:
        show_log()
    else:
        sys.stderr = forgiving(divert_stderr())
    with closed_pipes_end_it():
        return rerun_in(process_environment(), asked)


def rerun_in(environment: Environment, asked: Asked) -> int:
    """Repeat a turn and print how it compares. Raises HistoryError, UsageError and what a turn raises."""
    places = directories(environment.variables)
    turn = find_turn(places, asked.turn)
    stages = stages_of(turn)
    origin = stages[0].origin
    model = asked.model or origin.model

    def profile_of(stage: Stage) -> ResolvedProfile:
        return _resolved(environment, places, stage, model)

    with ExitStack() as stack:
        backend, abort = local_backend(model, profile_of(stages[0]), places, is_private=True)
        stack.enter_context(closing(backend))
        identity = _identity(backend, origin.identity)
        if origin.identity and identity != origin.identity and not asked.any_model:
            raise QwqError(
                f"the weights of {one_line(model, 60)} are not those of turn {turn.id}: {_short(identity)}, "
                f"then {_short(origin.identity)}. Name the right file with --model, or compare all the same "
                "with --any-model."
            )
        stack.enter_context(interrupts_to(abort))
        status = StatusLine(Output.of(environment.stderr, environment.variables), time.monotonic)
        stack.callback(status.erase)
        here = Here(backend, identity, LIBRARY, lambda stage: profile_of(stage).profile)
        comparison = _shown(repeat(turn, stages, here), status)
    if comparison is None:
        return ExitStatus.INTERRUPTED
    if asked.as_json:
        write_line(environment.stdout, json_line(comparison))
    else:
        for line in comparison_lines(comparison):
            write_line(environment.stdout, f"{line}\n")
    return ExitStatus.ANSWERED if comparison.difference is None else ExitStatus.FAILED


def find_turn(places: Directories, which: str) -> TurnRecord:
    """The turn with that id, or by its conversation and number. Raises HistoryError."""
    path = places.data / FILE
    if not path.exists():
        raise HistoryError("no conversation is kept yet; `qwq chat` keeps every one.")
    with Archive.to_read(path) as archive:
        archive.pick_up()
        conversation, colon, number = which.rpartition(":")
        if not number.isascii() or not number.isdigit() or len(number) > 18:
            raise HistoryError(f"{which[:60]!r} is no turn: give its id, or CONVERSATION:NUMBER such as 3:2.")
        if not colon:
            return archive.turn(int(number))
        record = archive.find(conversation)
        turns = archive.path(record.id)
        if not 1 <= int(number) <= len(turns):
            raise HistoryError(f"conversation {record.id} has {len(turns)} turns, not {int(number):,}.")
        return turns[int(number) - 1]


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """The result for a person."""
    found = comparison.difference
    if found is None:
        stopped = "" if comparison.is_whole else " as far as it was recorded: it was stopped there"
        yield f"turn {comparison.turn} is identical{stopped}, {comparison.n_characters:,} characters."
    else:
        yield f"turn {comparison.turn} differs in the {found.part} from character {found.position + 1:,} on."
        yield f"  recorded: {_excerpt(found.recorded, found.position)}"
        yield f"  rerun:    {_excerpt(found.rerun, found.position)}"
    yield f"recorded: {_side_line(comparison.recorded)}"
    yield f"rerun:    {_side_line(comparison.rerun)}"
    yield from map(_resumed_line, comparison.resumed)


def json_line(comparison: Comparison) -> str:
    """The result for a program."""
    value = {"v": VERSION, "is_identical": comparison.difference is None, **asdict(comparison)}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _resolved(environment: Environment, places: Directories, stage: Stage, model: str) -> ResolvedProfile:
    """The profile with the sampler and the plan of the stage set over it."""
    origin, plan = stage.origin, stage.plan
    settings = dict(origin.settings)
    settings |= {key: str(plan[key]) for key in _PLANNED if key in plan}
    settings["yarn"] = f"{origin.yarn_factor:g}" if origin.yarn_factor > 1 else "off"
    settings["flash_attention"] = "on" if plan.get("flash_attention", True) else "off"
    settings["seed"] = str(origin.seed)
    texts = [f"{key}={text}" for key, text in settings.items()]
    return resolve(model, origin.profile or None, profile_folders(places), environment.variables, texts)


def _identity(backend: LocalBackend, recorded: str) -> str:
    """Which weights these are, in the form that was recorded: by content, or by the header."""
    found = backend.identity()
    if recorded.partition(":")[0] == found.partition(":")[0]:
        return found
    header = backend.provision.header
    if recorded.startswith("header:"):
        return f"header:{header_sha256(header)}"
    if recorded.startswith("sha256:") and len(header.parts) == 1:
        *_, digest = hash_file(header.parts[0].path, "sha256")
        return f"sha256:{digest}"
    return found


def _shown(events: Iterator[Prefill | Compared | Comparison], status: StatusLine) -> Comparison | None:
    """Show how far it is; the result, or nothing when it was interrupted."""
    try:
        for event in events:
            match event:
                case Comparison():
                    return event
                case Prefill(done, total) if status.is_due:
                    status.draw(f"rerun · reading {done:,} of {total:,} tokens")
                case Compared(characters, total) if status.is_due:
                    status.draw(f"rerun · {characters:,} of {total:,} characters, all the same")
    except Aborted:
        pass
    return None


def _excerpt(text: str, position: int) -> str:
    """The characters around a place on one line, the place marked."""
    at = min(position, AROUND)
    before, after = one_line(f"|{text[:at]}|", 200)[1:-1], one_line(f"|{text[at:]}|", 200)[1:-1]
    return f"…{before}>>>{after}…" if position > AROUND else f"{before}>>>{after}…"


def _side_line(side: Side) -> str:
    """How a run was made, on one line."""
    prefill = "prefilled anew" if side.is_fresh else f"{side.cached_tokens:,} tokens were cached"
    return " · ".join((side.library or "library unknown", prefill, f"weights {_short(side.identity)}"))


def _resumed_line(resumed: Resumed) -> str:
    """Where the turn was gone on with, and what was cached by then."""
    return (
        f"gone on with after {resumed.generated:,} tokens: {resumed.recorded_cached:,} of all were cached "
        f"then, {resumed.rerun_cached:,} now"
    )


def _short(identity: str) -> str:
    return identity[: identity.find(":") + 13] or "unknown"
