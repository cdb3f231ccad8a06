"""Converts the weights of a repository while they are downloaded.

One shard is quantized while the next one is downloaded. A shard is deleted as soon as its tensors are on the
disk for good. So the disk needs room for the output and two shards. However a run ends, the same request
continues it.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.disk import partial_path
from qwq_convert.output import journal_path, read_journal
from qwq_convert.pipeline import ConvertEvent, TensorDone, convert
from qwq_convert.plan import ConversionPlan, ConvertRequest, plan_conversion

from qwq_local.errors import PullError
from qwq_local.files import allocated_bytes, free_bytes
from qwq_local.hub.cache import HubCache
from qwq_local.hub.checkpoint import (
    DOCUMENTS,
    MAX_SHARDS,
    RemoteCheckpoint,
    ShardCaches,
    ShardDownloads,
    ShardHeaders,
    fetch_headers,
    headers_of,
    shards_of,
)
from qwq_local.hub.pull import SPARE_BYTES, Puller, PullEvent, pull_files
from qwq_local.text import binary_size

EVENT_WAIT_S = 0.2
RELEASE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardsPlanned:
    """All headers are checked: the number of shards, their bytes, and the bytes of the output."""

    count: int
    bytes_total: int
    output_bytes: int


WeightsEvent = PullEvent | ConvertEvent | ShardsPlanned


def convert_weights(
    puller: Puller, repo: str, request: ConvertRequest, caches: ShardCaches
) -> Generator[WeightsEvent, None, None]:
    """Convert a repository's weights; `request.source` is ignored.

    Raises PullError and ConvertError. What the headers show is refused before the first shard is fetched.
    """
    caches.own.remove_stale(time.time())
    listing = yield from puller.hub.list_files(repo)
    shards = shards_of(listing)
    if caches.keep:
        documents = [file for file in listing.files if file.name in DOCUMENTS]
        yield from pull_files(replace(puller, cache=caches.shared), listing, documents)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwq-headers-")))
        yield from fetch_headers(puller.hub, listing, folder)
        headers = stack.enter_context(CheckpointFolder(folder))
        with_tensors = headers_of(shards, headers)
        downloads = stack.enter_context(ShardDownloads(puller, listing, with_tensors, caches))
        checkpoint = RemoteCheckpoint(repo, with_tensors, headers, downloads)
        plan = plan_conversion(checkpoint, request)
        if not any(file.path.exists() for file in plan.files):
            _check_space(plan, with_tensors, caches.own)
        yield ShardsPlanned(len(with_tensors), sum(shard.n_bytes for shard in with_tensors), plan.n_bytes)
        yield from _Conversion(request, plan, checkpoint, downloads).events()


class _Conversion:
    """The conversion in a thread of its own, so that events of the download are yielded while it waits."""

    def __init__(
        self,
        request: ConvertRequest,
        plan: ConversionPlan,
        checkpoint: RemoteCheckpoint,
        downloads: ShardDownloads,
    ) -> None:
        self._request = request
        self._checkpoint = checkpoint
        self._downloads = downloads
        self._source_names = {tensor.name: tensor.source.name for tensor in plan.tensors}
        self._journal = journal_path(plan.files)
        self._events: queue.SimpleQueue[ConvertEvent] = queue.SimpleQueue()
        self._written: set[str] = set()
        self._next_release = 0.0
        self._failure: BaseException | None = None

    def events(self) -> Generator[WeightsEvent, None, None]:
        thread = threading.Thread(target=self._convert, name="convert", daemon=True)
        thread.start()
        try:
            while thread.is_alive() or not self._events.empty():
                yield from self._new_events()
        finally:
            self._downloads.stop()
            thread.join()
        if self._failure is not None:
            raise self._failure
        self._checkpoint.release_finished(set(self._source_names.values()))

    def _convert(self) -> None:
        try:
            for event in convert(self._request, self._checkpoint):
                self._events.put(event)
        except BaseException as error:
            self._failure = error

    def _new_events(self) -> Generator[WeightsEvent, None, None]:
        """The events since the last call; releases finished shards on the way."""
        while not self._downloads.events.empty():
            yield self._downloads.events.get()
        try:
            event = self._events.get(timeout=EVENT_WAIT_S)
        except queue.Empty:
            event = None
        if isinstance(event, TensorDone):
            self._written.add(self._source_names[event.name])
        if event is not None:
            yield event
        self._release()

    def _release(self) -> None:
        """Release shards whose tensors are on the disk for good. When all else waits, written is enough."""
        if self._downloads.is_starved:
            self._checkpoint.release_finished(self._written | self._durable())
        elif time.monotonic() >= self._next_release:
            self._next_release = time.monotonic() + RELEASE_EVERY_S
            self._checkpoint.release_finished(self._durable())

    def _durable(self) -> set[str]:
        record = read_journal(self._journal)
        return set() if record is None else {self._source_names.get(name, "") for name in record.finished}


def _check_space(plan: ConversionPlan, shards: ShardHeaders, own: HubCache) -> None:
    """Raise PullError unless the output and two shards fit, on one disk or on two."""
    folder = plan.files[0].path.parent
    output = plan.n_bytes - sum(allocated_bytes(partial_path(file.path)) for file in plan.files)
    largest = sum(sorted(shard.n_bytes for shard in shards)[-MAX_SHARDS:]) - own.used_bytes()
    root = own.root
    while not root.is_dir():
        root = root.parent
    same = root.stat().st_dev == folder.stat().st_dev
    needed = {folder: output + largest if same else output} | ({} if same else {root: largest})
    for place, n_bytes in needed.items():
        free = free_bytes(place)
        if free < n_bytes + SPARE_BYTES:
            raise PullError(
                f"{place} needs {binary_size(n_bytes)} for the output and two shards, {binary_size(free)} "
                "are free. Free some space, or move --out or QWQ_CACHE_DIR to another disk."
            )
