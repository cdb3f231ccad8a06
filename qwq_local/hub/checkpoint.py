"""A repository of safetensors weights as a checkpoint that the converter reads: headers first, tensors later.

`fetch_headers` fills a folder with the repository's documents and with a file for each shard. Each file has
the shard's full length and holds only its header, a few kilobytes that range requests bring; the rest is a
hole. So the converter's own reader makes all its checks before the weights are fetched. Documents are
verified at once, a header when its shard has come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Generator, Iterable, Mapping
from pathlib import Path

from qwq_convert.checkpoint import INDEX, MAX_DOCUMENT_BYTES, CheckpointFolder
from qwq_convert.safetensors import MAX_HEADER_BYTES, SourceTensor

from qwq_local.errors import PullError
from qwq_local.hub.client import Hub, Listing, RemoteFile
from qwq_local.hub.ranges import ByteRange
from qwq_local.hub.shards import ShardDownloads, ShardHeaders
from qwq_local.hub.transfer import RetryWait

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


def fetch_headers(hub: Hub, listing: Listing, folder: Path) -> Generator[RetryWait, None, None]:
    """Fill the folder. Raises PullError when something does not come or has another hash than stated."""
    for file in listing.files:
        if file.name in DOCUMENTS:
            if file.n_bytes > MAX_DOCUMENT_BYTES:
                raise PullError(f"{file.name} has {file.n_bytes:,} bytes, too many for such a file.")
            content = yield from hub.read_range(listing, file, ByteRange(0, file.n_bytes))
            if not file.digest.matches(content):
                raise PullError(f"{file.name}: another hash than the hub states. Try again later.")
            _write(folder / file.name, content, len(content))
    for file in shards_of(listing):
        header = yield from _fetch_header(hub, listing, file)
        _write(folder / file.name, header, file.n_bytes)


def _fetch_header(hub: Hub, listing: Listing, file: RemoteFile) -> Generator[RetryWait, None, bytes]:
    first = yield from hub.read_range(listing, file, ByteRange(0, min(FIRST_BYTES, file.n_bytes)))
    end = 8 + int.from_bytes(first[:8], "little")
    # The reader refuses a header that is too long.
    end = min(end, file.n_bytes, 8 + MAX_HEADER_BYTES)
    if end <= len(first):
        return first[:end]
    rest = yield from hub.read_range(listing, file, ByteRange(len(first), end))
    return first + rest


def _write(path: Path, start: bytes, n_bytes: int) -> None:
    """Write a file of `n_bytes` that begins with `start`; the rest is a hole. Raises PullError."""
    try:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(n_bytes)
    except OSError as error:
        raise PullError(
            f"{path} cannot be written ({error.strerror}). Set TMPDIR to a folder on another disk."
        ) from None


def headers_of(shards: Iterable[RemoteFile], headers: CheckpointFolder) -> ShardHeaders:
    """Each shard with its tensors, in the order in which a conversion reads the shards."""
    tensors: dict[str, set[SourceTensor]] = {}
    for tensor in headers.tensors.values():
        tensors.setdefault(tensor.shard, set()).add(tensor)
    return {shard: frozenset(tensors[shard.name]) for shard in shards if shard.name in tensors}


class RemoteCheckpoint:
    """The weights of one repository at one commit, as qwq_convert's Checkpoint."""

    def __init__(
        self, repo: str, shards: ShardHeaders, headers: CheckpointFolder, downloads: ShardDownloads
    ) -> None:
        self._repo = repo
        self._shards = shards
        self._headers = headers
        self._downloads = downloads
        self._unreleased = {shard.name: {tensor.name for tensor in shards[shard]} for shard in shards}

    @property
    def label(self) -> str | None:
        """The repository's name."""
        return self._repo

    @property
    def identity(self) -> str:
        """A digest of the shards' names and hashes."""
        states = "\n".join(f"{shard.name} {shard.digest.hex}" for shard in self._shards)
        return hashlib.sha256(states.encode()).hexdigest()

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor of every shard, by name."""
        return self._headers.tensors

    def document(self, name: str) -> bytes | None:
        """The content of the file `name`, or None when there is none."""
        return self._headers.document(name)

    def read(self, tensor: SourceTensor, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of `tensor` from its byte `start`. Waits for the shard."""
        return self._downloads.read(tensor.shard, tensor.place(start, n_bytes), n_bytes)

    def release_finished(self, finished: Container[str]) -> None:
        """Release every shard whose tensors, by their names in the checkpoint, are all finished."""
        for shard, names in list(self._unreleased.items()):
            if all(name in finished for name in names):
                del self._unreleased[shard]
                self._downloads.release(shard)
