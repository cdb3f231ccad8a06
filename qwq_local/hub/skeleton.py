"""A repository of safetensors weights in, a folder out that has its documents and its shards' headers alone.

The headers come by range requests, a few kilobytes of each shard. In the folder every shard is a sparse file
of its full length that holds nothing but its header, so that the converter's own reader of checkpoints makes
all its checks before the weights are fetched. Documents are verified here, headers when their shard has come.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from qwq_convert.checkpoint import INDEX, MAX_DOCUMENT_BYTES
from qwq_convert.safetensors import MAX_HEADER_BYTES

from qwq_local.errors import PullError
from qwq_local.hub.client import Hub, Listing, RemoteFile
from qwq_local.hub.faults import Changed, NoRanges, Transient
from qwq_local.hub.ranges import Span
from qwq_local.hub.source import Source
from qwq_local.hub.workers import Pace, Wait, still

DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    INDEX,
)
FIRST_BYTES = 64 * 1024


def shards_of(listing: Listing) -> tuple[RemoteFile, ...]:
    """The safetensors files at the top of the repository, by name. Raises PullError when there are none."""
    shards = [file for file in listing.files if file.name.endswith(".safetensors") and "/" not in file.name]
    if not shards:
        raise PullError(
            f"{listing.repo} has no safetensors weights. Name a repository of weights with --repo."
        )
    return tuple(sorted(shards, key=lambda file: file.name))


def fetch_skeleton(hub: Hub, listing: Listing, folder: Path, pace: Pace) -> Generator[Wait, None, None]:
    """Fill the folder. Raises PullError when something cannot be had or is not what the hub states."""
    for file in listing.files:
        if file.name in DOCUMENTS:
            if file.n_bytes > MAX_DOCUMENT_BYTES:
                raise PullError(f"{file.name} has {file.n_bytes:,} bytes, too many for such a file.")
            content = yield from fetch_span(hub, listing, file, Span(0, file.n_bytes), pace)
            if not file.content_hash.matches(content):
                raise PullError(f"{file.name}: another hash than the hub states. Try again later.")
            _keep(folder / file.name, content, len(content))
    for file in shards_of(listing):
        header = yield from _fetch_header(hub, listing, file, pace)
        _keep(folder / file.name, header, file.n_bytes)


def _keep(path: Path, start: bytes, n_bytes: int) -> None:
    """Write a file of `n_bytes` that begins so; the rest is a hole. Raises PullError."""
    try:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(n_bytes)
    except OSError as error:
        raise PullError(
            f"{path} cannot be written ({error.strerror}). Set TMPDIR to a folder on another disk."
        ) from None


def _fetch_header(hub: Hub, listing: Listing, file: RemoteFile, pace: Pace) -> Generator[Wait, None, bytes]:
    first = yield from fetch_span(hub, listing, file, Span(0, min(FIRST_BYTES, file.n_bytes)), pace)
    end = 8 + int.from_bytes(first[:8], "little")
    # What is too long for the file is for the reader to refuse.
    end = min(end, file.n_bytes, 8 + MAX_HEADER_BYTES)
    if end <= len(first):
        return first[:end]
    rest = yield from fetch_span(hub, listing, file, Span(len(first), end), pace)
    return first + rest


def fetch_span(
    hub: Hub, listing: Listing, file: RemoteFile, span: Span, pace: Pace
) -> Generator[Wait, None, bytes]:
    """The bytes of a span, in memory. Raises PullError, also where the server sends no parts of files."""
    if not span.n_bytes:
        return b""
    source, failures = Source(hub.content(listing, file)), 0
    while True:
        try:
            opened = source.open_whole() if span.n_bytes == file.n_bytes else source.open(span)
            with opened as chunks:
                return b"".join(chunks)
        except Transient as fault:
            failures += 1
            seconds = pace.patience.wait_s(fault, failures)
            yield Wait(fault.reason, seconds)
            pace.pause(still(), seconds)
        except (Changed, NoRanges):
            raise PullError(
                f"{file.name}: the server sends no parts of files: --convert needs that."
            ) from None
