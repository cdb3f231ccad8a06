"""A repository of weights and a file type in, a quantized GGUF out, its shards passing through a small disk.

Download and conversion overlap: shards come one ahead of the one that is quantized and go when their tensors
are on the disk for good, so the peak is the output and two shards. Whatever ends it, the same request
goes on from there.
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
from qwq_convert.output import journal_path, partial_path, read_journal
from qwq_convert.pipeline import ConvertEvent, TensorDone, convert
from qwq_convert.plan import ConversionPlan, ConvertRequest, plan_conversion

from qwq_local.errors import PullError
from qwq_local.files import allocated_bytes, free_bytes
from qwq_local.hub.cache import HubCache
from qwq_local.hub.checkpoint import RemoteCheckpoint, headers_of
from qwq_local.hub.pull import SPARE_BYTES, Puller, PullEvent, pull_files
from qwq_local.hub.shards import MOST_SHARDS, ArrivingShards, Headers, Keeping
from qwq_local.hub.skeleton import DOCUMENTS, fetch_skeleton, shards_of
from qwq_local.text import binary_size

LOOK_S = 0.2
JOURNAL_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardsPlanned:
    """All headers are read and checked: how many shards there are, their bytes, and those of the output."""

    count: int
    bytes_total: int
    output_bytes: int


WeightsEvent = PullEvent | ConvertEvent | ShardsPlanned


def convert_weights(
    puller: Puller, repo: str, request: ConvertRequest, keeping: Keeping
) -> Generator[WeightsEvent, None, None]:
    """Convert a repository's weights as asked; `request.source` is not looked at.

    Raises PullError and ConvertError, for everything that headers show before the first shard is fetched.
    """
    keeping.own.remove_stale(time.time())
    listing = yield from puller.hub.list_files(repo)
    shards = shards_of(listing)
    if keeping.keep:
        documents = [file for file in listing.files if file.name in DOCUMENTS]
        yield from pull_files(replace(puller, cache=keeping.shared), listing, documents)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qwq-headers-")))
        yield from fetch_skeleton(puller.hub, listing, folder, puller.pace)
        skeleton = stack.enter_context(CheckpointFolder(folder))
        headers = headers_of(shards, skeleton)
        arriving = stack.enter_context(ArrivingShards(puller, listing, headers, keeping))
        checkpoint = RemoteCheckpoint(repo, headers, skeleton, arriving)
        plan = plan_conversion(checkpoint, request)
        if not any(file.path.exists() for file in plan.files):
            _check_space(plan, headers, keeping.own)
        yield ShardsPlanned(len(headers), sum(shard.n_bytes for shard in headers), plan.n_bytes)
        yield from _Run(request, plan, checkpoint, arriving).events()


class _Run:
    """The conversion in a thread of its own, so that the download can be told of while it waits."""

    def __init__(
        self,
        request: ConvertRequest,
        plan: ConversionPlan,
        checkpoint: RemoteCheckpoint,
        arriving: ArrivingShards,
    ) -> None:
        self._request = request
        self._checkpoint = checkpoint
        self._arriving = arriving
        self._source_names = {tensor.name: tensor.source.name for tensor in plan.tensors}
        self._journal = journal_path(plan.files)
        self._told: queue.SimpleQueue[ConvertEvent] = queue.SimpleQueue()
        self._written: set[str] = set()
        self._next_look = 0.0
        self._failure: BaseException | None = None

    def events(self) -> Generator[WeightsEvent, None, None]:
        thread = threading.Thread(target=self._convert, name="convert", daemon=True)
        thread.start()
        try:
            while thread.is_alive() or not self._told.empty():
                yield from self._waiting_events()
        finally:
            self._arriving.stop()
            thread.join()
        if self._failure is not None:
            raise self._failure
        self._checkpoint.release_finished(set(self._source_names.values()))

    def _convert(self) -> None:
        try:
            for event in convert(self._request, self._checkpoint):
                self._told.put(event)
        except BaseException as error:
            self._failure = error

    def _waiting_events(self) -> Generator[WeightsEvent, None, None]:
        """What happened since, at most a moment after it did; finished shards are let go on the way."""
        while not self._arriving.events.empty():
            yield self._arriving.events.get()
        try:
            event = self._told.get(timeout=LOOK_S)
        except queue.Empty:
            event = None
        if isinstance(event, TensorDone):
            self._written.add(self._source_names[event.name])
        if event is not None:
            yield event
        self._release()

    def _release(self) -> None:
        """Let shards go whose tensors are on the disk for good, or only written before all stands still."""
        if self._arriving.is_starved:
            self._checkpoint.release_finished(self._written | self._durable())
        elif time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + JOURNAL_EVERY_S
            self._checkpoint.release_finished(self._durable())

    def _durable(self) -> set[str]:
        record = read_journal(self._journal)
        return set() if record is None else {self._source_names.get(name, "") for name in record.finished}


def _check_space(plan: ConversionPlan, headers: Headers, own: HubCache) -> None:
    """Raise PullError unless output and two shards fit, on one disk or on two."""
    folder = plan.files[0].path.parent
    output = plan.n_bytes - sum(allocated_bytes(partial_path(file.path)) for file in plan.files)
    shards = sum(sorted(shard.n_bytes for shard in headers)[-MOST_SHARDS:]) - own.used_bytes()
    root = own.root
    while not root.is_dir():
        root = root.parent
    same = root.stat().st_dev == folder.stat().st_dev
    needed = {folder: output + shards if same else output} | ({} if same else {root: shards})
    for place, n_bytes in needed.items():
        free = free_bytes(place)
        if free < n_bytes + SPARE_BYTES:
            raise PullError(
                f"{place} needs {binary_size(n_bytes)} for the output and two shards, {binary_size(free)} "
                "are free. Free some space, or move --out or QWQ_CACHE_DIR to another disk."
            )
