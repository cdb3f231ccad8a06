"""Connections that fetch the missing ranges of one file in parallel, and a thread that hashes behind them.

At most `MAX_UNRECORDED_BYTES` are requested and not yet in the journal, whatever the buffers on the way hold:
a process that is killed loses no more than that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from qwq_local.errors import PullError
from qwq_local.hub.cache import BLOCK_BYTES, Digest
from qwq_local.hub.partial import PartialBlob
from qwq_local.hub.source import Source
from qwq_local.hub.transfer import (
    ByteRange,
    RetryWait,
    TransferSettings,
    TransientError,
)

MAX_UNRECORDED_BYTES = 12 * 2**20
_WAIT_S = 0.5  # a thread that waits looks this often, in case it misses a wake-up


class _Connection:
    """One connection: the range that it fetches, and the position in it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.range: ByteRange | None = None
        self.position = 0

    @property
    def n_received(self) -> int:
        fetching = self.range
        return self.position - fetching.start if fetching is not None else 0


class DownloadWorkers:
    """The threads of one download. Call `start`, look at it from time to time, and `stop` in every case."""

    def __init__(self, source: Source, blob: PartialBlob, digest: Digest, settings: TransferSettings) -> None:
        self._source = source
        self._blob = blob
        self._settings = settings
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._pending = blob.done.gaps(blob.n_bytes)
        self._connections = [_Connection() for _ in range(settings.connections)]
        self._running = set(self._connections) if self._pending else set()
        self._max_running = settings.connections
        self._n_waiting = 0
        self._waits: list[RetryWait] = []
        self._hash = digest.running(blob.n_bytes)
        self._hasher = self._thread(self._hash_blocks, "hash")
        self.n_hashed = 0
        self.failure: BaseException | None = None

    @property
    def n_received(self) -> int:
        """The number of bytes of the file that are here."""
        return self._blob.done.n_bytes + sum(each.n_received for each in self._connections)

    @property
    def is_complete(self) -> bool:
        """Whether every byte is here and in the journal."""
        return self._blob.done.n_bytes == self._blob.n_bytes

    @property
    def hexdigest(self) -> str:
        """The hash of the file, once `n_hashed` is its length."""
        return self._hash.hexdigest()

    def start(self) -> None:
        """Start to hash the bytes that are here and to fetch the others."""
        self._hasher.start()
        for connection in list(self._running):
            self._thread(partial(self._work, connection), "fetch").start()

    def wait(self, seconds: float) -> list[RetryWait]:
        """Sleep until something happens, at most `seconds`. Returns the waits since the last call."""
        with self._changed:
            self._changed.wait(seconds)
            waits, self._waits = self._waits, []
        return waits

    def stop(self) -> None:
        """End all work. Afterwards everything received is in the journal, and nothing more is written."""
        self._stopping.set()
        for connection in self._connections:
            # A connection checks under its lock whether to stop, so afterwards it writes no more.
            with connection.lock:
                try:
                    self._record(connection)
                except PullError as error:
                    self.failure = self.failure or error
        with self._changed:
            self._changed.notify_all()
        if self._hasher.is_alive():
            self._hasher.join()

    def _work(self, connection: _Connection) -> None:
        failures = 0
        try:
            while self._take_range(connection):
                before = connection.position
                try:
                    self._fetch(connection)
                    failures = 0
                except TransientError as error:
                    failures = 1 if connection.position > before else failures + 1
                    self._record(connection)
                    if not self._wait_for_retry(connection, error, failures):
                        return
                finally:
                    self._record(connection)
        finally:
            with self._changed:
                self._running.discard(connection)

    def _take_range(self, connection: _Connection) -> bool:
        """Give the connection its next range; false when there is none and will be none."""
        with self._changed:
            while not (self._stopping.is_set() or self.failure or self.is_complete):
                if len(self._running) > self._max_running:
                    self._running.discard(connection)
                    break
                if self._pending:
                    first = self._pending.pop(0)
                    end = min(first.end, first.start + MAX_UNRECORDED_BYTES // self._settings.connections)
                    self._give_back(ByteRange(end, first.end))
                    connection.position, connection.range = first.start, ByteRange(first.start, end)
                    return True
                self._changed.wait(_WAIT_S)
        return False

    def _give_back(self, rest: ByteRange) -> None:
        if rest.n_bytes > 0:
            self._pending = sorted([*self._pending, rest])

    def _fetch(self, connection: _Connection) -> None:
        fetching = connection.range
        if fetching is None:
            return
        with self._source.open(fetching) as chunks:
            with self._changed:
                if self._source.etag != self._blob.etag and not self._stopping.is_set():
                    self._blob.record_etag(self._source.etag)
            for chunk in chunks:
                with connection.lock:
                    if self._stopping.is_set():
                        return
                    self._blob.write(connection.position, chunk)
                    connection.position += len(chunk)

    def _record(self, connection: _Connection) -> None:
        """Note in the journal what the connection wrote, and give back the rest of its range."""
        with self._changed:
            fetching, connection.range = connection.range, None
            if fetching is None:
                return
            if connection.position > fetching.start:
                self._blob.record(ByteRange(fetching.start, connection.position))
            self._give_back(ByteRange(connection.position, fetching.end))
            self._changed.notify_all()

    def _wait_for_retry(self, connection: _Connection, error: TransientError, failures: int) -> bool:
        """Wait before the next try; false when this connection gives up and others still work."""
        try:
            seconds = self._settings.wait_s(error, failures)
        except PullError:
            with self._changed:
                if len(self._running) == 1:
                    raise
                self._running.discard(connection)
            return False
        with self._changed:
            if error.retry_after_s is not None:
                self._max_running = 1
            if not self._n_waiting:
                self._waits.append(RetryWait(error.reason, seconds))
                self._changed.notify_all()
            self._n_waiting += 1
        self._settings.pause(self._stopping, seconds)
        with self._changed:
            self._n_waiting -= 1
        return True

    def _hash_blocks(self) -> None:
        """Hash the file from its first byte, read back from the disk, as far as it has no gap."""
        while self.n_hashed < self._blob.n_bytes:
            with self._changed:
                while self._blob.done.front <= self.n_hashed:
                    if self._stopping.is_set() or self.failure:
                        return
                    self._changed.wait(_WAIT_S)
                front = self._blob.done.front
            while self.n_hashed < front and not self._stopping.is_set():
                block = self._blob.read(self.n_hashed, min(BLOCK_BYTES, front - self.n_hashed))
                if not block:
                    raise PullError(f"{self._blob.path} was cut by another program. Run the command again.")
                self._hash.update(block)
                self.n_hashed += len(block)
            if self._stopping.is_set():
                return

    def _thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        """A thread for some work, with its error kept in `failure`."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failure = self.failure or error
            finally:
                with self._changed:
                    self._changed.notify_all()

        return threading.Thread(target=run, name=name, daemon=True)
