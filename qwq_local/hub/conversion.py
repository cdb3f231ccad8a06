"""Converts the weights of a repository while they are downloaded.

One shard is quantized while the next one is downloaded. A shard is deleted as soon as its tensors are on the
disk for good. So the disk needs room for the output and two shards. However a run ends, the same request
continues it.
"""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
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
    fetch_headers,
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
    if caches.keep:
        documents = [file for file in listing.files if file.name in DOCUMENTS]
        yield from pull_files(replace(puller, cache=caches.shared), listing, documents)
    with tempfile.TemporaryDirectory(prefix="qwq-headers-") as folder:
        yield from fetch_headers(puller.hub, listing, Path(folder))
        with (
            CheckpointFolder(Path(folder)) as headers,
            closing(RemoteCheckpoint(puller, listing, headers, caches)) as checkpoint,
        ):
            plan = plan_conversion(checkpoint, request)
            n_bytes = [shard.n_bytes for shard in checkpoint.shards]
            if not any(file.path.exists() for file in plan.files):
                _check_space(plan, n_bytes, caches.own)
            yield ShardsPlanned(len(n_bytes), sum(n_bytes), plan.n_bytes)
            yield from _convert(request, plan, checkpoint)


def _convert(
    request: ConvertRequest, plan: ConversionPlan, checkpoint: RemoteCheckpoint
) -> Generator[WeightsEvent, None, None]:
    """Convert in a thread of its own, download in this one, and release the shards that are not needed."""
    source_names = {tensor.name: tensor.source.name for tensor in plan.tensors}
    written: set[str] = set()
    next_release = 0.0
    events: queue.SimpleQueue[ConvertEvent] = queue.SimpleQueue()

    def work() -> None:
        for event in convert(request, checkpoint):
            events.put(event)

    def durable() -> set[str]:
        record = read_journal(journal_path(plan.files))
        return set() if record is None else {source_names.get(name, "") for name in record.finished}

    with ThreadPoolExecutor(1, "convert") as pool, closing(checkpoint.download()) as download:
        converting = pool.submit(work)
        try:
            while not converting.done() or not events.empty():
                if (arrived := next(download, None)) is not None:
                    yield arrived
                for event in _new_events(events, 0 if arrived else EVENT_WAIT_S):
                    if isinstance(event, TensorDone):
                        written.add(source_names[event.name])
                    yield event
                if checkpoint.is_starved:
                    # All else waits: tensors that are written are enough, whether or not the disk has them.
                    checkpoint.release_finished(written | durable())
                elif time.monotonic() >= next_release:
                    next_release = time.monotonic() + RELEASE_EVERY_S
                    checkpoint.release_finished(durable())
        finally:
            checkpoint.stop()
        converting.result()
    checkpoint.release_finished(set(source_names.values()))


def _new_events(events: queue.SimpleQueue[ConvertEvent], wait_s: float) -> Iterator[ConvertEvent]:
    """The events that are there. Waits for the first one."""
    with suppress(queue.Empty):
        yield events.get(timeout=wait_s)
        while True:
            yield events.get_nowait()


def _check_space(plan: ConversionPlan, shard_bytes: list[int], own: HubCache) -> None:
    """Raise PullError unless the output and two shards fit, on one disk or on two."""
    folder = plan.files[0].path.parent
    output = plan.n_bytes - sum(allocated_bytes(partial_path(file.path)) for file in plan.files)
    largest = sum(sorted(shard_bytes)[-MAX_SHARDS:]) - own.used_bytes()
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
