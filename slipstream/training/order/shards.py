"""The shards of a segregate artifact, as what training reads: streams of an epoch, and whole splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from slipstream.io.artifacts import Artifact
from slipstream.io.figures import SegregateFigures
from slipstream.io.samples import Samples, read_shard
from slipstream.training.order.rounds import OpenStreams
from slipstream.training.order.stream import SampleStream
from slipstream.training.slot_layout import SlotLayout

WINDOW_SAMPLES = 500_000
"""Samples shuffled together."""
_NUM_LOADERS = 8
"""Threads that read shards."""


def read_slot_maps(segregated: Artifact) -> dict[str, np.ndarray]:
    """Read the slot of each row, per table, in the order of the tables."""
    path = segregated.check(segregated.path / "slots.npz")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in SegregateFigures.of(segregated).rows_per_table}


class Shards:
    """Samples of a segregate artifact, in slots of a layout.

    Args:
        segregated: The artifact.
        layout: Of the run that reads them.
    """

    def __init__(self, segregated: Artifact, layout: SlotLayout) -> None:
        self._segregated, self._layout = segregated, layout
        self.figures = SegregateFigures.of(segregated)
        """What segregate reported."""

    def split(self, name: str) -> Iterator[Samples]:
        """Read the shards of `val` or `test`, in order."""
        return (self._load(path) for path in self._paths(name))

    @contextmanager
    def streams(self, *, seed: int) -> Iterator[OpenStreams]:
        """Give what opens the streams of an epoch, each in an order of its own drawn by seed."""
        with ThreadPoolExecutor(max_workers=_NUM_LOADERS, thread_name_prefix="shards") as workers:
            yield lambda epoch: {group: self._open(group, seed, epoch, workers) for group in ("hot", "cold")}

    def _open(self, group: str, seed: int, epoch: int, workers: ThreadPoolExecutor) -> SampleStream:
        paths = self._paths(group)

        def loader(path: Path) -> Callable[[], Samples]:
            return lambda: self._load(path)

        per_shard = self._segregated.manifest["config"]["samples_per_shard"]
        total = self.figures.samples[group]
        return SampleStream(
            [loader(path) for path in paths],
            [min(per_shard, total - index * per_shard) for index in range(len(paths))],
            seed=(seed, epoch, len(group)),
            window_samples=WINDOW_SAMPLES,
            workers=workers,
        )

    def _paths(self, group: str) -> list[Path]:
        return self._segregated.files(f"{group}/", ".npz")

    def _load(self, path: Path) -> Samples:
        return self._layout.translate(read_shard(self._segregated.check(path)))
