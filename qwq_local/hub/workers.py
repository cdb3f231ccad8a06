"""Several connections that fetch the missing spans of one file, and a thread that hashes behind them.

Comes in: a source and a partial file. Goes out: the file's bytes on the disk, every finished span in the
journal. What is asked for and not yet in the journal never exceeds `OUTSTANDING_BYTES`, whatever the buffers
on the way hold: that is all that a killed process can lose. Knows no events and no user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from qwq_local.errors import PullError
from qwq_local.hub.content_hash import BLOCK_BYTES, ContentHash
from qwq_local.hub.faults import Patience, Transient
from qwq_local.hub.partial import Partial
from qwq_local.hub.ranges import Schedule, Span
from qwq_local.hub.source import Source
from qwq_local.hub.tempo import Tempo, TempoSettings

OUTSTANDING_BYTES = 12 * 2**20
_LEAST_SPAN = 256 * 1024
_WAIT_S = 0.5  # a thread that sleeps looks up this often, should a wake-up be missed


@dataclass(frozen=True, slots=True)
class Pace:
    """How patient and how parallel a download is; `pause` waits on an event for some seconds."""

    patience: Patience = field(default_factory=Patience)
    tempo: TempoSettings = field(default_factory=TempoSettings)
    pause: Callable[[threading.Event, float], object] = threading.Event.wait


@dataclass(frozen=True, slots=True)
class Wait:
    """A connection waits before it tries again: why, and for how many seconds."""

    reason: str
    seconds: float


def still() -> threading.Event:
    """An event that never comes, for a wait that nothing cuts short."""
    return threading.Event()


class _Lane:
    """One connection: the span it fetches and how far it is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.span: Span | None = None
        self.at = 0

    @property
    def arrived(self) -> int:
        span = self.span
        return self.at - span.start if span is not None else 0


