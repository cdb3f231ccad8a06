"""Work on many items by several threads, with the results in the items' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ITEMS_PER_THREAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with the result of `work` for it, computed by `threads` threads. The first error is raised.

    At most ITEMS_PER_THREAD items per thread are taken ahead, so memory does not grow with their number.
    Closing the generator waits for the items that are being worked on and drops the others.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) >= threads * ITEMS_PER_THREAD:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
