"""Runs of a pipeline on several ranks: real processes that speak gloo, forked from one that knows torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TIMEOUT_SECONDS = 60.0


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train_together(
    tree: Mapping[str, Any],
    runs: Path,
    num_ranks: int,
    *,
    float64: bool = True,
    sabotage: Callable[[int], None] | None = None,
    patience: float = TIMEOUT_SECONDS,
) -> list[str]:
    """Run a pipeline on so many ranks.

    Args:
        tree: The pipeline.
        runs: Folder of runs, shared by the ranks.
        num_ranks: R; 1 is a process alone.
        float64: Train in double precision, to tell rounding from mistakes.
        sabotage: Called in every process with its rank before it begins.
        patience: Seconds until all are ended.

    Returns:
        How each rank ended: nothing where all went well, else its error; `killed` where it said nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "slipstream.stages.train", "several_ranks"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        mine, theirs = context.Pipe(duplex=False)
        world = {} if num_ranks == 1 else world_of(rank, num_ranks, port)
        arguments = (theirs, dict(tree), str(runs), world, float64, sabotage)
        processes.append(context.Process(target=_run, args=arguments, daemon=True))
        pipes.append(mine)
        processes[-1].start()
        theirs.close()
    for process in processes:
        process.join(patience)
    ends = [_read(pipe) for pipe in pipes]
    for process in processes:
        process.kill()
        process.join()
    return ends


def world_of(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _read(pipe: Connection) -> str:
    try:
        return str(pipe.recv()) if pipe.poll(0) else "killed"
    except EOFError:
        return "killed"


def _run(
    pipe: Connection,
    tree: Mapping[str, Any],
    runs: str,
    world: Mapping[str, str],
    float64: bool,
    sabotage: Callable[[int], None] | None,
) -> None:
    import torch

    from slipstream.config import build_pipeline
    from slipstream.errors import SlipstreamError
    from slipstream.pipeline import run_pipeline

    os.environ.update(world)
    torch.set_num_threads(1)
    if float64:
        compute_in_float64()
    if sabotage is not None:
        sabotage(int(world.get("RANK", "0")))
    try:
        run_pipeline(build_pipeline(tree), Path(runs))
        pipe.send("")
    except (SlipstreamError, KeyboardInterrupt) as exc:
        pipe.send(f"{type(exc).__name__}: {exc}")
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


def compute_in_float64() -> None:
    """Let this process train in double precision, whatever the code says."""
    import torch

    from_numpy = torch.from_numpy
    torch.set_default_dtype(torch.float64)
    torch.from_numpy = lambda array: from_numpy(array).double() if array.dtype == np.float32 else from_numpy(array)  # type: ignore[assignment]
    torch.Tensor.float = lambda self, *args, **options: self  # type: ignore[method-assign,assignment]


def largest_difference(first: Mapping[str, Any], second: Mapping[str, Any], names: Sequence[str] = ()) -> float:
    """Of all tensors of two models, or of those named."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in names or first)


# --- what goes wrong on one rank; functions, so that another process can be given them -------------------------


def at_step(number: int, what: Callable[[], None]) -> None:
    """Let something happen before a step of this process."""
    from slipstream.training.loop import Trainer

    step = Trainer._train_batch

    def train_batch(self: Trainer, *arguments: Any) -> None:
        if self.totals.steps == number:
            what()
        step(self, *arguments)

    Trainer._train_batch = train_batch  # type: ignore[method-assign]


def fail_on_rank_1(rank: int) -> None:
    """A sample that rank 1 cannot digest."""
    from slipstream.errors import DataError

    def fail() -> None:
        raise DataError("line 7 of the log bites")

    if rank == 1:
        at_step(12, fail)


def vanish_on_rank_1(rank: int) -> None:
    """kill -9."""
    if rank == 1:
        at_step(12, lambda: os._exit(9))


def vanish_on_every_rank(rank: int) -> None:
    """A power cut, after the third checkpoint."""
    from slipstream.training.checkpoint import Checkpointer

    save, saved = Checkpointer._save, []

    def save_and_wait(self: Checkpointer, trainer: Any) -> None:
        save(self, trainer)
        self.wait(trainer)
        saved.append(trainer.totals.steps)
        if len(saved) == 3:
            os._exit(9)

    Checkpointer._save = save_and_wait  # type: ignore[method-assign]


def loiter_on_rank_1(rank: int) -> None:
    """A rank that does not come."""
    if rank == 1:
        at_step(12, lambda: time.sleep(3600))


def shuffle_otherwise_on_rank_1(rank: int) -> None:
    """Another order of samples, as another version of numpy could draw."""
    from slipstream.training.order.stream import SampleStream

    load_next = SampleStream._load_next

    def load_reversed(self: SampleStream) -> None:
        draw, self._rng = self._rng, SimpleNamespace(permutation=lambda size: draw.permutation(size)[::-1])  # type: ignore[assignment]
        load_next(self)
        self._rng = draw

    if rank == 1:
        SampleStream._load_next = load_reversed  # type: ignore[method-assign]


def compute_otherwise_on_rank_1(rank: int) -> None:
    """A device whose sums are off by a bit."""
    from slipstream.training.shared_step import SharedStep

    compute = SharedStep._compute

    def compute_wrongly(self: SharedStep, *arguments: Any) -> None:
        compute(self, *arguments)
        self.rows.buffer[0, 0] *= 1 + 1e-7

    if rank == 1:
        SharedStep._compute = compute_wrongly  # type: ignore[method-assign]
