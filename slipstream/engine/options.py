"""Section `engine` of the pipeline file. Nothing in it changes what a stage writes, so no fingerprint covers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slipstream.errors import ConfigError
from slipstream.options import require, speed_only


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Who does the work of the stages before training; the result is the same, whoever it is."""

    kind: Literal["local", "dask"] = speed_only("local")
    """`local` threads of this process; `dask` workers of a Dask cluster, which see the run folder and the raw files
    under the same paths."""
    address: str = speed_only("")
    """Where the scheduler of `dask` listens, such as `tcp://node-0:8786`, or the file that it wrote
    (`dask scheduler --scheduler-file`)."""
    retries: int = speed_only(3)
    """How often a task is given to another worker after its worker was lost, before the run ends. Dask does so
    `distributed.scheduler.allowed-failures` times by itself, 3 if nobody said otherwise, and at least as often."""
    timeout_seconds: float = speed_only(30.0)
    """How long to wait for the scheduler, and for a worker where there is none, before the run ends with the reason."""

    def __post_init__(self) -> None:
        """Check ranges, and that the scheduler is named."""
        require(self.retries >= 0, "engine.retries", "at least 0", self.retries)
        require(self.timeout_seconds > 0, "engine.timeout_seconds", "above 0", self.timeout_seconds)
        if self.kind == "dask" and not self.address:
            raise ConfigError(
                "`engine.kind` = 'dask' needs `engine.address`, where its scheduler listens",
                hint="start one with `dask scheduler`, which says its address, and workers with `dask worker ADDRESS`",
            )
        if self.kind == "local" and self.address:
            raise ConfigError(
                f"`engine.address` = '{self.address}' goes with `engine.kind` = 'dask', found 'local'",
                hint="set engine.kind = 'dask', or leave engine.address out",
            )
