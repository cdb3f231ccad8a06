"""Files of a repository, downloaded and verified into the Hugging Face cache, with an event for each step.

For each file: take its lock, look for what is there, check the room on the disk, fetch the bytes, check their
hash, link the file into its snapshot. A file with a wrong hash is fetched once more, whole. When the hash is
wrong again, the file is deleted and the pull fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_local.errors import PullError
from qwq_local.files import allocated_bytes, free_bytes
from qwq_local.hub.cache import Digest, HubCache, hash_file, partial_path
from qwq_local.hub.client import Hub, Listing
from qwq_local.hub.partial import PartialBlob
from qwq_local.hub.source import RemoteFile, Source
from qwq_local.hub.transfer import (
    ByteRange,
    ContentChanged,
    NoRangeSupport,
    RetryWait,
    TransferSettings,
    TransientError,
)
from qwq_local.hub.workers import DownloadWorkers
from qwq_local.text import binary_size

SPARE_BYTES = 64 * 2**20
LOCK_RETRY_S = 0.5
PROGRESS_S = 0.1


@dataclass(frozen=True, slots=True)
class FileStarted:
    """File number `index` (from 0) of `count` begins; `here` of its bytes came earlier."""

    name: str
    index: int
    count: int
    n_bytes: int
    here: int


@dataclass(frozen=True, slots=True)
class BytesReceived:
    """`done` bytes of the file are here."""

    done: int


@dataclass(frozen=True, slots=True)
class BytesHashed:
    """All bytes are here; `done` of them are hashed."""

    done: int


@dataclass(frozen=True, slots=True)
class DownloadRestarted:
    """The bytes so far are of no use, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class FileDone:
    """A file is complete, verified and in its place; `fetched` is false when it was there already."""

    name: str
    path: Path
    fetched: bool


@dataclass(frozen=True, slots=True)
class FileLocked:
    """Another process downloads this file, and this process waits for it."""

    name: str


@dataclass(frozen=True, slots=True)
class SpaceFreed:
    """Abandoned partial files of earlier runs were deleted."""

    n_bytes: int


TransferEvent = BytesReceived | BytesHashed | RetryWait | DownloadRestarted
PullEvent = TransferEvent | FileStarted | FileDone | FileLocked | SpaceFreed


@dataclass(frozen=True, slots=True)
class Puller:
    """Where files come from and go to. `is_verified` says whether a file's content is known to be right."""

    hub: Hub
    cache: HubCache
    is_verified: Callable[[Path], bool] = lambda _path: False


def pull_files(
    puller: Puller, listing: Listing, files: Sequence[RemoteFile]
) -> Generator[PullEvent, None, list[Path]]:
    """Bring all the files. Returns their paths in the snapshot.

    Raises PullError when the disk lacks room, before a byte is fetched, and when a file does not come.
    """
    if freed := puller.cache.remove_stale_partials(time.time()):
        yield SpaceFreed(freed)
    _check_space(puller.cache, listing.repo, files)
    paths = []
    for index, file in enumerate(files):
        started = FileStarted(file.name, index, len(files), file.n_bytes, 0)
        is_reported = False
        while True:
            with puller.cache.lock(listing.repo, file.digest.hex) as is_mine:
                if is_mine:
                    paths.append((yield from _pull_file(puller, listing, file, started)))
                    break
            if not is_reported:
                yield FileLocked(file.name)
                is_reported = True
            puller.hub.settings.sleep(LOCK_RETRY_S)
    return paths


def _check_space(cache: HubCache, repo: str, files: Sequence[RemoteFile]) -> None:
    """Raise PullError unless the cache's disk has room for what is missing of the files."""
    blobs = [(file, cache.blob(repo, file.digest.hex)) for file in files]
    missing = sum(
        file.n_bytes - allocated_bytes(partial_path(blob)) for file, blob in blobs if not blob.is_file()
    )
    free = free_bytes(cache.folder(repo))
    if missing and free < missing + SPARE_BYTES:
        raise PullError(
            f"{cache.root} needs {binary_size(missing)} more, {binary_size(free)} are free. "
            "Free some space, choose a smaller type (`qwq pull --list`), or set HF_HUB_CACHE to another disk."
        )


