"""CPU threads of torch: as many as the work of a step is worth.

Two threads have to meet after every operation, and on a machine that does other work as well one of them waits for a
core each time. Small layers gain nothing from a second one. The number never follows from timing: another number of
threads rounds matrix products differently, and the same run must give the same model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

FLOP_PER_THREAD = 2_000_000_000
"""Floating-point operations of a step that are worth a thread: some 30 ms of one core."""

_SET_BY_USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def choose_threads(
    asked: int, *, flop: int, cores: int, default: int, environment: Mapping[str, str] = os.environ
) -> int:
    """Choose how many threads compute a step.

    Args:
        asked: What the pipeline file says; 0 leaves it to the rest.
        flop: Floating-point operations of a step.
        cores: Cores that this process may use.
        default: Torch's own number, which follows the environment.
        environment: Where `OMP_NUM_THREADS` or `MKL_NUM_THREADS` is set, torch's own number stays.

    Returns:
        At least 1; above 1 only where every thread has `FLOP_PER_THREAD`.
    """
    if asked:
        return asked
    if any(name in environment for name in _SET_BY_USERS):
        return default
    return max(1, min(cores, flop // FLOP_PER_THREAD))


def step_flop(model: nn.Module, batch_size: int, *, backward: bool) -> int:
    """Count the floating-point operations of the dense layers for one batch.

    Args:
        model: Its matrices are counted; a product is one multiplication and one addition for each weight and sample.
        batch_size: Samples.
        backward: Whether gradients are computed too, which is twice as much again.
    """
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    return (6 if backward else 2) * weights * batch_size


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
