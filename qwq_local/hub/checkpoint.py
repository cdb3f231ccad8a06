"""A repository of safetensors weights as a checkpoint that the converter reads: headers first, tensors later.

`fetch_headers` fills a folder with the repository's documents and with a file for each shard. Each file has
the shard's full length and holds only its header, a few kilobytes that range requests bring; the rest is a
hole. So the converter's own reader makes all its checks before the weights are fetched. Documents are
verified at once, a header when its shard has come.

`ShardDownloads` downloads the shards in order for one pass over them, with at most two on the disk at a time:
one that is read and the next one.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Container, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_convert.checkpoint import INDEX, MAX_DOCUMENT_BYTES, CheckpointFolder
from qwq_convert.safetensors import MAX_HEADER_BYTES, Shard, SourceTensor

from qwq_local.errors import PullError
from qwq_local.hub.cache import HubCache
from qwq_local.hub.client import Hub, Listing, RemoteFile
from qwq_local.hub.pull import Puller, PullEvent, pull_files
from qwq_local.hub.transfer import ByteRange, RetryWait

DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    INDEX,
)
FIRST_BYTES = 64 * 1024
MAX_SHARDS = 2
_WAIT_S = 0.2

ShardHeaders = Mapping[RemoteFile, frozenset[SourceTensor]]
"""The shards in the order in which they are read, each with its tensors."""


def shards_of(listing: Listing) -> tuple[RemoteFile, ...]:
    """The safetensors files at the top of the repository, by name. Raises PullError when there are none."""
    shards = [file for file in listing.files if file.name.endswith(".safetensors") and "/" not in file.name]
    if not shards:
        raise PullError(
            f"{listing.repo} has no safetensors weights. Name a repository of weights with --repo."
        )
    return tuple(sorted(shards, key=lambda file: file.name))


def fetch_headers(hub: Hub, listing: Listing, folder: Path) -> Generator[RetryWait, None, None]:
    """Fill the folder. Raises PullError when something does not come or has another hash than stated."""
    for file in listing.files:
        if file.name in DOCUMENTS:
            if file.n_bytes > MAX_DOCUMENT_BYTES:
                raise PullError(f"{file.name} has {file.n_bytes:,} bytes, too many for such a file.")
            content = yield from hub.read_range(listing, file, ByteRange(0, file.n_bytes))
            if not file.digest.matches(content):
                raise PullError(f"{file.name}: another hash than the hub states. Try again later.")
            _write(folder / file.name, content, len(content))
    for file in shards_of(listing):
        header = yield from _fetch_header(hub, listing, file)
        _write(folder / file.name, header, file.n_bytes)


def _fetch_header(hub: Hub, listing: Listing, file: RemoteFile) -> Generator[RetryWait, None, bytes]:
    first = yield from hub.read_range(listing, file, ByteRange(0, min(FIRST_BYTES, file.n_bytes)))
    end = 8 + int.from_bytes(first[:8], "little")
    # The reader refuses a header that is too long.
    end = min(end, file.n_bytes, 8 + MAX_HEADER_BYTES)
    if end <= len(first):
        return first[:end]
    rest = yield from hub.read_range(listing, file, ByteRange(len(first), end))
    return first + rest


def _write(path: Path, start: bytes, n_bytes: int) -> None:
    """Write a file of `n_bytes` that begins with `start`; the rest is a hole. Raises PullError."""
    try:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(n_bytes)
    except OSError as error:
        raise PullError(
            f"{path} cannot be written ({error.strerror}). Set TMPDIR to a folder on another disk."
        ) from None


class ShardsStopped(Exception):
    """`stop` was called while a reader waited; not an error."""


@dataclass(frozen=True, slots=True)
class ShardCaches:
    """Where shards are stored: `shared` is the Hugging Face cache, `own` a cache for shards that are deleted.

    A shard in the shared cache is read there. With `keep`, every other shard is downloaded into it too.
    """

    shared: HubCache
    own: HubCache
    keep: bool = False


class ShardDownloads:
    """The shards of one repository. A context manager that stops the download at the end of its block."""

    def __init__(self, puller: Puller, listing: Listing, headers: ShardHeaders, caches: ShardCaches) -> None:
        self._puller = puller
        self._listing = listing
        self._order = list(headers)
        self._headers = headers
        self._caches = caches
        self._changed = threading.Condition()
        self._here: dict[str, Shard] = {}
        self._present: set[str] = set()
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._n_waiting_readers = 0
        self.events: queue.SimpleQueue[PullEvent] = queue.SimpleQueue()

    def __enter__(self) -> ShardDownloads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for shard in self._here.values():
            shard.close()

    @property
    def is_starved(self) -> bool:
        """Whether a reader waits for a shard while two other shards take the room."""
        with self._changed:
            return self._n_waiting_readers > 0 and len(self._present) >= MAX_SHARDS

    def read(self, name: str, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` of a shard from `offset`. Waits for the shard. Several threads may read at once.

        Raises ShardsStopped, and the error that ended the download.
        """
        with self._changed:
            if self._thread is None:
                self._start_from(name)
            self._n_waiting_readers += 1
            try:
                while name not in self._here:
                    if self._failure is not None:
                        raise self._failure
                    if self._stopped:
                        raise ShardsStopped
                    self._changed.wait(_WAIT_S)
            finally:
                self._n_waiting_readers -= 1
            if self._stopped:
                raise ShardsStopped
            shard = self._here[name]
        return shard.read(offset, n_bytes)

    def release(self, name: str) -> None:
        """Close a shard that is no longer needed, and delete it unless it is in the shared cache."""
        with self._changed:
            shard = self._here.pop(name, None)
            if shard is not None:
                shard.close()
            # Even when it was not downloaded in this run: an earlier run that was killed may have left it.
            self._delete(name)
            self._present.discard(name)
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop the download, keep what came, and wake all readers."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _start_from(self, name: str) -> None:
        first = next(index for index, file in enumerate(self._order) if file.name == name)
        self._thread = threading.Thread(target=self._fetch_all, args=(first,), name="shards", daemon=True)
        self._thread.start()

    def _fetch_all(self, first: int) -> None:
        try:
            for file in self._order[first:]:
                if not self._wait_for_room(file.name):
                    return
                path = self._fetch(file)
                if path is None:
                    return
                shard = Shard(path)
                if frozenset(shard.tensors) != self._headers[file]:
                    shard.close()
                    raise PullError(f"{file.name}: its header changed meanwhile. Run the command again.")
                with self._changed:
                    self._here[file.name] = shard
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_room(self, name: str) -> bool:
        """Wait until fewer than two shards are on the disk; false after `stop`."""
        with self._changed:
            while len(self._present) >= MAX_SHARDS and not self._stopped:
                self._changed.wait(_WAIT_S)
            self._present.add(name)
            return not self._stopped

    def _fetch(self, file: RemoteFile) -> Path | None:
        puller = replace(self._puller, cache=self._cache_for(file))
        fetching = pull_files(puller, self._listing, [file])
        while True:
            try:
                self.events.put(next(fetching))
            except StopIteration as finished:
                paths: list[Path] = finished.value
                return paths[0]
            if self._stopped:
                fetching.close()
                return None

    def _cache_for(self, file: RemoteFile) -> HubCache:
        caches = self._caches
        is_there = caches.shared.blob(self._listing.repo, file.digest.hex).is_file()
        return caches.shared if caches.keep or is_there else caches.own

    def _delete(self, name: str) -> None:
        """Delete a shard from our own cache. The shared cache is never touched."""
        own, listing = self._caches.own, self._listing
        file = next(file for file in self._order if file.name == name)
        own.snapshot(listing.repo, listing.commit, name).unlink(missing_ok=True)
        own.blob(listing.repo, file.digest.hex).unlink(missing_ok=True)


