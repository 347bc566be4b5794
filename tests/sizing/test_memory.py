"""Memory by part: what trainings report, and what takes none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from strategies import tiny_config
from trained import HELD, train

from slipstream.embedding.tiers.rows import NUM_SPARE, NUM_SPARE_COLD
from slipstream.io.counts import read_counts
from slipstream.io.figures import PreprocessFigures, SegregateFigures
from slipstream.pipeline import RunResult
from slipstream.sizing.memory import Memory
from slipstream.training.footprint import Footprint


def weigh(result: RunResult, *, on_cuda: bool = False) -> Footprint:
    encoded, segregated = result.figures(PreprocessFigures), result.figures(SegregateFigures)
    assert encoded is not None and segregated is not None
    counts = read_counts(result.stages["profile"].artifact)
    memory = Memory(result.config, encoded, counts, on_cuda=on_cuda)
    num_hot = segregated.hot_rows
    if not memory.has_rows.all():
        cores = [name for name, has in zip(encoded.rows_per_table, memory.has_rows, strict=True) if not has]
        import polars as pl

        hot = pl.read_parquet(result.stages["segregate"].artifact.path / "hot_set.parquet")
        num_hot -= hot.filter(
            pl.col("table").is_in([list(encoded.rows_per_table).index(name) for name in cores])
        ).height
    return memory.weigh(result.config, num_hot)


@pytest.mark.parametrize(
    ("held", "mode"),
    [
        *(("dense", {"train__mode": mode}) for mode in ("fae", "baseline", "resident")),
        ("int8", {"train__mode": "fae"}),
        ("tt", {"train__mode": "fae"}),
        ("by rank", {"train__mode": "fae"}),
    ],
)
def test_tiers_are_those_that_training_reports(tiny_runs: Path, mode: dict[str, Any], held: str):
    result = train(tiny_runs, tables=HELD[held], **mode)
    tiers = result.counts("train")["bytes_per_tier"]
    footprint = weigh(result)
    device, host = footprint.device, footprint.host
    assert device.get("hot rows", 0) + (device["optimizer state"] if "hot rows" in device else 0) == tiers["hot"]
    row_bytes = 4 * 4 + 4
    assert host["cold rows"] + host["optimizer state"] == tiers["cold"] + NUM_SPARE_COLD * row_bytes
    assert device["staging"] == tiers["staging"] + NUM_SPARE * row_bytes


def test_staleness_takes_what_training_reports(tiny_runs: Path):
    result = train(tiny_runs, train__mode="slipstream")
    device = weigh(result).device
    assert device["staleness"] == result.counts("train")["bytes_per_tier"]["staleness"] + 1024 * 16


def test_a_gpu_takes_page_locked_memory_and_a_fixed_batch(tiny_runs: Path):
    result = train(tiny_runs, train__mode="fae")
    cpu, gpu = weigh(result), weigh(result, on_cuda=True)
    assert gpu.host["moving rows"] >= 4 * (8 << 20) > cpu.host["moving rows"]
    assert gpu.device["layers"] > cpu.device["layers"]
    assert gpu.device["hot rows"] == cpu.device["hot rows"]


def test_evaluation_counts_where_it_takes_more_than_a_step(tiny_runs: Path):
    small = tiny_config(train__mode="fae", train__eval_batch_size=64)
    large = tiny_config(train__mode="fae", train__eval_batch_size=1 << 16)
    result = train(tiny_runs, train__mode="fae")
    encoded = result.figures(PreprocessFigures)
    assert encoded is not None
    counts = read_counts(result.stages["profile"].artifact)
    parts = [Memory(config, encoded, counts, on_cuda=False).weigh(config, 100).device for config in (small, large)]
    assert "evaluation beyond it" not in parts[0]
    assert parts[1]["evaluation beyond it"] > 26 * 4 * 4 * (1 << 16), "at least the rows of the batch"
    assert parts[0]["step"] == parts[1]["step"]
