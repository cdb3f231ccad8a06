"""How `qwq pull` works: flags in, files chosen, the download's events to the screen, exit status out."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.pipes import refuse_stdout
from qwq_local.cli.pull_screen import PullScreen
from qwq_local.errors import ExitStatus, ModelFileError, PullError, UsageError
from qwq_local.hub.cache import HubCache
from qwq_local.hub.client import Hub, Listing
from qwq_local.hub.pull import Puller, PullEvent, pull_files
from qwq_local.hub.source import OFFLINE
from qwq_local.hub.workers import Pace
from qwq_local.models.catalog import (
    OFFICIAL_BYTES,
    Catalog,
    Offer,
    offer_of_file,
    offer_of_type,
    offers,
)
from qwq_local.models.inventory import Places, hub_name
from qwq_local.models.registry import State
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import ResolvedProfile, profile_folders, resolve
from qwq_local.terminal.output import Output
from qwq_local.text import binary_size, decimal_size
from qwq_local.wire import write_line

if TYPE_CHECKING:
    from qwq_local.models.fit import Fit

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Asked:
    """The flags of `qwq pull`."""

    file_type: str = ""
    repo: str | None = None
    file: str | None = None
    show_list: bool = False
    convert: str | None = None
    imatrix: Path | None = None
    out: Path | None = None
    keep_weights: bool = False


def pull(asked: Asked) -> int:
    """List, download or convert as asked, in the real surroundings; the exit status."""
    _check_together(asked)
    environment = process_environment()
    folders = profile_folders(directories(environment.variables))
    resolved = resolve(DEFAULT_MODEL, None, folders, environment.variables)
    places = places_of(environment, resolved)
    if asked.convert is not None:
        from qwq_local.cli.weights import pull_weights

        return pull_weights(asked, environment, resolved, places)
    screen = PullScreen(Output.of(environment.stderr, environment.variables), time.monotonic)
    repo = asked.repo or resolved.profile.repo
    hub = Hub(Pace())
    try:
        with screen.closed_at_the_end():
            if asked.show_list:
                return _list(environment, repo, hub, screen, resolved)
            return _download(asked, repo, hub, screen, places, resolved)
    except KeyboardInterrupt:
        screen.say("stopped; what came is kept. The same command goes on from there.")
        return ExitStatus.INTERRUPTED


def places_of(environment: Environment, resolved: ResolvedProfile) -> Places:
    """Where models are, for these variables and this model's profile."""
    profile = resolved.profile
    catalog = Catalog(resolved.model, profile.repo, profile.files)
    return Places(directories(environment.variables), catalog, HubCache.here(), environment.variables)


def _check_together(asked: Asked) -> None:
    if asked.convert is None and (asked.imatrix or asked.out or asked.keep_weights):
        raise UsageError("--imatrix, --out and --keep-weights go with --convert.")
    refuse_stdout(asked.out)
    if asked.file and (asked.file_type or asked.convert):
        raise UsageError("--file names one file: leave out the type.")
    if asked.convert is not None and (asked.file_type or asked.show_list):
        raise UsageError("--convert names the type itself: leave out the other one and --list.")


def drained(events: Generator[PullEvent, None, Result], screen: PullScreen) -> Result:
    """Show all events; what the generator returns in the end."""
    while True:
        try:
            screen.show(next(events))
        except StopIteration as finished:
            result: Result = finished.value
            return result


def _download(
    asked: Asked, repo: str, hub: Hub, screen: PullScreen, places: Places, resolved: ResolvedProfile
) -> int:
    registry = places.registry
    puller = Puller(hub, places.hub_cache, is_verified=registry.read().is_verified)
    try:
        listing = drained(hub.list_files(repo), screen)
    except PullError as error:
        if (path := _offline(asked, error, places, repo)) is None:
            raise
        screen.say(f"{path.name} is here already; the hub was not asked.")
        return ExitStatus.ANSWERED
    available = offers(listing)
    if asked.file is not None:
        offer = offer_of_file(listing, available, asked.file)
    elif asked.file_type:
        offer = offer_of_type(repo, available, asked.file_type)
    else:
        # These, as the check below, need numpy: not wanted where the type is given and the file is here.
        from qwq_local.cli.fitting import measured_fit
        from qwq_local.models.choose import best_offer

        choice = best_offer(repo, available, measured_fit(resolved.profile))
        screen.say(f"{choice.reason}.")
        offer = choice.offer
    if asked.repo or asked.file:
        _look_first(puller, listing, offer, screen)
    paths = drained(pull_files(puller, listing, offer.files), screen)
    problem = _problem(paths[0])
    name = _register(places, listing, offer, paths, is_runnable=problem is None)
    if problem is not None:
        raise ModelFileError(
            f"what came is what the hub has, but qwq cannot run it: {problem} "
            f"To be rid of it: qwq models rm {name}"
        )
    size = decimal_size(offer.n_bytes, 2)
    screen.say(f'{name} is ready: {size}. Try: qwq ask --model {name} "How many r\'s are in strawberry?"')
    return ExitStatus.ANSWERED