class Crew:
    """The threads of one download; `start`, look at it from time to time, `stop` whatever happened."""

    def __init__(self, source: Source, arriving: Partial, content_hash: ContentHash, pace: Pace) -> None:
        self._source = source
        self._partial = arriving
        self._pace = pace
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._schedule = Schedule(arriving.done.gaps(arriving.n_bytes))
        self._lanes: list[_Lane] = []
        self._live: set[int] = set()
        self._n_waiting = 0
        self._waits: list[Wait] = []
        self._hash = content_hash.start(arriving.n_bytes)
        self._hasher = threading.Thread(target=self._guarded(self._follow), name="hash", daemon=True)
        self.tempo = Tempo(pace.tempo)
        self.hashed = 0
        self.failure: BaseException | None = None

    @property
    def arrived(self) -> int:
        """How many bytes of the file are here."""
        return self._partial.done.n_bytes + sum(lane.arrived for lane in self._lanes)

    @property
    def is_complete(self) -> bool:
        """Whether every byte is here and in the journal."""
        return self._partial.done.n_bytes == self._partial.n_bytes

    @property
    def hexdigest(self) -> str:
        """The hash of the file, once `hashed` is its length."""
        return self._hash.hexdigest()

    def start(self) -> None:
        """Start hashing what is there and fetching what is not."""
        self._hasher.start()
        self.adapt()

    def adapt(self) -> None:
        """Bring the number of connections to what the tempo says; superfluous ones end with their span."""
        if self._schedule.is_empty or self.failure:
            return
        for _ in range(self.tempo.connections - len(self._live)):
            with self._changed:
                number = len(self._lanes)
                self._lanes.append(_Lane())
                self._live.add(number)
            work = self._guarded(partial(self._work, number), number)
            threading.Thread(target=work, name=f"fetch-{number}", daemon=True).start()

    def wait(self, seconds: float) -> list[Wait]:
        """Sleep until something happens, at most `seconds`; the waits that connections began since."""
        with self._changed:
            self._changed.wait(seconds)
            waits, self._waits = self._waits, []
        return waits

    def stop(self) -> None:
        """End all work; what has arrived is in the journal, and nothing is written any more."""
        self._stopping.set()
        for lane in self._lanes:
            # Afterwards the lane writes no more: it asks under its lock whether to stop.
            with lane.lock:
                try:
                    self._settle(lane)
                except PullError as error:
                    self.failure = self.failure or error
        with self._changed:
            self._changed.notify_all()
        if self._hasher.is_alive():
            self._hasher.join()

    def _work(self, number: int) -> None:
        lane, failures = self._lanes[number], 0
        while self._take(number):
            try:
                before = lane.at
                self._fetch(lane)
                failures = 0
            except Transient as fault:
                failures = 1 if lane.at > before else failures + 1
                self._settle(lane)
                if not self._be_patient(number, fault, failures):
                    return
            finally:
                self._settle(lane)

    def _take(self, number: int) -> bool:
        """Give the lane its next span; False when there will be none."""
        lane = self._lanes[number]
        with self._changed:
            while not (self._stopping.is_set() or self.failure or self.is_complete):
                if len(self._live) > self.tempo.connections:
                    self._live.discard(number)
                    break
                under_way = sum(other.span.n_bytes for other in self._lanes if other.span is not None)
                # A share for each connection there may be, so that one more starts at once.
                share = OUTSTANDING_BYTES // self._pace.tempo.most
                room = min(share, OUTSTANDING_BYTES - under_way)
                if not self._schedule.is_empty and room >= _LEAST_SPAN:
                    span = self._schedule.take(room)
                    lane.at, lane.span = span.start, span
                    return True
                self._changed.wait(_WAIT_S)
        return False

    def _fetch(self, lane: _Lane) -> None:
        span = lane.span
        if span is None:
            return
        with self._source.open(span) as chunks:
            with self._changed:
                if self._source.etag != self._partial.etag and not self._stopping.is_set():
                    self._partial.record_etag(self._source.etag)
            for chunk in chunks:
                with lane.lock:
                    if self._stopping.is_set():
                        return
                    self._partial.write(lane.at, chunk)
                    lane.at += len(chunk)

    def _settle(self, lane: _Lane) -> None:
        """Note in the journal what the lane brought and give back what it did not."""
        with self._changed:
            span, lane.span = lane.span, None
            if span is None:
                return
            if lane.at > span.start:
                self._partial.record(Span(span.start, lane.at))
            self._schedule.give_back(Span(lane.at, span.end))
            self._changed.notify_all()

    def _be_patient(self, number: int, fault: Transient, failures: int) -> bool:
        """Wait before the next try; False when this connection is given up and others still work."""
        try:
            seconds = self._pace.patience.wait_s(fault, failures)
        except PullError:
            with self._changed:
                if len(self._live) == 1:
                    raise
                self._live.discard(number)
                self.tempo.settle(len(self._live))
            return False
        with self._changed:
            if fault.retry_after_s is not None:
                self.tempo.settle(1)
            if not self._n_waiting:
                self._waits.append(Wait(fault.reason, seconds))
                self._changed.notify_all()
            self._n_waiting += 1
        self._pace.pause(self._stopping, seconds)
        with self._changed:
            self._n_waiting -= 1
        return True

    def _follow(self) -> None:
        """Hash the bytes from the first on as they come to lie behind the front, read back from the disk."""
        while self.hashed < self._partial.n_bytes:
            with self._changed:
                while self._partial.done.front <= self.hashed:
                    if self._stopping.is_set() or self.failure:
                        return
                    self._changed.wait(_WAIT_S)
                front = self._partial.done.front
            while self.hashed < front and not self._stopping.is_set():
                block = self._partial.read(self.hashed, min(BLOCK_BYTES, front - self.hashed))
                if not block:
                    raise PullError(
                        f"{self._partial.path} was cut by another program. Run the command again."
                    )
                self._hash.update(block)
                self.hashed += len(block)
            if self._stopping.is_set():
                return

    def _guarded(self, work: Callable[[], None], number: int = -1) -> Callable[[], None]:
        """The work of a thread, its failure kept for whoever looks."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                with self._changed:
                    self.failure = self.failure or error
            finally:
                with self._changed:
                    self._live.discard(number)
                    self._changed.notify_all()

        return run
