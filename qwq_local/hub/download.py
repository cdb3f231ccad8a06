"""A file on the hub in, its bytes on the disk and its hash out, told as events.

In spans and resumable where the server sends spans, whole where it does not. The hash is computed from what
lies on the disk; what to do about a wrong one is for the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from qwq_local.hub.content_hash import ContentHash
from qwq_local.hub.faults import NoRanges, Transient
from qwq_local.hub.partial import Partial
from qwq_local.hub.ranges import Span
from qwq_local.hub.source import Source
from qwq_local.hub.workers import Crew, Pace, Wait, still

LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` bytes of the file are here."""

    done: int


@dataclass(frozen=True, slots=True)
class Hashing:
    """All bytes are here; `done` of them are hashed."""

    done: int


@dataclass(frozen=True, slots=True)
class StartedOver:
    """What came so far is of no use, and why."""

    reason: str


TransferEvent = Progress | Hashing | Wait | StartedOver


def download(
    source: Source, partial: Partial, content_hash: ContentHash, pace: Pace
) -> Generator[TransferEvent, None, bool]:
    """Fetch what `partial` lacks; the value is whether the whole has the hash it should have.

    Raises Changed when the server has another file than the bytes so far come from, PullError when it cannot
    go on. What came is in the journal then, and likewise when the generator is closed.
    """
    try:
        hexdigest = yield from _in_spans(source, partial, content_hash, pace)
    except NoRanges:
        yield StartedOver("the server sends whole files only, so this one cannot be resumed")
        hexdigest = yield from _whole(source, partial, content_hash, pace)
    return hexdigest == content_hash.hexadecimal


def _in_spans(
    source: Source, partial: Partial, content_hash: ContentHash, pace: Pace
) -> Generator[TransferEvent, None, str]:
    crew = Crew(source, partial, content_hash, pace)
    try:
        crew.start()
        while not crew.is_complete and crew.failure is None:
            yield Progress(crew.arrived)
            yield from crew.wait(LOOK_S)
            crew.tempo.observe(time.monotonic(), crew.arrived)
            crew.adapt()
        yield Progress(crew.arrived)
        while crew.hashed < partial.n_bytes and crew.failure is None:
            yield Hashing(crew.hashed)
            crew.wait(LOOK_S)
    finally:
        crew.stop()
    if crew.failure is not None:
        raise crew.failure
    return crew.hexdigest


def _whole(
    source: Source, partial: Partial, content_hash: ContentHash, pace: Pace
) -> Generator[TransferEvent, None, str]:
    """Fetch everything over one connection, again from the first byte when it is cut."""
    failures = 0
    while True:
        partial.restart()
        running, at = content_hash.start(partial.n_bytes), 0
        next_look = _every(LOOK_S)
        try:
            with source.open_whole() as chunks:
                for chunk in chunks:
                    partial.write(at, chunk)
                    running.update(chunk)
                    at += len(chunk)
                    if next_look():
                        yield Progress(at)
        except Transient as fault:
            failures += 1
            seconds = pace.patience.wait_s(fault, failures)
            yield Wait(fault.reason, seconds)
            pace.pause(still(), seconds)
            continue
        partial.record(Span(0, at))
        return running.hexdigest()


def _every(seconds: float) -> Callable[[], bool]:
    """A question that is answered yes once in so many seconds."""
    due = time.monotonic() + seconds

    def is_due() -> bool:
        nonlocal due
        if time.monotonic() < due:
            return False
        due = time.monotonic() + seconds
        return True

    return is_due
