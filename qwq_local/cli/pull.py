"""`qwq pull`: downloads a model, or the original weights to convert them, and registers the result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_local.cli.environment import Environment, refuse_stdout
from qwq_local.cli.flags import PullFlags
from qwq_local.cli.local import default_profile, measured_fit, model_places
from qwq_local.cli.screen import WorkScreen, drained
from qwq_local.errors import ExitStatus, ModelFileError, PullError, UsageError
from qwq_local.hub.client import Hub, Listing
from qwq_local.hub.pull import (
    BytesHashed,
    BytesReceived,
    DownloadRestarted,
    FileDone,
    FileLocked,
    FileStarted,
    Puller,
    PullEvent,
    SpaceFreed,
    pull_files,
)
from qwq_local.hub.transfer import OFFLINE, RetryWait, TransferSettings
from qwq_local.models.catalog import OFFICIAL_BYTES
from qwq_local.models.inventory import Places, hub_name
from qwq_local.models.offers import (
    Offer,
    best_offer,
    check_remote_header,
    offer_of_file,
    offer_of_type,
    offers,
)
from qwq_local.models.registry import RegistryState
from qwq_local.profiles.layers import ResolvedProfile
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import aligned_lines
from qwq_local.text import GB, binary_size, decimal_size, time_left

if TYPE_CHECKING:
    from qwq_local.models.facts import Fit

LEAST_WAIT_SHOWN_S = 2.0


def pull(environment: Environment, flags: PullFlags) -> int:
    """Lists, downloads or converts, as the flags say. Returns the exit status."""
    _check_together(flags)
    resolved = default_profile(environment.variables)
    places = model_places(environment.variables, resolved)
    if flags.convert is not None:
        from qwq_local.cli.pull_weights import pull_weights

        return pull_weights(flags, environment, resolved, places)
    screen = PullScreen(Output.of(environment.stderr, environment.variables))
    repo = flags.repo or resolved.profile.repo
    hub = Hub(TransferSettings())
    try:
        with closing(screen):
            if flags.show_list:
                return _list(environment, repo, hub, screen, resolved)
            return _download(flags, repo, hub, screen, places, resolved)
    except KeyboardInterrupt:
        screen.say("stopped; what came is kept. The same command goes on from there.")
        return ExitStatus.INTERRUPTED


def _check_together(flags: PullFlags) -> None:
    if flags.convert is None and (flags.imatrix or flags.out or flags.keep_weights):
        raise UsageError("--imatrix, --out and --keep-weights go with --convert.")
    refuse_stdout(flags.out)
    if flags.file and (flags.file_type or flags.convert):
        raise UsageError("--file names one file: leave out the type.")
    if flags.convert is not None and (flags.file_type or flags.show_list):
        raise UsageError("--convert names the type itself: leave out the other one and --list.")


def _download(
    flags: PullFlags, repo: str, hub: Hub, screen: PullScreen, places: Places, resolved: ResolvedProfile
) -> int:
    from qwq_local.models.architecture import check_architecture
    from qwq_local.models.header import read_header

    puller = Puller(hub, places.hub_cache, is_verified=places.registry.read().is_verified)
    try:
        listing = drained(hub.list_files(repo), screen.show)
    except PullError as error:
        if (path := _offline(flags, error, places, repo)) is None:
            raise
        screen.say(f"{path.name} is here already; the hub was not asked.")
        return ExitStatus.ANSWERED
    available = offers(listing)
    if flags.file is not None:
        offer = offer_of_file(listing, available, flags.file)
    elif flags.file_type:
        offer = offer_of_type(repo, available, flags.file_type)
    else:
        choice = best_offer(repo, available, measured_fit(resolved.profile))
        screen.say(f"{choice.reason}.")
        offer = choice.offer
    if flags.repo or flags.file:
        # A model that qwq cannot run is refused before gigabytes of it are fetched.
        first = offer.files[0]
        if not puller.cache.blob(listing.repo, first.digest.hex).is_file():
            drained(check_remote_header(puller.hub, listing, first), screen.show)
    paths = drained(pull_files(puller, listing, offer.files), screen.show)
    problem = None
    try:
        check_architecture(read_header(paths[0]))
    except ModelFileError as error:
        problem = error
    name = _register(places, listing, offer, paths, is_runnable=problem is None)
    if problem is not None:
        raise ModelFileError(
            f"what came is what the hub has, but qwq cannot run it: {problem} "
            f"To be rid of it: qwq models rm {name}"
        )
    size = decimal_size(offer.n_bytes, 2)
    screen.say(f'{name} is ready: {size}. Try: qwq ask --model {name} "How many r\'s are in strawberry?"')
    return ExitStatus.ANSWERED


def _register(
    places: Places, listing: Listing, offer: Offer, paths: Sequence[Path], *, is_runnable: bool
) -> str:
    """Registers the verified files. Returns the name of the model.

    A model that qwq cannot run does not become the default.
    """

    def with_files(state: RegistryState) -> RegistryState:
        for file, path in zip(offer.files, paths, strict=True):
            state = state.with_verified(
                path,
                origin="pull",
                file_type=offer.file_type,
                repo=listing.repo,
                sha256=file.digest.hex,
                added_at=time.time() if is_runnable else 0.0,
            )
        return state

    places.registry.change(with_files)
    return hub_name(places.catalog, listing.repo, offer.file_type, paths[0])


def _offline(flags: PullFlags, error: PullError, places: Places, repo: str) -> Path | None:
    """The file that is already here, when the hub may not be asked; None otherwise."""
    if str(error) != OFFLINE:
        return None
    name = flags.file or places.catalog.files.get(flags.file_type.upper(), "")
    return places.hub_cache.find(repo, name) if name else None


def _list(
    environment: Environment, repo: str, hub: Hub, screen: PullScreen, resolved: ResolvedProfile
) -> int:
    try:
        available = offers(drained(hub.list_files(repo), screen.show))
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
    screen.close()
    environment.print(*list_lines(repo, rows, measured_fit(resolved.profile)))
    return ExitStatus.ANSWERED


def list_lines(repo: str, rows: Sequence[tuple[str, int, int, str]], fit: Fit) -> Iterator[str]:
    """The types as aligned lines: type, size, the context that fits beside it here, the file."""
    from qwq_local.models.facts import MIN_CONTEXT

    free = f"{binary_size(fit.free_bytes)} free in {fit.place}"
    yield f"{repo}; context with {free} and a {fit.kv_type} KV cache:"
    table = [("TYPE", "SIZE", "CONTEXT", "FILE")]
    for kind, n_bytes, n_parts, name in rows:
        context = fit.context(n_bytes)
        fits = f"{context:,}" if context >= MIN_CONTEXT else "too large" if not context else f"({context:,})"
        parts = f" and {n_parts - 1} more" if n_parts > 1 else ""
        table.append((kind, decimal_size(n_bytes), fits, f"{name}{parts}"))
    yield from aligned_lines(table, right=(1, 2))
    if any(fits.startswith("(") for _, _, fits, _ in table):
        yield f"(in brackets: less than the {MIN_CONTEXT:,} tokens that `qwq pull` alone looks for)"


class PullScreen(WorkScreen):
    """Shows a download on stderr: a line drawn over itself on a terminal, lines now and then elsewhere.

    The amount shown never goes backwards. When a server makes the download start over, the screen says so,
    and the line waits until the download has passed the old amount.
    """

    _label = ""
    _total = 0
    _shown = 0

    def show(self, event: PullEvent) -> None:
        """Shows one event."""
        match event:
            case FileStarted():
                self._start(event)
            case BytesReceived(done):
                self._shown = max(self._shown, done)
                amounts = f"{self._shown / GB:.2f} / {self._total / GB:.2f} GB"
                self.update(f"{self._label} {amounts}", self._shown)
            case BytesHashed(done) if self._total:
                self.update(f"{self._label} checking, {done / self._total:.0%}", self._shown)
            case RetryWait(reason, seconds) if seconds >= LEAST_WAIT_SHOWN_S:
                self.say(f"{reason}: waiting {time_left(seconds)}.")
            case DownloadRestarted(reason):
                self.say(f"{reason}.")
            case FileLocked(name):
                self.say(f"another process is downloading {name}: waiting for it.")
            case SpaceFreed(n_bytes):
                self.say(f"{decimal_size(n_bytes)} of abandoned downloads were removed.")
            case FileDone(name, _, fetched):
                self.say(f"{name} is whole: sha256 verified." if fetched else f"{name} is here already.")
                self._line, self._shown = None, 0

    def _start(self, event: FileStarted) -> None:
        self._label = event.name.rpartition("/")[2]
        self._total = event.n_bytes
        self._shown = max(self._shown, event.here)
        parts = f" ({event.index + 1} of {event.count})" if event.count > 1 else ""
        here = f", {decimal_size(event.here, 2)} are here already" if event.here else ""
        if self._line is None:
            self.say(f"{event.name}{parts}: {decimal_size(event.n_bytes, 2)}{here}.")
            self.start(event.n_bytes, event.here)
