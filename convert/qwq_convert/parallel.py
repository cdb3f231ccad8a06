"""Items and a function in; what it makes of each, by several threads and in the items' order, out.

A bounded number of items is under way at any time, so memory does not grow with their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ITEMS_PER_THREAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with what `work` makes of it, on so many threads; its error ends it all.

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
