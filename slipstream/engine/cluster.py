"""Workers on other machines, reached through Dask; what is sent to them and what happens when they are lost.

Dask pickles what is sent: functions by name, contexts and tasks by value. So whoever reaches the scheduler can run code
on its workers, and so it is with every Dask cluster.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from slipstream import __version__
from slipstream.engine.options import EngineConfig
from slipstream.errors import ConfigError, EngineError
from slipstream.io.artifacts import attempt, wrap_write_errors
from slipstream.ops.parallel import work_in_order

if TYPE_CHECKING:
    import distributed

_Context = TypeVar("_Context")
_Task = TypeVar("_Task")
_Done = TypeVar("_Done")

_AHEAD = 1024
"""Tasks that the scheduler has at a time: more than workers have threads, and few enough to begin at once."""
_LOOK_SECONDS = 2.0
"""Between looks whether there still are workers, while nothing comes."""


class Cluster:
    """Workers of a Dask cluster, through `Client.get_executor()`.

    Args:
        client: Connected to the scheduler.
        config: Section `engine`.
        address: Of the scheduler.
        claims: Files that are there as long as this process holds what the tasks write to.
    """

    shares_memory = False

    def __init__(
        self, client: distributed.Client, config: EngineConfig, address: str, claims: Sequence[Path] = ()
    ) -> None:
        self._client, self._config, self._address, self._claims = client, config, address, tuple(claims)
        # of the exceptions that a task raises none goes away by itself, so `retries` of Dask, which is for those, is 0
        self._pool = client.get_executor(pure=False, retries=0)

    def in_order(
        self,
        work: Callable[[_Context, _Task], _Done],
        tasks: Iterable[_Task],
        *,
        context: _Context,
        workers: int,
    ) -> Iterator[_Done]:
        """Work on as many tasks at once as the workers have threads: see `Engine.in_order`.

        Raises:
            EngineError: The scheduler is gone, or a task lost more workers than `engine.retries` allows.
            SlipstreamError: Whatever `work` raises on a worker.
        """
        name, claims = work.__name__.strip("_"), self._claims

        @functools.cache
        def share() -> distributed.Future[_Context]:
            # a task of its own: each worker gets the context once, and it is made again when all that had it were lost
            return self._client.submit(_give, context, key=f"context-{uuid.uuid4().hex}")

        def begin(task: _Task) -> Future[_Done]:
            key = f"{name}-{uuid.uuid4().hex}"
            future: Future[_Done] = self._pool.submit(_attempt, work, share(), task, claims, key=key)
            return future

        def end(task: _Task, future: Future[_Done]) -> _Done:
            return self._wait_for(name, lambda: begin(task), future)

        yield from work_in_order(begin, tasks, ahead=_AHEAD, end=end)

    def holding(self, claim: Path) -> Cluster:
        """Give the same workers; they write only while a file is there: see `attempt`."""
        return Cluster(self._client, self._config, self._address, (*self._claims, claim.absolute()))

    def _wait_for(self, name: str, begin_again: Callable[[], Future[_Done]], future: Future[_Done]) -> _Done:
        """Give the result of a task; where its workers were lost, that of another attempt."""
        from distributed.scheduler import KilledWorker

        num_lost = 0
        while True:
            try:
                self._wait_while_there_are_workers(future)
                return future.result()
            except KilledWorker as exc:
                num_lost += exc.allowed_failures + 1
                if num_lost > self._config.retries:
                    raise EngineError(
                        f"task `{name}` lost {num_lost} workers, one after the other, the last at "
                        f"{exc.last_worker.address}; `engine.retries` = {self._config.retries}",
                        hint="a worker is killed most often for its memory: see its log, give it more or fewer "
                        "threads; what is finished is kept",
                    ) from None
                future = begin_again()
            except CancelledError:
                raise self._lost_scheduler() from None
            except BaseException:
                future.cancel()
                raise

    def _wait_while_there_are_workers(self, future: Future[Any]) -> None:
        last_seen = monotonic()
        while not wait([future], timeout=_LOOK_SECONDS).done:
            if self._count_threads():
                last_seen = monotonic()
            elif monotonic() - last_seen > self._config.timeout_seconds:
                raise EngineError(
                    f"the scheduler at {self._address} has had no worker for {self._config.timeout_seconds:g} s",
                    hint=f"start some: `dask worker {self._address}`; what is finished is kept",
                )

    def _count_threads(self) -> int:
        try:
            return sum(self._client.nthreads().values())
        except Exception as exc:  # whatever a broken connection shows itself as
            raise self._lost_scheduler() from exc

    def _lost_scheduler(self) -> EngineError:
        return EngineError(
            f"the scheduler at {self._address} is gone, or forgot what it was asked for",
            hint="start it again and run the same command: what is finished is kept",
        )

    def check_workers(self, folder: Path) -> None:
        """Make sure that the workers there are see a folder, and are of this version.

        Raises:
            EngineError: There is no worker, or one of them does not.
        """
        try:
            self._client.wait_for_workers(1, timeout=self._config.timeout_seconds)
        except TimeoutError:
            raise EngineError(
                f"the scheduler at {self._address} has no worker, after {self._config.timeout_seconds:g} s",
                hint=f"start some: `dask worker {self._address}`",
            ) from None
        probe = folder / f".{uuid.uuid4().hex}.tmp"
        with wrap_write_errors(probe):
            probe.touch()
        try:
            found = self._client.run(_look, str(probe), on_error="return")
        finally:
            probe.unlink()
        for worker, (version, sees_it) in found.items():
            if version != __version__:
                raise EngineError(
                    f"worker {worker} has slipstream {version}, this is {__version__}",
                    hint="install the same everywhere",
                )
            if not sees_it:
                raise EngineError(
                    f"worker {worker} does not see what is in `{folder}`",
                    hint="choose a run folder with --runs that all machines share, under the same path",
                )


@contextmanager
def connect(config: EngineConfig, folder: Path) -> Iterator[tuple[Cluster, str]]:
    """Connect to the cluster of a pipeline.

    Args:
        config: Section `engine`.
        folder: That workers must see.

    Yields:
        The cluster, and the address of its dashboard.

    Raises:
        ConfigError: Dask is not installed.
        EngineError: The scheduler cannot be reached, or workers cannot do the work.
    """
    if find_spec("distributed") is None:
        raise ConfigError(
            "`engine.kind` = 'dask' needs the package `distributed`", hint="pip install 'slipstream[dask]'"
        )
    import distributed

    address = _find_address(config.address)
    with _without_log():
        try:
            client = distributed.Client(address, timeout=config.timeout_seconds, set_as_default=False)
        except (OSError, ValueError, ImportError) as exc:
            raise EngineError(
                f"no scheduler answers at {address} within {config.timeout_seconds:g} s: {exc}",
                hint="check `engine.address`; `dask scheduler` starts one and says where it listens",
            ) from exc
        try:
            cluster = Cluster(client, config, address)
            cluster.check_workers(folder)
            yield cluster, client.dashboard_link
        finally:
            with contextlib.suppress(TimeoutError):
                client.close(timeout=config.timeout_seconds)


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep Dask from writing tracebacks of lost connections beside the error that says the same."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _find_address(address: str) -> str:
    """Where the scheduler listens; read from its file where that is what is given."""
    if not address.endswith(".json"):
        return address
    try:
        return str(json.loads(Path(address).expanduser().read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise EngineError(
            f"`engine.address` names `{address}`, which no scheduler has written: {exc}",
            hint="start one with `dask scheduler --scheduler-file FILE`, on a folder that both see",
        ) from exc


# --- on a worker ---------------------------------------------------------------------------------------------


def _give(context: _Context) -> _Context:
    return context


def _attempt(work: Callable[[_Context, _Task], _Done], context: _Context, task: _Task, claims: Sequence[Path]) -> _Done:
    """Work on a task where others may be at it too: a worker that was given up may not be dead."""
    with attempt(claims):
        return work(context, task)


def _look(probe: str) -> tuple[str, bool]:
    return __version__, Path(probe).exists()
