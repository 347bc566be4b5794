"""Profile: how often is each row looked up, and what would a budget buy?

Reads   preprocess/   train and val parts
Writes  profile/      counts.parquet (table, row, count), curve.parquet (policy, split, budget -> Λ, hits, hot samples)
Keeps   the sum of counts = lookups read; sample_ratio = 1 is exact; padding is no lookup
Costs   one pass over the training rows for the counts, and one for each budget and round of the curve, over at
        most CURVE_SAMPLES samples; memory for a part, for these samples, and up to 60 bytes per row
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl

from slipstream.config import ProfileConfig
from slipstream.io.artifacts import Artifact, write_atomically
from slipstream.io.counts import write_counts
from slipstream.io.figures import CurveFigures, PreprocessFigures, ProfileFigures
from slipstream.io.processors import usable_cores
from slipstream.io.samples import column_offsets, count_samples, read_rows
from slipstream.ops.counting import count_accesses, sample_positions
from slipstream.ops.hot_set import choose_hot_rows, measure_hot_set, table_offsets
from slipstream.ops.parallel import in_order
from slipstream.progress import Progress
from slipstream.schema import table_name
from slipstream.stage import StageJob

CURVE_SAMPLES = 500_000
"""Training samples the curve is measured on, at most, and validation samples likewise."""

_BLOCK_SAMPLES = 65_536
"""Samples of the curve looked at together."""
_MOST_WORKERS = 4
_WORKER_BYTES, _WORKER_BYTES_PER_ROW = 32 << 20, 48
"""Memory that one budget of the curve takes while it is measured; for as many at once as fit _CURVE_BYTES."""
_CURVE_BYTES = 1 << 30

_Blocks = Callable[[], Iterable[np.ndarray]]


def run_stage(job: StageJob) -> ProfileFigures:
    """Run as a stage of a pipeline."""
    return run(
        job.config.profile,
        processed=job.inputs["preprocess"],
        sample_aware_power=job.config.segregate.sample_aware_power,
        sample_aware_rounds=job.config.segregate.sample_aware_rounds,
        seed=job.config.seed,
        scratch=job.scratch,
        progress=job.progress,
    )


def run(
    config: ProfileConfig,
    *,
    processed: Artifact,
    sample_aware_power: float,
    sample_aware_rounds: int,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> ProfileFigures:
    """Count accesses of the training split and measure the hot-set curve.

    Returns:
        Samples and lookups counted, rows, and the curve.
    """
    encoded = PreprocessFigures.of(processed)
    columns = [table_name(index) for index in range(len(encoded.column_tables))]
    offsets = table_offsets(list(encoded.rows_per_table.values()))
    starts = column_offsets(offsets, encoded.column_tables)
    padding_rows = encoded.global_padding_rows()
    num_counted = 0
    parts = processed.files("train/", ".parquet")
    kept: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    strides = {name: _stride(processed, name) for name in kept}
    with progress.task("count accesses", len(parts), "parts") as advance:

        def sampled() -> Iterator[np.ndarray]:
            nonlocal num_counted
            start = 0
            for part in parts:
                rows = read_rows(processed.check(part), columns, starts)
                kept["train"].append(rows[:: strides["train"]].copy())
                if config.sample_ratio < 1:
                    picked = sample_positions(start, start + len(rows), ratio=config.sample_ratio, seed=seed)
                    start += len(rows)
                    rows = rows[picked]
                num_counted += len(rows)
                yield rows
                advance(1, "")

        counts = count_accesses(sampled(), num_rows=int(offsets[-1]))
    counts[padding_rows] = 0
    write_counts(scratch / "counts.parquet", counts, encoded.rows_per_table)
    for part in processed.files("val/", ".parquet"):
        kept["val"].append(read_rows(processed.check(part), columns, starts)[:: strides["val"]].copy())
    blocks = {name: _in_blocks(np.concatenate(kept.pop(name))) for name in ("train", "val")}

    always_hot = np.concatenate([offsets[:-1], padding_rows])

    def measure(choice: tuple[float, str]) -> list[CurveFigures]:
        share, policy = choice
        hot_set = choose_hot_rows(
            policy,
            counts,
            always_hot,
            blocks["train"],
            num_rows=max(int(len(counts) * share), len(always_hot)),
            power=sample_aware_power,
            rounds=sample_aware_rounds,
        )
        points = {
            split: measure_hot_set(hot_set, read(), row_share=share, padding_rows=padding_rows)
            for split, read in blocks.items()
        }
        return [CurveFigures(policy=policy, split=split, **asdict(point)) for split, point in points.items()]

    choices = list(product(config.curve, ("frequency", "sample-aware")))
    curve: list[CurveFigures] = []
    with progress.task("hot-set curve", len(choices), "budgets") as advance:
        for points in in_order(measure, choices, _affordable_workers(len(counts))):
            curve += points
            advance(1, f"{points[0].row_share:.1%} {points[0].policy}")
    with write_atomically(scratch / "curve.parquet") as path:
        frame = pl.DataFrame([asdict(point) for point in curve])
        frame.select("policy", "split", pl.exclude("policy", "split")).write_parquet(path)
    lookups = int(counts.sum())
    return ProfileFigures(samples_counted=num_counted, lookups=lookups, rows=int(offsets[-1]), curve=curve)


def _stride(processed: Artifact, split: str) -> int:
    """Take every how manieth sample of a part, so that all parts give CURVE_SAMPLES at most, and one a part."""
    total = sum(count_samples(part) for part in processed.files(f"{split}/", ".parquet"))
    return max(1, -(-total // CURVE_SAMPLES))


def _in_blocks(rows: np.ndarray) -> _Blocks:
    return lambda: (rows[start : start + _BLOCK_SAMPLES] for start in range(0, len(rows), _BLOCK_SAMPLES))


def _affordable_workers(num_rows: int) -> int:
    fitting = _CURVE_BYTES // (_WORKER_BYTES + _WORKER_BYTES_PER_ROW * num_rows)
    return max(1, min(usable_cores(), _MOST_WORKERS, fitting))
