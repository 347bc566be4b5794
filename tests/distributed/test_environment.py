"""Who this process is among others."""

from __future__ import annotations

import pytest

from slipstream.distributed.environment import count_ranks, own_rank, ranks_on_host

WORLD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}


def test_the_variables_of_torchrun_are_read():
    assert (count_ranks(WORLD), own_rank(WORLD), ranks_on_host(WORLD)) == (4, 1, 2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_process_with_only_some_of_them_is_alone(missing: str):
    some = {name: value for name, value in WORLD.items() if name != missing}
    assert (count_ranks(some), own_rank(some), ranks_on_host(some)) == (1, 0, 1)
