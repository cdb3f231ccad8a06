"""A repository of safetensors weights as a checkpoint that the converter reads: headers first, tensors later.

`fetch_headers` fills a folder with the repository's documents and with a file for each shard. Each file has
the shard's full length and holds only its header, a few kilobytes that range requests bring; the rest is a
hole. So the converter's own reader makes all its checks before the weights are fetched. Documents are
verified at once, a header when its shard has come.

`RemoteCheckpoint` downloads the shards in order for one pass over them, with at most two on the disk at a
time: one that is read and the next one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Container, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_convert.checkpoint import INDEX, MAX_DOCUMENT_BYTES, CheckpointFolder
from qwq_convert.safetensors import MAX_HEADER_BYTES, Shard, SourceTensor

from qwq_local.errors import PullError
from qwq_local.hub.cache import HubCache
from qwq_local.hub.client import Hub, Listing
from qwq_local.hub.pull import Puller, PullEvent, pull_files
from qwq_local.hub.source import RemoteFile
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


class RemoteCheckpoint:
    """The weights of one repository at one commit, as qwq_convert's Checkpoint.

    One thread downloads the shards while others read them. `headers` is a folder that `fetch_headers` filled.
    `shards` are the files with tensors, in the order in which a conversion reads them.
    """

    def __init__(
        self, puller: Puller, listing: Listing, headers: CheckpointFolder, caches: ShardCaches
    ) -> None:
        self._puller = puller
        self._listing = listing
        self._headers = headers
        self._caches = caches
        self._tensors: dict[str, set[SourceTensor]] = {}
        for tensor in headers.tensors.values():
            self._tensors.setdefault(tensor.shard, set()).add(tensor)
        self.shards = [shard for shard in shards_of(listing) if shard.name in self._tensors]
        self._unreleased = {shard: {each.name for each in self._tensors[shard.name]} for shard in self.shards}
        self._changed = threading.Condition()
        self._here: dict[str, Shard] = {}
        self._present: set[str] = set()
        self._first_read = ""
        self._n_waiting_readers = 0
        self._is_stopped = False

    @property
    def label(self) -> str | None:
        """The repository's name."""
        return self._listing.repo

    @property
    def identity(self) -> str:
        """A digest of the shards' names and hashes."""
        states = "\n".join(f"{shard.name} {shard.digest.hex}" for shard in self.shards)
        return hashlib.sha256(states.encode()).hexdigest()

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor of every shard, by name."""
        return self._headers.tensors

    def document(self, name: str) -> bytes | None:
        """The content of the file `name`, or None when there is none."""
        return self._headers.document(name)

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of `tensor` from its byte `start`. Waits for the shard. Raises ShardsStopped."""
        with self._changed:
            self._first_read = self._first_read or tensor.shard
            self._n_waiting_readers += 1
            self._changed.wait_for(lambda: self._is_stopped or tensor.shard in self._here)
            self._n_waiting_readers -= 1
            if self._is_stopped:
                raise ShardsStopped
            shard = self._here[tensor.shard]
        return shard.read(n_bytes, tensor.place(start, n_bytes))

    @property
    def is_starved(self) -> bool:
        """Whether a reader waits for a shard while two other shards take the room."""
        with self._changed:
            return self._n_waiting_readers > 0 and len(self._present) >= MAX_SHARDS

    def download(self) -> Generator[PullEvent | None, None, None]:
        """Download the shards from the first one that is read. Yields None when it can only wait."""
        while not self._first_read:
            yield None
        names = [shard.name for shard in self.shards]
        for file in self.shards[names.index(self._first_read) :]:
            while len(self._present) >= MAX_SHARDS:
                yield None
            self._present.add(file.name)
            is_shared = self._caches.shared.blob(self._listing.repo, file.digest.hex).is_file()
            cache = self._caches.shared if self._caches.keep or is_shared else self._caches.own
            (path,) = yield from pull_files(replace(self._puller, cache=cache), self._listing, [file])
            shard = Shard(path)
            with self._changed:
                self._here[file.name] = shard
                self._changed.notify_all()
            if set(shard.tensors) != self._tensors[file.name]:
                raise PullError(f"{file.name}: its header changed meanwhile. Run the command again.")

    def release_finished(self, finished: Container[str]) -> None:
        """Release every shard whose tensors, by their names in the checkpoint, are all finished.

        A released shard is closed, and deleted unless it is in the shared cache.
        """
        own, listing = self._caches.own, self._listing
        for file, names in list(self._unreleased.items()):
            if all(name in finished for name in names):
                del self._unreleased[file]
                with self._changed:
                    self._present.discard(file.name)
                    if (shard := self._here.pop(file.name, None)) is not None:
                        shard.close()
                # Even when this run did not download it: an earlier run that was killed may have left it.
                own.snapshot(listing.repo, listing.commit, file.name).unlink(missing_ok=True)
                own.blob(listing.repo, file.digest.hex).unlink(missing_ok=True)

    def stop(self) -> None:
        """Wake all readers, which raise ShardsStopped."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Close the shards. Nothing may read them any more."""
        for shard in self._here.values():
            shard.close()
