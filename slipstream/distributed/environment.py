"""Which rank a process is, as torchrun and clusters say it in the environment; read without torch."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count_ranks(environment: Mapping[str, str]) -> int:
    """Count the processes that train together; 1 where nothing says that there are others."""
    return int(environment["WORLD_SIZE"]) if all(name in environment for name in _NAMES) else 1


def own_rank(environment: Mapping[str, str]) -> int:
    """Give the number of this process among them, from 0."""
    return int(environment["RANK"]) if count_ranks(environment) > 1 else 0


def ranks_on_host(environment: Mapping[str, str]) -> int:
    """Count the processes of them that share this machine's cores."""
    if count_ranks(environment) == 1:
        return 1
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))