def headers_of(shards: Iterable[RemoteFile], headers: CheckpointFolder) -> ShardHeaders:
    """Each shard with its tensors, in the order in which a conversion reads the shards."""
    tensors: dict[str, set[SourceTensor]] = {}
    for tensor in headers.tensors.values():
        tensors.setdefault(tensor.shard, set()).add(tensor)
    return {shard: frozenset(tensors[shard.name]) for shard in shards if shard.name in tensors}


class RemoteCheckpoint:
    """The weights of one repository at one commit, as qwq_convert's Checkpoint."""

    def __init__(
        self, repo: str, shards: ShardHeaders, headers: CheckpointFolder, downloads: ShardDownloads
    ) -> None:
        self._repo = repo
        self._shards = shards
        self._headers = headers
        self._downloads = downloads
        self._unreleased = {shard.name: {tensor.name for tensor in shards[shard]} for shard in shards}

    @property
    def label(self) -> str | None:
        """The repository's name."""
        return self._repo

    @property
    def identity(self) -> str:
        """A digest of the shards' names and hashes."""
        states = "\n".join(f"{shard.name} {shard.digest.hex}" for shard in self._shards)
        return hashlib.sha256(states.encode()).hexdigest()

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor of every shard, by name."""
        return self._headers.tensors

    def document(self, name: str) -> bytes | None:
        """The content of the file `name`, or None when there is none."""
        return self._headers.document(name)

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of `tensor` from its byte `start`. Waits for the shard."""
        return self._downloads.read(tensor.shard, tensor.place(start, n_bytes), n_bytes)

    def release_finished(self, finished: Container[str]) -> None:
        """Release every shard whose tensors, by their names in the checkpoint, are all finished."""
        for shard, names in list(self._unreleased.items()):
            if all(name in finished for name in names):
                del self._unreleased[shard]
                self._downloads.release(shard)
