"""Bytes that arrived and the time in, how many connections to use out.

Starts with two, so that one waits for an answer while the other receives. Another is tried as long as the
last one made the whole faster by a tenth; one that did not is given up again. Arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TempoSettings:
    """How many connections at first and at most, and how long each number is tried."""

    first: int = 2
    most: int = 4
    trial_s: float = 4.0
    trial_bytes: int = 32 * 2**20
    gain: float = 1.1


class Tempo:
    """The number of connections, tried out while the bytes come."""

    def __init__(self, settings: TempoSettings) -> None:
        self._settings = settings
        self._began: tuple[float, int] | None = None
        self._best = 0.0
        self._settled = settings.first >= settings.most
        self.connections = settings.first

    def observe(self, now: float, n_bytes: int) -> None:
        """Take in how many bytes there are now, in seconds of any clock; may change `connections`."""
        if self._settled:
            return
        if self._began is None:
            self._began = now, n_bytes
            return
        elapsed, arrived = now - self._began[0], n_bytes - self._began[1]
        if elapsed < self._settings.trial_s or arrived < self._settings.trial_bytes:
            return
        rate = arrived / elapsed
        if rate < self._best * self._settings.gain:
            self.connections -= 1
            self._settled = True
        elif self.connections == self._settings.most:
            self._settled = True
        else:
            self._best, self._began = rate, None
            self.connections += 1

    def settle(self, connections: int) -> None:
        """Use that many from now on, as when the server complains of too many requests."""
        self.connections, self._settled = connections, True
