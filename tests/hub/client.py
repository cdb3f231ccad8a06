"""Shared by the tests of `qwq pull`: a puller in this process that never sleeps, and a local hub."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qwq_local.hub.cache import HubCache
from qwq_local.hub.client import Hub, Listing
from qwq_local.hub.pull import Puller, PullEvent, pull_files
from qwq_local.hub.transfer import TransferSettings
from qwq_local.models.offers import Offer, offers
from tests.hub_server import LocalHub, StoredFile

REPO = "Qwen/QwQ-32B-GGUF"
NAME = "qwq-32b-q4_k_m.gguf"
MIB = 2**20

Result = TypeVar("Result")
Event = TypeVar("Event")


def content(n_bytes: int, seed: int = 1) -> bytes:
    """Bytes without repeated parts."""
    return random.Random(seed).randbytes(n_bytes)


def hub_with(*contents: bytes, stated: bytes | None = None) -> LocalHub:
    """A hub with one large file; `stated` is the content that it claims, if it differs."""
    return LocalHub({REPO: {NAME: StoredFile(b"".join(contents), stated=stated)}})


@dataclass
class Client:
    """A puller that records its events and its waits, without waiting."""

    endpoint: str
    root: Path
    connections: int = 4
    attempts: int = 6
    waits: list[float] = field(default_factory=list)
    events: list[PullEvent] = field(default_factory=list)

    @property
    def cache(self) -> HubCache:
        return HubCache(self.root)

    @property
    def puller(self) -> Puller:
        settings = TransferSettings(self.attempts, self.connections, self._pause)
        return Puller(Hub(settings, self.endpoint), self.cache)

    def list_files(self, repo: str = REPO) -> Listing:
        return self._drained(self.puller.hub.list_files(repo))

    def pull(self, listing: Listing | None = None, repo: str = REPO) -> Sequence[Path]:
        listing = listing or self.list_files(repo)
        return self._drained(pull_files(self.puller, listing, self.offer(listing).files))

    def offer(self, listing: Listing) -> Offer:
        return offers(listing)[0]

    def events_of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def _pause(self, _stop: threading.Event, seconds: float) -> None:
        self.waits.append(seconds)

    def _drained(self, events: Generator[PullEvent, None, Result]) -> Result:
        while True:
            try:
                self.events.append(next(events))
            except StopIteration as finished:
                result: Result = finished.value
                return result


def leftovers(root: Path) -> list[str]:
    """The names of all files in the cache but locks."""
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
