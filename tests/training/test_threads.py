from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from slipstream.training.threads import choose_threads, step_flop, torch_threads


def mlp(*sizes: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(fed, given) for fed, given in pairwise(sizes)))


TINY = nn.ModuleList([mlp(13, 64, 16), mlp(367, 64, 1)])
CRITEO = nn.ModuleList([mlp(13, 512, 256, 64, 16), mlp(367, 512, 256, 1)])


@pytest.mark.parametrize(
    ("network", "batch_size", "cores", "threads"),
    [
        (TINY, 256, 2, 1),
        (TINY, 1024, 64, 1),
        (CRITEO, 256, 64, 1),
        (CRITEO, 2048, 1, 1),
        (CRITEO, 2048, 2, 2),
        (CRITEO, 65_536, 16, 16),
    ],
)
def test_threads_are_as_many_as_the_step_is_worth(network: nn.Module, batch_size: int, cores: int, threads: int):
    flop = step_flop(network, batch_size, backward=True)
    assert choose_threads(0, flop=flop, cores=cores, default=7, environment={}) == threads


def test_flop_are_counted_by_hand():
    assert step_flop(mlp(3, 5, 1), 10, backward=False) == 2 * (3 * 5 + 5 * 1) * 10
    assert step_flop(mlp(3, 5, 1), 10, backward=True) == 6 * (3 * 5 + 5 * 1) * 10


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_environment_is_respected_and_the_pipeline_file_comes_first(variable: str):
    environment = {variable: "7"}
    assert choose_threads(0, flop=1, cores=2, default=7, environment=environment) == 7
    assert choose_threads(3, flop=1, cores=2, default=7, environment=environment) == 3


def test_torch_has_its_threads_back_afterwards():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
