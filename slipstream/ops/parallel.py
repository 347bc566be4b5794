"""A few tasks at once, results in order."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Task = TypeVar("_Task")
_Done = TypeVar("_Done")


def in_order(work: Callable[[_Task], _Done], tasks: Iterable[_Task], workers: int) -> Iterator[_Done]:
    """Work on up to `workers` tasks at once and yield results in the tasks' order.

    Runs at most one task per worker ahead of the reader, so memory stays bounded. Threads suffice: the heavy
    work is in polars, pyarrow and numpy, which release the interpreter lock.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: collections.deque[Future[_Done]] = collections.deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