def _look_first(puller: Puller, listing: Listing, offer: Offer, screen: PullScreen) -> None:
    """Raises ModelFileError for what qwq could not run, before gigabytes of it come."""
    from qwq_local.models.first_look import look_first

    first = offer.files[0]
    if not puller.cache.blob(listing.repo, first.content_hash.hexadecimal).is_file():
        drained(look_first(puller.hub, listing, first, puller.pace), screen)


def _problem(path: Path) -> ModelFileError | None:
    """Why qwq could not run the file, if it could not."""
    from qwq_local.models.architecture import check_architecture
    from qwq_local.models.header import read_header

    try:
        check_architecture(read_header(path))
    except ModelFileError as error:
        return error
    return None


def _register(
    places: Places, listing: Listing, offer: Offer, paths: Sequence[Path], *, is_runnable: bool
) -> str:
    """Note the verified files; the name of the model. One that qwq cannot run is no default before others."""
    now = time.time()

    def with_files(state: State) -> State:
        for file, path in zip(offer.files, paths, strict=True):
            status = path.stat()
            record = replace(
                state.of(path),
                origin="pull",
                file_type=offer.file_type,
                repo=listing.repo,
                sha256=file.content_hash.hexadecimal,
                n_bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                verified_at=now,
                added_at=now if is_runnable else 0.0,
            )
            state = state.with_record(record)
        return state

    places.registry.change(with_files)
    return hub_name(places.catalog, listing.repo, offer.file_type, paths[0])


def _offline(asked: Asked, error: PullError, places: Places, repo: str) -> Path | None:
    """The file when no network was wanted and it is here anyway."""
    if str(error) != OFFLINE:
        return None
    name = asked.file or places.catalog.files.get(asked.file_type.upper(), "")
    return places.hub_cache.find(repo, name) if name else None


def _list(
    environment: Environment, repo: str, hub: Hub, screen: PullScreen, resolved: ResolvedProfile
) -> int:
    try:
        available = offers(drained(hub.list_files(repo), screen))
        rows = [(offer.file_type or "-", offer.n_bytes, len(offer.files), offer.name) for offer in available]
    except PullError as error:
        if repo != resolved.profile.repo:
            raise
        screen.say(f"{error}")
        screen.say("Sizes as they were published:")
        rows = [
            (kind, size, 1, resolved.profile.files.get(kind, "")) for kind, size in OFFICIAL_BYTES.items()
        ]
        rows.sort(key=lambda row: -row[1])
    from qwq_local.cli.fitting import measured_fit

    screen.close()
    for line in list_lines(repo, rows, measured_fit(resolved.profile)):
        write_line(environment.stdout, line + "\n")
    return ExitStatus.ANSWERED


def list_lines(repo: str, rows: Sequence[tuple[str, int, int, str]], fit: Fit) -> Iterator[str]:
    """The types as aligned lines: type, size, the context they leave room for here, the file."""
    from qwq_local.models.fit import LEAST_CONTEXT

    free = f"{binary_size(fit.memory.free_bytes)} free in {fit.memory.place}"
    yield f"{repo}; context with {free} and a {fit.kv_type} KV cache:"
    yield f"{'TYPE':<9} {'SIZE':>9}  {'CONTEXT':>9}  FILE"
    is_small = False
    for kind, n_bytes, n_parts, name in rows:
        context = fit.context(n_bytes)
        fits = (
            f"{context:,}" if context >= LEAST_CONTEXT else "too large" if not context else f"({context:,})"
        )
        parts = f" and {n_parts - 1} more" if n_parts > 1 else ""
        is_small = is_small or fits.startswith("(")
        yield f"{kind:<9} {decimal_size(n_bytes):>9}  {fits:>9}  {name}{parts}".rstrip()
    if is_small:
        yield f"(in brackets: less than the {LEAST_CONTEXT:,} tokens that `qwq pull` alone looks for)"
