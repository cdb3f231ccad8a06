"""What can go wrong with one request for bytes, sorted by what helps, and how long to wait before the next.

Raised by transport.py, handled by download.py; none of them reaches the user as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from huggingface_hub.utils import parse_ratelimit_headers

from qwq_local.errors import PullError


def in_short(error: Exception) -> str:
    """What a client's error says to a person: bounded, without the number of the system's error."""
    return re.sub(r"\[Errno -?\d+\] ", "", str(error) or type(error).__name__)[:200]


class Fault(Exception):
    """One request did not bring what was asked for."""


class Transient(Fault):
    """Trying again may help; `retry_after_s` is how long the server asked to wait, if it did."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Changed(Fault):
    """The file on the server is no longer the one that the bytes so far come from."""


class NoRanges(Fault):
    """The server sends whole files only."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a request that brings nothing is repeated, and after how many seconds.

    Waits double from `first_wait_s` up to `longest_wait_s`. A server's own Retry-After counts instead, up to
    `longest_told_s`: the hub's rate limits are counted over five minutes.
    """

    attempts: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 16.0
    longest_told_s: float = 600.0

    def wait_s(self, fault: Transient, failures: int) -> float:
        """Seconds to wait after that many failures in a row. Raises PullError when it is time to give up."""
        if fault.retry_after_s is not None and fault.retry_after_s > self.longest_told_s:
            raise PullError(
                f"{fault.reason}, and asks to wait {fault.retry_after_s / 60:.0f} minutes. "
                "What came is kept: run the same command again then."
            )
        if failures >= self.attempts:
            raise PullError(
                f"{fault.reason}; gave up after {failures} attempts. Check the network, then run the same "
                "command again: it goes on from what is here."
            )
        if fault.retry_after_s is not None:
            return fault.retry_after_s
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1))


def told_wait_s(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds that an answer asks to wait: Retry-After in either form, or the hub's RateLimit header.

    `now` is the time in seconds since 1970.
    """
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    told = headers.get("retry-after", "").strip()
    if not told:
        return None
    if told.isdecimal() and len(told) < 12:
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None
