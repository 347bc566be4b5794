"""Joining the other ranks: those that torchrun, or whoever sets its variables, started with this process."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from slipstream.distributed.environment import count_ranks
from slipstream.distributed.ranks import Ranks
from slipstream.errors import TrainingError

_joined: Ranks | None = None


def join_ranks(*, device: str, timeout_seconds: float) -> Ranks:
    """Meet the other ranks, once for the life of a process.

    Args:
        device: `train.device`; on CUDA each rank takes the device of its number on its machine.
        timeout_seconds: How long to wait for the others.

    Raises:
        TrainingError: They did not come.
    """
    global _joined
    if _joined is None:
        _joined = _meet(device, timeout_seconds)
        atexit.register(_joined.close)
    return _joined


def _meet(device: str, timeout_seconds: float) -> Ranks:
    place = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds))))
    except RuntimeError as exc:
        rank, reason = os.environ["RANK"], str(exc).splitlines()[0]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"rank {rank} of {count_ranks(os.environ)} found nobody at {where}: {reason}",
            hint="MASTER_ADDR and MASTER_PORT must name the machine of rank 0; unset WORLD_SIZE to train alone",
        ) from exc
    # the store of torchrun outlives its workers: what those of an attempt before left there is not for us
    attempt = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{os.environ['MASTER_PORT']}", store)
    return Ranks(rank, size, store=attempt, device=place, timeout_seconds=timeout_seconds)
