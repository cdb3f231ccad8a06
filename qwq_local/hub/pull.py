"""Files of a repository in, verified files in the Hugging Face cache out, told as events.

Each file: its lock, what is there already, room on the disk, the bytes, their hash, the snapshot link. A file
whose hash is wrong is fetched once more, whole; after that it is an error and nothing of it stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwq_local.errors import PullError
from qwq_local.files import allocated_bytes
from qwq_local.hub.cache import HubCache
from qwq_local.hub.client import Hub, Listing, RemoteFile
from qwq_local.hub.content_hash import hash_file
from qwq_local.hub.download import Hashing, StartedOver, TransferEvent, download
from qwq_local.hub.faults import Changed
from qwq_local.hub.partial import Partial, partial_path
from qwq_local.hub.source import Source
from qwq_local.hub.workers import Pace, still
from qwq_local.text import binary_size

SPARE_BYTES = 64 * 2**20
LOCK_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class FileStarted:
    """File number `index` (from 0) of `count` begins; `here` of its bytes came earlier."""

    name: str
    index: int
    count: int
    n_bytes: int
    here: int


@dataclass(frozen=True, slots=True)
class FileDone:
    """A file is whole, verified and in its place; `fetched` is False when it was there already."""

    name: str
    path: Path
    fetched: bool


@dataclass(frozen=True, slots=True)
class Locked:
    """Another process downloads this very file; this one waits for it."""

    name: str


@dataclass(frozen=True, slots=True)
class Freed:
    """Partial files that earlier runs abandoned are gone, and with them so many bytes."""

    n_bytes: int


PullEvent = TransferEvent | FileStarted | FileDone | Locked | Freed


@dataclass(frozen=True, slots=True)
class Puller:
    """Where files come from and go to, and what is known of those that are there."""

    hub: Hub
    cache: HubCache
    pace: Pace = field(default_factory=Pace)
    is_verified: Callable[[Path], bool] = lambda _path: False


def pull_files(
    puller: Puller, listing: Listing, files: Sequence[RemoteFile]
) -> Generator[PullEvent, None, list[Path]]:
    """Bring all the files; the value is their paths in the snapshot.

    Raises PullError when the disk lacks room, before a byte is fetched, and when a file cannot be had.
    """
    if freed := puller.cache.remove_stale_partials(time.time()):
        yield Freed(freed)
    check_space(puller.cache, listing.repo, files)
    paths = []
    for index, file in enumerate(files):
        etag = file.content_hash.hexadecimal
        told = False
        while True:
            with puller.cache.lock(listing.repo, etag) as is_mine:
                if is_mine:
                    started = FileStarted(file.name, index, len(files), file.n_bytes, 0)
                    paths.append((yield from _pull_file(puller, listing, file, started)))
                    break
            if not told:
                yield Locked(file.name)
                told = True
            puller.pace.pause(still(), LOCK_LOOK_S)
    return paths


def check_space(cache: HubCache, repo: str, files: Sequence[RemoteFile]) -> None:
    """Raise PullError unless the cache's disk has room for what is missing of the files."""
    blobs = [(file, cache.blob(repo, file.content_hash.hexadecimal)) for file in files]
    missing = sum(
        file.n_bytes - allocated_bytes(partial_path(blob)) for file, blob in blobs if not blob.is_file()
    )
    free = cache.free_bytes(repo)
    if missing and free < missing + SPARE_BYTES:
        raise PullError(
            f"{cache.root} needs {binary_size(missing)} more, {binary_size(free)} are free. "
            "Free some space, choose a smaller type (`qwq pull --list`), or set HF_HUB_CACHE to another disk."
        )


def _pull_file(
    puller: Puller, listing: Listing, file: RemoteFile, started: FileStarted
) -> Generator[PullEvent, None, Path]:
    repo, etag = listing.repo, file.content_hash.hexadecimal
    blob = puller.cache.blob(repo, etag)
    is_here = yield from _is_here_and_right(puller, blob, file)
    if not is_here and not blob.is_file():
        # Where there are neither symbolic nor hard links, the blob itself was moved to its snapshot.
        path = puller.cache.snapshot(repo, listing.commit, file.name)
        if (yield from _is_here_and_right(puller, path, file)):
            yield FileDone(file.name, path, fetched=False)
            return path
    if not is_here:
        yield from _fetch(puller, listing, file, started)
    path = puller.cache.publish(repo, listing.commit, file.name, etag)
    yield FileDone(file.name, path, fetched=not is_here)
    return path


def _is_here_and_right(puller: Puller, blob: Path, file: RemoteFile) -> Generator[PullEvent, None, bool]:
    """Whether the blob is there whole, as the hub's own client or an earlier run may have left it."""
    if not blob.is_file():
        return False
    if blob.stat().st_size == file.n_bytes:
        if puller.is_verified(blob):
            return True
        found: int | str = ""
        try:
            for found in hash_file(blob, file.content_hash.kind):
                if isinstance(found, int):
                    yield Hashing(found)
        except OSError as error:
            raise PullError(f"{blob} cannot be read ({error.strerror}).") from None
        if found == file.content_hash.hexadecimal:
            return True
    yield StartedOver(f"{file.name} is here, but damaged")
    return False


def _fetch(
    puller: Puller, listing: Listing, file: RemoteFile, started: FileStarted
) -> Generator[PullEvent, None, None]:
    """Fetch a file until its hash is right, at most twice. Raises PullError."""
    partial = Partial(puller.cache.blob(listing.repo, file.content_hash.hexadecimal), file.n_bytes)
    try:
        for is_last in (False, True):
            yield FileStarted(file.name, started.index, started.count, file.n_bytes, partial.done.n_bytes)
            source = Source(puller.hub.content(listing, file), partial.etag)
            try:
                if (yield from download(source, partial, file.content_hash, puller.pace)):
                    return partial.publish()
                reason = f"what came has another {file.content_hash.kind} than the hub states"
            except Changed:
                reason = "the file on the server changed meanwhile"
            if not is_last:
                partial.restart()
                yield StartedOver(f"{reason}; it is fetched once more, whole")
        partial.remove()
        raise PullError(
            f"{file.name}: {reason}, twice. Nothing of it was kept. "
            "Try again later, or another source with --repo."
        )
    finally:
        partial.close()
