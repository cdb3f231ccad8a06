"""A file on the hub, read in byte ranges.

Redirects are followed here, for two reasons: the token goes to the hub alone, and the next request goes
directly to the storage behind the hub. Nothing is retried: the errors say what would help.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass

import httpx2
from huggingface_hub import constants, get_session

from qwq_local.errors import PullError
from qwq_local.hub.cache import Digest
from qwq_local.hub.transfer import (
    ByteRange,
    ContentChanged,
    NoRangeSupport,
    TransientError,
    connection_errors,
    transient_status,
)

MAX_REDIRECTS = 8
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its name (folders included, checked), length and hash."""

    name: str
    n_bytes: int
    digest: Digest


class Source:
    """The bytes of one file on the hub. Several threads may read it at once."""

    def __init__(self, file: RemoteFile, url: str, headers: Mapping[str, str], etag: str = "") -> None:
        """`url` is the file's address on the hub, `headers` are for a request there, with the token.

        `etag` is the strong entity tag of the bytes that came earlier; empty when there are none.
        """
        self.etag = etag
        self._file = file
        self._url = httpx2.URL(url)
        self._headers = headers
        self._location: httpx2.URL | None = None
        self._lock = threading.Lock()

    @contextmanager
    def open(self, wanted: ByteRange) -> Iterator[Iterator[bytes]]:
        """The bytes of a range as they come, never more than that.

        Raises TransientError, ContentChanged, NoRangeSupport, and PullError where a retry does not help.
        """
        headers = {"Range": f"bytes={wanted.start}-{wanted.end - 1}"}
        if self.etag:
            headers["If-Range"] = self.etag
        with closing(self._send(headers)) as response, connection_errors(response.url.host):
            self._check_kind(response)
            if response.status_code == 200:
                raise ContentChanged if self._is_another(response) else NoRangeSupport
            self._check_range(response, wanted)
            yield _bounded(response.iter_raw(), wanted.n_bytes)

    @contextmanager
    def open_whole(self) -> Iterator[Iterator[bytes]]:
        """All bytes from the first, for a server without ranges. Raises as `open` does."""
        with closing(self._send({})) as response, connection_errors(response.url.host):
            self._check_kind(response)
            length = response.headers.get("content-length", "")
            if length.isdecimal() and int(length) != self._file.n_bytes:
                raise PullError(self._wrong_length(int(length)))
            yield _bounded(response.iter_raw(), self._file.n_bytes)

    def _send(self, extra: Mapping[str, str]) -> httpx2.Response:
        """The answer that carries the bytes, with its body still to be read."""
        client = get_session()
        with self._lock:
            url = self._location or self._url
        headers = {**self._headers, **extra, "Accept-Encoding": "identity"}
        request = client.build_request("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        if url.origin != self._url.origin:
            request.headers.pop("Authorization", None)
        for _ in range(MAX_REDIRECTS):
            with connection_errors(request.url.host):
                response = client.send(request, stream=True, follow_redirects=False)
            if response.status_code in (200, 206):
                with self._lock:
                    self._location = request.url
                return response
            response.close()
            if not response.has_redirect_location:
                raise self._failure(request.url, response)
            request = self._redirected(response)
        raise PullError(
            f"{self._file.name}: the server redirects in a circle. Check HF_ENDPOINT and the proxy."
        )

    def _redirected(self, response: httpx2.Response) -> httpx2.Request:
        """The request that an answer redirects to. The HTTP client drops the token for another host."""
        request = response.next_request
        if request is None or (request.url.port or 0) >= 2**16:
            location = response.headers["location"]
            raise PullError(
                f"{self._file.name}: the server redirects to {location[:100]!r}, which is no address."
            )
        scheme = request.url.scheme
        if scheme != "https" and (scheme != "http" or response.url.scheme == "https"):
            raise PullError(f"{self._file.name}: the server redirects to {scheme}:, which is refused.")
        return request

    def _failure(self, url: httpx2.URL, response: httpx2.Response) -> Exception:
        status, name = response.status_code, self._file.name
        with self._lock:
            was_remembered, self._location = url == self._location, None
        if (transient := transient_status(url.host, response)) is not None:
            return transient
        if was_remembered:
            # The storage's address expires after some minutes. The next try gets a new one from the hub.
            return TransientError(f"{url.host} answered {status}")
        if status == 416:
            return ContentChanged()
        if status in (401, 403):
            return PullError(
                f"{name}: {url.host} refuses it ({status}). Accept the model's terms on its page if it has "
                "any, and set HF_TOKEN to a token that may read it (or run `hf auth login`)."
            )
        if status == 404:
            return PullError(
                f"{name}: {url.host} has no such file (404). `qwq pull --list` shows what there is."
            )
        return PullError(f"{name}: {url.host} answered {status}. Try again later.")

    def _check_kind(self, response: httpx2.Response) -> None:
        if response.headers.get("content-type", "").lower().startswith("text/html"):
            raise PullError(
                f"{self._file.name}: a web page came instead of the file. Something on the way "
                "answers in the hub's place (a login page, a proxy): open a browser, then run this again."
            )
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise PullError(f"{self._file.name}: came compressed, though it was not asked for that way.")

    def _check_range(self, response: httpx2.Response, wanted: ByteRange) -> None:
        if self._is_another(response):
            raise ContentChanged
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None or int(match[1]) != wanted.start or int(match[2]) >= wanted.end:
            raise TransientError(f"{response.url.host} answered another range than was asked for")
        if int(match[3]) != self._file.n_bytes:
            raise PullError(self._wrong_length(int(match[3])))

    def _is_another(self, response: httpx2.Response) -> bool:
        """Whether the answer belongs to another file than the first answer, by its entity tag."""
        etag = response.headers.get("etag", "")
        if not _STRONG_ETAG.fullmatch(etag):
            return False
        with self._lock:
            self.etag = self.etag or etag
            return etag != self.etag

    def _wrong_length(self, found: int) -> str:
        return (
            f"{self._file.name}: the server has {found:,} bytes of it, the hub states "
            f"{self._file.n_bytes:,}. Try again later, or another --repo."
        )


def _bounded(chunks: Iterator[bytes], n_bytes: int) -> Iterator[bytes]:
    """Exactly `n_bytes`. Reads to the end of the answer, so that the connection can be used again."""
    for chunk in chunks:
        yield chunk[:n_bytes]
        n_bytes -= len(chunk)
        if n_bytes <= 0:
            next(chunks, None)
            return
    raise TransientError("the connection was cut")
