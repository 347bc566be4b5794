"""What stages cost, as measured, so that a run that cannot end is refused before it begins.

Measured on a million synthetic samples of 13 numbers and 26 ids (243 MB of text, 241,000 rows), on two processor cores;
README shows the same figures. Time and disk grow with the number of samples; memory is that of the process.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_BYTES_PER_SAMPLE = 243
"""Of Criteo's line format."""
_ROWS_PER_SAMPLE = 0.241
_CHECKPOINTS = 2
_WINDOW_SAMPLES = 1_500_000
"""Of hot and of cold samples: the window that is loading, what is left of the one in use, and shards on their way."""
_ROUND_SAMPLES = 500_000
"""The round that trains and the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a stage takes for a million samples."""

    seconds: float
    disk_bytes: float
    """The most while it works."""
    memory_bytes: float
    """Of the process."""
    memory_bytes_per_row: float = 0.0
    """For every row of the tables beyond those measured."""


COSTS = {
    "generate": Cost(seconds=4, disk_bytes=0.25e9, memory_bytes=0.3e9),
    "preprocess": Cost(seconds=4, disk_bytes=0.15e9, memory_bytes=0.6e9, memory_bytes_per_row=66),
    "profile": Cost(seconds=5, disk_bytes=0.001e9, memory_bytes=0.5e9, memory_bytes_per_row=60),
    "segregate": Cost(seconds=1, disk_bytes=0.16e9, memory_bytes=0.8e9, memory_bytes_per_row=60),
    "train": Cost(seconds=17, disk_bytes=0.02e9, memory_bytes=1.0e9),
}
"""By stage; training is of one epoch, with a small network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a stage will about take."""

    stage: str
    seconds: float
    disk_bytes: int
    memory_bytes: int


def forecast_stage(
    stage: str, *, num_samples: int, row_bytes: int, epochs: int, num_rows: int | None, rows_on_disk: bool = False
) -> Forecast:
    """Say what a stage will about take on two cores.

    Args:
        stage: Its name, one in `COSTS`.
        num_samples: Of all splits.
        row_bytes: Of one row in training, optimizer state included.
        epochs: Of training.
        num_rows: Of all tables; None where nobody has counted them, then as many as so many synthetic samples have.
        rows_on_disk: Whether rows train in a file; which of them are hot, and so in memory after all, nobody knows yet.
    """
    cost, millions = COSTS[stage], num_samples / 1e6
    rows = int(num_samples * _ROWS_PER_SAMPLE) if num_rows is None else num_rows
    seconds, disk = cost.seconds * millions, cost.disk_bytes * millions
    memory = cost.memory_bytes + cost.memory_bytes_per_row * max(rows - 1e6 * _ROWS_PER_SAMPLE, 0)
    if stage == "train":
        tables = row_bytes * rows
        seconds *= epochs
        disk = train_disk_bytes(tables, keeps_checkpoints=True) + tables * rows_on_disk
        in_memory = 0 if rows_on_disk else tables
        memory = max(memory, 0.7e9 + train_memory_bytes(in_memory, num_samples, sample_bytes=4 * 40))
    return Forecast(stage=stage, seconds=seconds, disk_bytes=int(disk), memory_bytes=int(memory))


def train_disk_bytes(table_bytes: int, *, keeps_checkpoints: bool) -> int:
    """Bytes on disk of a model, and of the checkpoints beside it."""
    return table_bytes * (1 + _CHECKPOINTS * keeps_checkpoints)


def train_memory_bytes(table_bytes: int, num_samples: int, *, sample_bytes: int) -> int:
    """Bytes of memory of the tables and of the samples that training holds at once."""
    in_memory = min(num_samples, _WINDOW_SAMPLES) + min(num_samples, _ROUND_SAMPLES)
    return table_bytes + in_memory * sample_bytes
