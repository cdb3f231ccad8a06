"""Connections that fetch the missing ranges of one file in parallel, and a thread that hashes behind them.

At most `MAX_UNRECORDED_BYTES` are requested and not yet in the journal, whatever the buffers on the way hold:
a process that is killed loses no more than that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from qwq_local.errors import PullError
from qwq_local.hub.cache import BLOCK_BYTES, Digest, new_hash
from qwq_local.hub.partial import PartialBlob
from qwq_local.hub.source import Source
from qwq_local.hub.transfer import (
    ByteRange,
    ConcurrencySettings,
    PendingRanges,
    RetryWait,
    TransferSettings,
    TransientError,
)

MAX_UNRECORDED_BYTES = 12 * 2**20
_MIN_RANGE_BYTES = 256 * 1024
_WAIT_S = 0.5  # a thread that waits looks this often, in case it misses a wake-up


class Concurrency:
    """How many connections to use, found by trying while the bytes come.

    It starts with two: one receives while the other waits for an answer. It adds another as long as the last
    one made the whole faster by a tenth, and drops the one that did not.
    """

    def __init__(self, settings: ConcurrencySettings) -> None:
        self._settings = settings
        self._trial: tuple[float, int] | None = None
        self._best_rate = 0.0
        self._is_fixed = settings.first >= settings.max
        self.connections = settings.first

    def observe(self, now: float, n_bytes: int) -> None:
        """Take the number of bytes that are here, and the time of any clock in seconds."""
        if self._is_fixed:
            return
        if self._trial is None:
            self._trial = now, n_bytes
            return
        elapsed, received = now - self._trial[0], n_bytes - self._trial[1]
        if elapsed < self._settings.trial_s or received < self._settings.trial_bytes:
            return
        rate = received / elapsed
        if rate < self._best_rate * self._settings.gain:
            self.connections -= 1
            self._is_fixed = True
        elif self.connections == self._settings.max:
            self._is_fixed = True
        else:
            self._best_rate, self._trial = rate, None
            self.connections += 1

    def fix(self, connections: int) -> None:
        """Use this many from now on, as when the server complains of too many requests."""
        self.connections, self._is_fixed = connections, True


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
        self._pending = PendingRanges(blob.done.gaps(blob.n_bytes))
        self._connections: list[_Connection] = []
        self._running: set[int] = set()
        self._n_waiting = 0
        self._waits: list[RetryWait] = []
        self._hash = new_hash(digest.algorithm, blob.n_bytes)
        self._hasher = threading.Thread(target=self._guarded(self._hash_blocks), name="hash", daemon=True)
        self.concurrency = Concurrency(settings.concurrency)
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
        self.adapt()

    def adapt(self) -> None:
        """Start connections up to the current number. One too many ends with its range."""
        if self._pending.is_empty or self.failure:
            return
        for _ in range(self.concurrency.connections - len(self._running)):
            with self._changed:
                number = len(self._connections)
                self._connections.append(_Connection())
                self._running.add(number)
            work = self._guarded(partial(self._work, number), number)
            threading.Thread(target=work, name=f"fetch-{number}", daemon=True).start()

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

    def _work(self, number: int) -> None:
        connection, failures = self._connections[number], 0
        while self._take_range(number):
            try:
                before = connection.position
                self._fetch(connection)
                failures = 0
            except TransientError as error:
                failures = 1 if connection.position > before else failures + 1
                self._record(connection)
                if not self._wait_for_retry(number, error, failures):
                    return
            finally:
                self._record(connection)

    def _take_range(self, number: int) -> bool:
        """Give the connection its next range; false when there is none and will be none."""
        connection = self._connections[number]
        with self._changed:
            while not (self._stopping.is_set() or self.failure or self.is_complete):
                if len(self._running) > self.concurrency.connections:
                    self._running.discard(number)
                    break
                unrecorded = sum(each.range.n_bytes for each in self._connections if each.range is not None)
                # A share for every possible connection, so that a further one starts at once.
                share = MAX_UNRECORDED_BYTES // self._settings.concurrency.max
                room = min(share, MAX_UNRECORDED_BYTES - unrecorded)
                if not self._pending.is_empty and room >= _MIN_RANGE_BYTES:
                    taken = self._pending.take(room)
                    connection.position, connection.range = taken.start, taken
                    return True
                self._changed.wait(_WAIT_S)
        return False

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
            self._pending.give_back(ByteRange(connection.position, fetching.end))
            self._changed.notify_all()

    def _wait_for_retry(self, number: int, error: TransientError, failures: int) -> bool:
        """Wait before the next try; false when this connection gives up and others still work."""
        try:
            seconds = self._settings.retry.wait_s(error, failures)
        except PullError:
            with self._changed:
                if len(self._running) == 1:
                    raise
                self._running.discard(number)
                self.concurrency.fix(len(self._running))
            return False
        with self._changed:
            if error.retry_after_s is not None:
                self.concurrency.fix(1)
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

    def _guarded(self, work: Callable[[], None], number: int = -1) -> Callable[[], None]:
        """The work of a thread, with its error kept in `failure`."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                with self._changed:
                    self.failure = self.failure or error
            finally:
                with self._changed:
                    self._running.discard(number)
                    self._changed.notify_all()

        return run
