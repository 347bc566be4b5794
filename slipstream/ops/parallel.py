"""A few tasks at once, results in order: by threads of this process, or by whoever else an engine stands for."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

_Context = TypeVar("_Context")
_Task = TypeVar("_Task")
_Done = TypeVar("_Done")


class Engine(Protocol):
    """Who works on the tasks of a stage.

    What a stage gives it must make sense elsewhere too: `work` is a function of a module, context and tasks can be
    pickled and are small, paths are absolute. What a task makes goes to a file, and little comes back.
    """

    @property
    def shares_memory(self) -> bool:
        """Whether tasks see the memory of this process, so that nothing given or returned is ever copied."""
        ...

    def in_order(
        self,
        work: Callable[[_Context, _Task], _Done],
        tasks: Iterable[_Task],
        *,
        context: _Context,
        workers: int,
    ) -> Iterator[_Done]:
        """Work on several tasks at once and yield results in the tasks' order.

        Args:
            work: Called with the context and a task; does the same whenever it is called again.
            tasks: Taken as there is somebody to work on them.
            context: What all tasks need; travels once to whoever works on them.
            workers: Tasks at once, for threads of this process.
        """
        ...

    def holding(self, claim: Path) -> Engine:
        """Give the same engine; what it makes counts only while a file is there, which this process removes."""
        ...


class Threads:
    """Threads of this process: they suffice, since polars, pyarrow and numpy release the interpreter lock."""

    shares_memory = True

    def in_order(
        self,
        work: Callable[[_Context, _Task], _Done],
        tasks: Iterable[_Task],
        *,
        context: _Context,
        workers: int,
    ) -> Iterator[_Done]:
        """Work on up to `workers` tasks at once: see `Engine.in_order`."""
        return in_order(functools.partial(work, context), tasks, workers)

    def holding(self, claim: Path) -> Engine:
        """Give itself: its tasks end with this process."""
        return self


def in_order(work: Callable[[_Task], _Done], tasks: Iterable[_Task], workers: int) -> Iterator[_Done]:
    """Work on up to `workers` tasks at once in threads and yield results in the tasks' order.

    Runs at most one task per worker ahead of the reader, so memory stays bounded.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
        yield from work_in_order(functools.partial(_submit, pool, work), tasks, ahead=workers)


def _submit(pool: Executor, work: Callable[[_Task], _Done], task: _Task) -> Future[_Done]:
    return pool.submit(work, task)


def _result(task: _Task, future: Future[_Done]) -> _Done:
    return future.result()


def work_in_order(
    begin: Callable[[_Task], Future[_Done]],
    tasks: Iterable[_Task],
    *,
    ahead: int,
    end: Callable[[_Task, Future[_Done]], _Done] = _result,
) -> Iterator[_Done]:
    """Begin tasks ahead of the reader and yield their results in order; what nobody will read is cancelled.

    Args:
        begin: Hands a task to an executor.
        tasks: Taken one by one.
        ahead: Tasks begun before the result of the first of them is waited for.
        end: Waits for a task and gives its result.
    """
    waiting: collections.deque[tuple[_Task, Future[_Done]]] = collections.deque()
    try:
        for task in tasks:
            waiting.append((task, begin(task)))
            if len(waiting) > ahead:
                yield end(*waiting.popleft())
        while waiting:
            yield end(*waiting.popleft())
    finally:
        for _, future in waiting:
            future.cancel()
