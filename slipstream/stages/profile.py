"""Profile: how often is each row looked up, and what would a budget buy?

Reads   preprocess/   train and val parts
Writes  profile/      counts.parquet (table, row, count), curve.parquet (policy, split, budget -> Λ, hits, hot samples)
Keeps   the sum of counts = lookups read; sample_ratio = 1 is exact
Costs   one pass over the training rows for the counts, and one for each budget and round of the curve, over at
        most CURVE_SAMPLES samples; 8 bytes per row of memory
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from slipstream.config import ProfileConfig
from slipstream.io.artifacts import Artifact, write_atomically
from slipstream.io.counts import write_counts
from slipstream.io.samples import column_offsets, count_samples, read_rows, table_of_column
from slipstream.ops.counting import count_accesses, sample_positions
from slipstream.ops.hot_set import (
    HotSet,
    measure_hot_set,
    rank_rows,
    select_sample_aware,
    table_offsets,
    take_hot_rows,
)
from slipstream.ops.parallel import in_order
from slipstream.progress import Progress
from slipstream.schema import table_name

CURVE_SAMPLES = 500_000
"""Training samples the curve is measured on, at most, and validation samples likewise."""

_MOST_WORKERS = 4
"""Budgets measured at once, each with some 100 MB of its own."""

_Blocks = Callable[[], Iterable[np.ndarray]]


def run(
    config: ProfileConfig,
    *,
    processed: Artifact,
    sample_aware_power: float,
    sample_aware_rounds: int,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Count accesses of the training split and measure the hot-set curve.

    Returns:
        Counts for the manifest: samples and lookups counted, rows, and the curve.
    """
    rows_per_table: dict[str, int] = processed.counts["rows_per_table"]
    column_tables = table_of_column(processed.counts)
    columns = [table_name(index) for index in range(len(column_tables))]
    offsets = table_offsets(list(rows_per_table.values()))
    starts = column_offsets(offsets, column_tables)
    parts = processed.files("train/", ".parquet")
    with progress.task("count accesses", len(parts), "parts") as advance:

        def sampled() -> Iterator[np.ndarray]:
            start = 0
            for part in parts:
                rows = read_rows(processed.check(part), columns, starts)
                if config.sample_ratio < 1:
                    picked = sample_positions(start, start + len(rows), ratio=config.sample_ratio, seed=seed)
                    start += len(rows)
                    rows = rows[picked]
                yield rows
                advance(1, "")

        counts = count_accesses(sampled(), num_rows=int(offsets[-1]))
    write_counts(scratch / "counts.parquet", counts, rows_per_table)
    blocks = {name: _hold_rows(processed, name, columns, starts) for name in ("train", "val")}

    def measure(choice: tuple[float, str]) -> list[dict[str, Any]]:
        share, policy = choice
        hot_set = _select(
            policy,
            counts,
            offsets[:-1],
            blocks["train"],
            share=share,
            power=sample_aware_power,
            rounds=sample_aware_rounds,
        )
        return [
            {"policy": policy, "split": split, **asdict(measure_hot_set(hot_set, held(), row_share=share))}
            for split, held in blocks.items()
        ]

    choices = list(product(config.curve, ("frequency", "sample-aware")))
    curve = []
    with progress.task("hot-set curve", len(choices), "budgets") as advance:
        for points in in_order(measure, choices, min(os.cpu_count() or 1, _MOST_WORKERS)):
            curve += points
            advance(1, f"{points[0]['row_share']:.1%} {points[0]['policy']}")
    with write_atomically(scratch / "curve.parquet") as path:
        pl.DataFrame(curve).write_parquet(path)
    return {
        "samples_counted": int(counts.sum()) // len(columns),
        "lookups": int(counts.sum()),
        "rows": int(offsets[-1]),
        "curve": curve,
    }


def _select(
    policy: str,
    counts: np.ndarray,
    oov_rows: np.ndarray,
    samples: _Blocks,
    *,
    share: float,
    power: float,
    rounds: int,
) -> HotSet:
    num_rows = max(int(len(counts) * share), len(oov_rows))
    if policy == "frequency":
        ranked = rank_rows(counts, oov_rows)
        return take_hot_rows(ranked, counts, num_rows=num_rows, num_oov=len(oov_rows))
    return select_sample_aware(counts, oov_rows, samples, num_rows=num_rows, power=power, rounds=rounds)


def _hold_rows(processed: Artifact, split: str, columns: list[str], starts: np.ndarray) -> _Blocks:
    """Rows of evenly chosen parts, up to CURVE_SAMPLES samples, kept in memory."""
    parts = processed.files(f"{split}/", ".parquet")
    total = sum(count_samples(part) for part in parts)
    stride = max(1, -(-total // CURVE_SAMPLES))
    held = [read_rows(processed.check(part), columns, starts)[::stride] for part in parts]
    return lambda: held
