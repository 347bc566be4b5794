"""Tasks that lose the worker that has them, and a progress that kills a worker in the middle of every task it hears of.

Worker processes import this module by its name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import LocalCluster

from slipstream.progress import Silent


def die_so_often(folder: Path, times: int) -> int:
    """Kill the process that works on it, the first times; returns how often that was."""
    number = len(list(folder.iterdir()))
    if number < times:
        (folder / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


class Killer(Silent):
    """Kills a worker of a cluster of processes once in every task, after the first of its work is done."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.killed: list[str] = []

    @contextmanager
    def task(self, label: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Open a task."""

        def advance(units: int, note: str) -> None:
            if units and label not in self.killed:
                pid = next(nanny.pid for nanny in self._cluster.workers.values() if nanny.pid)
                os.kill(pid, signal.SIGKILL)
                self.killed.append(label)

        yield advance
