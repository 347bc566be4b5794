from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from strategies import tiny_config

from slipstream.io import samples
from slipstream.io.counts import read_counts
from slipstream.ops.hot_set import CurvePoint, HotSet, measure_hot_set
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.schema import table_name
from slipstream.stages import profile


def run_to_profile(runs: Path, **overrides) -> RunResult:
    config = tiny_config(**overrides)
    run_pipeline(config, runs, stages=["preprocess"])
    return run_pipeline(config, runs, stages=["profile"])


@pytest.fixture(scope="module")
def profiled(tiny_runs: Path) -> RunResult:
    return run_to_profile(tiny_runs)


def train_frame(result: RunResult) -> pl.DataFrame:
    return pl.concat(map(pl.read_parquet, result.stages["preprocess"].artifact.files("train/", ".parquet")))


def test_counts_equal_a_plain_counter(profiled: RunResult):
    artifact = profiled.stages["profile"].artifact
    frame = train_frame(profiled)
    plain: list[int] = []
    for name, num_rows in profiled.counts("preprocess")["rows_per_table"].items():
        counter = Counter(frame[name].to_list())
        plain += [counter[row] for row in range(num_rows)]
    assert read_counts(artifact).tolist() == plain
    assert artifact.counts["lookups"] == sum(plain) == frame.height * 26
    assert artifact.counts["samples_counted"] == frame.height == profiled.counts("preprocess")["samples"]["train"]


def test_counts_are_those_of_the_vocabulary_and_fall_with_the_row(profiled: RunResult):
    processed = profiled.stages["preprocess"].artifact
    counts = pl.read_parquet(profiled.stages["profile"].artifact.path / "counts.parquet")
    for index in range(26):
        of_table = counts.filter(pl.col("table") == index)
        vocabulary = pl.read_parquet(processed.path / "vocab" / f"{table_name(index)}.parquet")
        assert of_table["count"].to_list() == vocabulary["count"].to_list()
        assert of_table["row"].to_list() == list(range(vocabulary.height))
        beyond_oov = of_table["count"].to_numpy()[1:]
        assert (np.diff(beyond_oov) <= 0).all()


def test_the_curve_is_on_disk_and_grows_with_the_budget(profiled: RunResult):
    artifact = profiled.stages["profile"].artifact
    curve = pl.read_parquet(artifact.path / "curve.parquet")
    assert curve.to_dicts() == artifact.counts["curve"]
    assert curve.height == 2 * 2 * 2  # budgets, policies, splits
    for (policy,), of_policy in curve.filter(pl.col("split") == "train").group_by("policy"):
        small, large = of_policy.sort("row_share").to_dicts()
        assert small["hot_sample_share"] <= large["hot_sample_share"], policy
        assert small["hot_rows"] < large["hot_rows"]
    by_policy = curve.filter((pl.col("split") == "train") & (pl.col("row_share") == 0.05)).sort("policy").to_dicts()
    assert by_policy[0]["policy"] == "frequency"
    assert by_policy[0]["hot_sample_share"] <= by_policy[1]["hot_sample_share"]
    assert by_policy[0]["hit_ratio"] >= by_policy[1]["hit_ratio"]


def test_a_point_of_the_curve_equals_a_plain_count(profiled: RunResult):
    counts = read_counts(profiled.stages["profile"].artifact)
    sizes = list(profiled.counts("preprocess")["rows_per_table"].values())
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    ranked = sorted(set(range(len(counts))) - set(starts), key=lambda row: (-counts[row], row))
    hot = set(starts) | set(ranked[: int(len(counts) * 0.2) - 26])
    samples = [
        [row + start for row, start in zip(rows, starts, strict=True)]
        for rows in train_frame(profiled).select([table_name(index) for index in range(26)]).rows()
    ]
    hits = sum(row in hot for sample in samples for row in sample)
    hot_samples = sum(all(row in hot for row in sample) for sample in samples)
    point = next(
        point
        for point in profiled.counts("profile")["curve"]
        if (point["policy"], point["split"], point["row_share"]) == ("frequency", "train", 0.2)
    )
    assert point["hit_ratio"] == pytest.approx(hits / (26 * len(samples)), rel=1e-12)
    assert point["hot_sample_share"] == pytest.approx(hot_samples / len(samples), rel=1e-12)


def test_a_sampled_profile_counts_about_its_share(tiny_runs: Path, profiled: RunResult):
    sampled = run_to_profile(tiny_runs, profile__sample_ratio=0.2)
    counts, exact = (read_counts(result.stages["profile"].artifact) for result in (sampled, profiled))
    assert (counts <= exact).all()
    assert 0.17 < counts.sum() / exact.sum() < 0.23
    assert counts.sum() == 26 * sampled.counts("profile")["samples_counted"]


def test_the_curve_holds_its_samples_and_no_part(tmp_path: Path, profiled: RunResult, monkeypatch: pytest.MonkeyPatch):
    seen: list[np.ndarray] = []

    def measure(hot_set: HotSet, blocks: Iterable[np.ndarray], **options: Any) -> CurvePoint:
        seen.extend(blocks := list(blocks))
        return measure_hot_set(hot_set, blocks, **options)

    monkeypatch.setattr(profile, "measure_hot_set", measure)
    monkeypatch.setattr(profile, "CURVE_SAMPLES", 100)
    sampled = run_to_profile(tmp_path, preprocess__samples_per_part=300)
    num_parts = len(sampled.stages["preprocess"].artifact.files("train/", ".parquet"))
    assert num_parts > 5 and len(seen) == len(sampled.counts("profile")["curve"]), (
        "one block a point, whatever the parts"
    )
    for block in seen:
        owner = block if block.base is None else block.base
        assert owner.nbytes <= (100 + num_parts) * 26 * 4, "no view keeps a whole part alive"
    assert sampled.counts("profile")["lookups"] == profiled.counts("profile")["lookups"], "counts are of all samples"


def test_no_part_outlives_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[weakref.ref[np.ndarray]] = []
    most_alive = 0

    def read_rows(*arguments: Any) -> np.ndarray:
        nonlocal most_alive
        rows = samples.read_rows(*arguments)
        most_alive = max(most_alive, sum(part() is not None for part in read))
        read.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(profile, "read_rows", read_rows)
    monkeypatch.setattr(profile, "CURVE_SAMPLES", 100)
    run_to_profile(tmp_path, preprocess__samples_per_part=300)
    assert len(read) > 5 and most_alive <= 2, "only the one that is counted and the one before it are still there"


def test_fewer_budgets_are_measured_at_once_where_tables_are_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profile, "usable_cores", lambda: 64)
    assert [profile._affordable_workers(rows) for rows in (1000, 8_000_000, 10**9)] == [4, 2, 1]


def test_the_size_of_parts_does_not_change_the_counts(tmp_path: Path, profiled: RunResult):
    other = run_to_profile(tmp_path, preprocess__samples_per_part=100_000)
    for name in ("counts.parquet", "curve.parquet"):
        first, second = (result.stages["profile"].artifact.path / name for result in (profiled, other))
        assert first.read_bytes() == second.read_bytes()
