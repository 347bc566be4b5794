"""Which engine a pipeline asked for, open while a stage runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slipstream.engine.options import EngineConfig
from slipstream.ops.parallel import Engine, Threads
from slipstream.progress import Progress


@contextmanager
def open_engine(
    config: EngineConfig, folder: Path, claim: Path | None, progress: Progress
) -> Iterator[tuple[Engine, Progress]]:
    """Get ready who works on the tasks of a stage.

    Args:
        config: Section `engine`.
        folder: Of the stage, which workers on other machines must see.
        claim: File that is there as long as this process holds the stage's artifact; None where nobody says.
        progress: Told how far the stage is.

    Yields:
        The engine, and the progress to use with it: where there is a dashboard, every line says where.

    Raises:
        ConfigError: What the engine needs is not installed.
        EngineError: It cannot be reached, or its workers cannot do the work.
    """
    if config.kind == "local":
        yield Threads(), progress
        return
    from slipstream.engine.cluster import connect

    with connect(config, folder) as (cluster, dashboard):
        yield cluster.holding(claim) if claim else cluster, _WithDashboard(progress, dashboard)


class _WithDashboard:
    """Says beside how far a task is where one can watch the workers."""

    def __init__(self, progress: Progress, dashboard: str) -> None:
        self._progress, self._dashboard = progress, dashboard
        self.measured = progress.measured

    @contextmanager
    def task(self, label: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        with self._progress.task(label, total, unit, done=done) as advance:
            advance(0, self._dashboard)
            yield lambda units, note: advance(units, f"{note} · {self._dashboard}" if note else self._dashboard)