def _pull_file(
    puller: Puller, listing: Listing, file: RemoteFile, started: FileStarted
) -> Generator[PullEvent, None, Path]:
    repo, etag = listing.repo, file.digest.hex
    blob = puller.cache.blob(repo, etag)
    is_here = yield from _is_complete(puller, blob, file)
    if not is_here and not blob.is_file():
        # Without symbolic and hard links, the blob itself was moved into its snapshot.
        path = puller.cache.snapshot(repo, listing.commit, file.name)
        if (yield from _is_complete(puller, path, file)):
            yield FileDone(file.name, path, fetched=False)
            return path
    if not is_here:
        yield from _fetch(puller, listing, file, started)
    path = puller.cache.publish(repo, listing.commit, file.name, etag)
    yield FileDone(file.name, path, fetched=not is_here)
    return path


def _is_complete(puller: Puller, path: Path, file: RemoteFile) -> Generator[PullEvent, None, bool]:
    """Whether the file is there with the right content, from huggingface_hub or an earlier run."""
    if not path.is_file():
        return False
    if path.stat().st_size == file.n_bytes:
        if puller.is_verified(path):
            return True
        running = file.digest.running(file.n_bytes)
        try:
            for done in hash_file(path, running):
                yield BytesHashed(done)
        except OSError as error:
            raise PullError(f"{path} cannot be read ({error.strerror}).") from None
        if running.hexdigest() == file.digest.hex:
            return True
    yield DownloadRestarted(f"{file.name} is here, but damaged")
    return False


def _fetch(
    puller: Puller, listing: Listing, file: RemoteFile, started: FileStarted
) -> Generator[PullEvent, None, None]:
    """Fetch a file until its hash is right, at most twice. Raises PullError."""
    blob = PartialBlob(puller.cache.blob(listing.repo, file.digest.hex), file.n_bytes)
    try:
        for is_last in (False, True):
            yield replace(started, here=blob.done.n_bytes)
            source = puller.hub.source(listing, file, blob.etag)
            try:
                if (yield from _download(source, blob, file.digest, puller.hub.settings)):
                    return blob.publish()
                reason = f"what came has another {file.digest.algorithm} than the hub states"
            except ContentChanged:
                reason = "the file on the server changed meanwhile"
            if not is_last:
                blob.restart()
                yield DownloadRestarted(f"{reason}; it is fetched once more, whole")
        blob.remove()
        raise PullError(
            f"{file.name}: {reason}, twice. Nothing of it was kept. "
            "Try again later, or another source with --repo."
        )
    finally:
        blob.close()


def _download(
    source: Source, blob: PartialBlob, digest: Digest, settings: TransferSettings
) -> Generator[TransferEvent, None, bool]:
    """Fetch what `blob` lacks. Returns whether the whole has the hash that the hub states.

    The hash is computed from the bytes on the disk. Raises ContentChanged when the server has another file
    now, and PullError when it cannot continue. Even then, and when the generator is closed, everything that
    came is in the journal.
    """
    try:
        hexdigest = yield from _download_ranges(source, blob, digest, settings)
    except NoRangeSupport:
        yield DownloadRestarted("the server sends whole files only, so this one cannot be resumed")
        hexdigest = yield from _download_whole(source, blob, digest, settings)
    return hexdigest == digest.hex


def _download_ranges(
    source: Source, blob: PartialBlob, digest: Digest, settings: TransferSettings
) -> Generator[TransferEvent, None, str]:
    workers = DownloadWorkers(source, blob, digest, settings)
    try:
        workers.start()
        while not workers.is_complete and workers.failure is None:
            yield BytesReceived(workers.n_received)
            yield from workers.wait(PROGRESS_S)
        yield BytesReceived(workers.n_received)
        while workers.n_hashed < blob.n_bytes and workers.failure is None:
            yield BytesHashed(workers.n_hashed)
            workers.wait(PROGRESS_S)
    finally:
        workers.stop()
    if workers.failure is not None:
        raise workers.failure
    return workers.hexdigest


def _download_whole(
    source: Source, blob: PartialBlob, digest: Digest, settings: TransferSettings
) -> Generator[TransferEvent, None, str]:
    """Fetch everything over one connection, from the first byte again when the connection is cut."""
    failures, next_report = 0, time.monotonic() + PROGRESS_S
    while True:
        blob.restart()
        running, done = digest.running(blob.n_bytes), 0
        try:
            with source.open_whole() as chunks:
                for chunk in chunks:
                    blob.write(done, chunk)
                    running.update(chunk)
                    done += len(chunk)
                    if time.monotonic() >= next_report:
                        next_report = time.monotonic() + PROGRESS_S
                        yield BytesReceived(done)
        except TransientError as error:
            failures += 1
            seconds = settings.wait_s(error, failures)
            yield RetryWait(error.reason, seconds)
            settings.sleep(seconds)
            continue
        blob.record(ByteRange(0, done))
        return running.hexdigest()
