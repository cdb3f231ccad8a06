"""Shards of weights that come one after the other and go again: names in, bytes out while they are here.

A thread fetches them in order, verified, at most two on the disk at a time: one being read and one ahead. A
shard goes when the caller says that it is done with. Readers wait for theirs. Knows no tensor and no GGUF.
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

MOST_SHARDS = 2
_LOOK_S = 0.2


Headers = Mapping[RemoteFile, frozenset[SourceTensor]]


class Stopped(Exception):
    """The work was ended from outside; not an error."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where shards lie: `shared` is the Hugging Face cache, `own` a cache for what goes again.

    What the shared cache has is read there; with `keep`, what it lacks is put there too.
    """

    shared: HubCache
    own: HubCache
    keep: bool = False


class ArrivingShards:
    """The shards of one repository; a context manager that ends all work when it is left."""

    def __init__(self, puller: Puller, listing: Listing, headers: Headers, keeping: Keeping) -> None:
        """`headers` are the shards in the order in which they are read, each with its tensors."""
        self._puller = puller
        self._listing = listing
        self._order = list(headers)
        self._headers = headers
        self._keeping = keeping
        self._changed = threading.Condition()
        self._here: dict[str, Shard] = {}
        self._present: set[str] = set()
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._n_waiting = 0
        self.events: queue.SimpleQueue[PullEvent] = queue.SimpleQueue()

    def __enter__(self) -> ArrivingShards:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for shard in self._here.values():
            shard.close()

    @property
    def is_starved(self) -> bool:
        """Whether a reader waits for a shard while both places are taken by others."""
        with self._changed:
            return self._n_waiting > 0 and len(self._present) >= MOST_SHARDS

    def read(self, name: str, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` of a shard from `offset`, when it has come; for several threads at once.

        Raises Stopped, and what went wrong with the download.
        """
        with self._changed:
            if self._thread is None:
                self._start_from(name)
            self._n_waiting += 1
            try:
                while name not in self._here:
                    if self._failure is not None:
                        raise self._failure
                    if self._stopped:
                        raise Stopped
                    self._changed.wait(_LOOK_S)
            finally:
                self._n_waiting -= 1
            if self._stopped:
                raise Stopped
            shard = self._here[name]
        return shard.read(offset, n_bytes)

    def release(self, name: str) -> None:
        """Nobody needs the shard any more: it is closed, and deleted where it was only passing through."""
        with self._changed:
            shard = self._here.pop(name, None)
            if shard is not None:
                shard.close()
            # An earlier run that was killed may have left it, so it need not have come in this one.
            self._delete(name)
            self._present.discard(name)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the download, which keeps what came, and wake all readers."""
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
                if not self._take_place(file.name):
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

    def _take_place(self, name: str) -> bool:
        """Wait until fewer than two shards are on the disk; False when the work is ended."""
        with self._changed:
            while len(self._present) >= MOST_SHARDS and not self._stopped:
                self._changed.wait(_LOOK_S)
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
        keeping = self._keeping
        is_there = keeping.shared.blob(self._listing.repo, file.content_hash.hexadecimal).is_file()
        return keeping.shared if keeping.keep or is_there else keeping.own

    def _delete(self, name: str) -> None:
        """Remove a shard from our own cache; the shared one is never touched."""
        own, listing = self._keeping.own, self._listing
        file = next(file for file in self._order if file.name == name)
        own.snapshot(listing.repo, listing.commit, name).unlink(missing_ok=True)
        own.blob(listing.repo, file.content_hash.hexadecimal).unlink(missing_ok=True)
