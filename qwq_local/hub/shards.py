"""Shards of weights, downloaded in order for one pass over them.

A thread downloads and verifies them, with at most two on the disk at a time: one that is read and the next
one. Readers wait until their shard is here. A shard is deleted when the caller releases it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_convert.safetensors import Shard, SourceTensor

from qwq_local.errors import PullError
from qwq_local.hub.cache import HubCache
from qwq_local.hub.client import Listing, RemoteFile
from qwq_local.hub.pull import Puller, PullEvent, pull_files

MAX_SHARDS = 2
_WAIT_S = 0.2

ShardHeaders = Mapping[RemoteFile, frozenset[SourceTensor]]
"""The shards in the order in which they are read, each with its tensors."""


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
