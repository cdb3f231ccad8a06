"""What every transfer from the hub shares: byte ranges, settings, the errors of one request, and retries.

The errors here tell the caller what would help. None of them reaches the user as it is.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from qwq_local.errors import PullError

Result = TypeVar("Result")
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 16.0
MAX_STATED_WAIT_S = 600.0
OFFLINE = "HF_HUB_OFFLINE is set: nothing is downloaded. Unset it and run the command again."


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """The bytes from `start` up to `end`, without `end` itself."""

    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """The number of bytes."""
        return self.end - self.start


class ByteRanges:
    """A set of bytes, kept as sorted ranges that neither touch nor overlap."""

    def __init__(self, ranges: Iterable[ByteRange] = ()) -> None:
        self._ranges: list[ByteRange] = []
        for each in ranges:
            self.add(each)

    def __iter__(self) -> Iterator[ByteRange]:
        return iter(self._ranges)

    @property
    def n_bytes(self) -> int:
        """The number of bytes in the set."""
        return sum(each.n_bytes for each in self._ranges)

    @property
    def front(self) -> int:
        """The set has every byte before this one."""
        return self._ranges[0].end if self._ranges and self._ranges[0].start == 0 else 0

    def add(self, new: ByteRange) -> None:
        """Add the bytes of a range."""
        if new.n_bytes <= 0:
            return
        joined = [new, *(each for each in self._ranges if each.start <= new.end and new.start <= each.end)]
        whole = ByteRange(min(each.start for each in joined), max(each.end for each in joined))
        apart = [each for each in self._ranges if each.end < whole.start or whole.end < each.start]
        self._ranges = sorted([*apart, whole])

    def gaps(self, n_bytes: int) -> list[ByteRange]:
        """The ranges that a file of `n_bytes` lacks, in order."""
        edges = [0, *(edge for each in self._ranges for edge in (each.start, each.end)), n_bytes]
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [ByteRange(start, end) for start, end in pairs if start < end]


class RequestFailed(Exception):
    """A request did not bring the bytes."""


class TransientError(RequestFailed):
    """Another try may help. `retry_after_s` is how long the server asks to wait, if it does."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class ContentChanged(RequestFailed):
    """The file on the server is no longer the file that the earlier bytes come from."""


class NoRangeSupport(RequestFailed):
    """The server sends whole files only."""


@dataclass(frozen=True, slots=True)
class RetryWait:
    """A connection waits before it tries again: the reason, and for how many seconds."""

    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How often a request that brings nothing is repeated, and the number of connections for one file.

    Waits double from half a second up to 16. A server that states a wait gets it, up to ten minutes: the hub
    counts its rate limits over five. `pause` waits for an event, at most some seconds.
    """

    attempts: int = 8
    connections: int = 4
    pause: Callable[[threading.Event, float], object] = threading.Event.wait

    def sleep(self, seconds: float) -> None:
        """Wait that long, whatever happens."""
        self.pause(threading.Event(), seconds)

    def wait_s(self, error: TransientError, failures: int) -> float:
        """Seconds to wait after `failures` failures in a row. Raises PullError when it is time to give up."""
        if error.retry_after_s is not None and error.retry_after_s > MAX_STATED_WAIT_S:
            raise PullError(
                f"{error.reason}, and asks to wait {error.retry_after_s / 60:.0f} minutes. "
                "What came is kept: run the same command again then."
            )
        if failures >= self.attempts:
            raise PullError(
                f"{error.reason}; gave up after {failures} attempts. Check the network, then run the same "
                "command again: it goes on from what is here."
            )
        if error.retry_after_s is not None:
            return error.retry_after_s
        return min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** (failures - 1))


def with_retries(
    request: Callable[[], Result], settings: TransferSettings
) -> Generator[RetryWait, None, Result]:
    """The result of a request, repeated after transient errors; yields each wait before it begins.

    Raises PullError when it gives up, and what else the request raises.
    """
    failures = 0
    while True:
        try:
            return request()
        except TransientError as error:
            failures += 1
            seconds = settings.wait_s(error, failures)
            yield RetryWait(error.reason, seconds)
            settings.sleep(seconds)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds that an answer asks to wait: its Retry-After in either form, or the hub's RateLimit header.

    `now` is the time in seconds since 1970.
    """
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    stated = headers.get("retry-after", "").strip()
    if not stated:
        return None
    if stated.isdecimal() and len(stated) < 12:
        return float(stated)
    try:
        return max(0.0, parsedate_to_datetime(stated).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def transient_status(host: str, response: httpx2.Response) -> TransientError | None:
    """The error for an answer that refuses, when another try may help; None when it cannot."""
    status, wait_s = response.status_code, retry_after_s(response.headers, time.time())
    if status == 429:
        return TransientError(f"{host} limits the rate (429)", wait_s)
    if status in (408, 425) or status >= 500:
        return TransientError(f"{host} answered {status}", wait_s)
    return None


def _short_reason(error: Exception) -> str:
    """The text of a client's error, at most 200 characters, without the number of the system's error."""
    return re.sub(r"\[Errno -?\d+\] ", "", str(error) or type(error).__name__)[:200]


@contextmanager
def connection_errors(host: str) -> Iterator[None]:
    """Turns the HTTP client's errors within the block into TransientError, or PullError with what to do."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise PullError(OFFLINE) from None
    except httpx2.TimeoutException:
        raise TransientError(f"{host} does not answer") from None
    except httpx2.ProxyError as error:
        raise PullError(f"the proxy refuses: {error}. Check HTTPS_PROXY and NO_PROXY.") from None
    except httpx2.ConnectError as error:
        raise TransientError(f"no connection to {host} ({_short_reason(error)})") from None
    except (httpx2.TransportError, httpx2.StreamError):
        # The text of such an error may hold a header, and with it the token.
        raise TransientError(f"the connection to {host} was cut") from None
    except (httpx2.InvalidURL, httpx2.DecodingError) as error:
        raise PullError(f"{host} answered nonsense ({_short_reason(error)}). Check HF_ENDPOINT.") from None
