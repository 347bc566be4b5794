"""Criteo Kaggle, 137,139 real lines: figures that were measured by independent scripts."""

from __future__ import annotations

import gzip
import itertools
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from strategies import tiny_config

from slipstream.pipeline import RunResult, run_pipeline

pytestmark = pytest.mark.real_data

LINES = 137_139


@pytest.fixture(scope="module")
def raw_file(real_data: Path) -> Path:
    return real_data / "criteo_kaggle_137139.tsv.gz"


@pytest.fixture(scope="module")
def profiled(raw_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = tiny_config(
        dataset__source="criteo",
        dataset__raw=str(raw_file),
        preprocess__freq_threshold=1,
        preprocess__samples_per_part=50_000,
        profile__curve=[0.005, 0.01, 0.05, 0.1, 0.2],
        segregate__samples_per_shard=50_000,
    )
    runs = tmp_path_factory.mktemp("real")
    run_pipeline(config, runs, stages=["preprocess"])
    return run_pipeline(config, runs, stages=["profile"])


def point(result: RunResult, policy: str, share: float, split: str = "train") -> dict[str, float]:
    return next(
        found
        for found in result.counts("profile")["curve"]
        if (found["policy"], found["row_share"], found["split"]) == (policy, share, split)
    )


def test_every_line_is_a_sample(profiled: RunResult):
    counts = profiled.counts("preprocess")
    assert (counts["lines"], counts["rejected"]) == (LINES, 0)
    assert sum(counts["samples"].values()) == LINES
    assert counts["samples"] == {"train": 117_548, "val": 9795, "test": 9796}
    assert sum(counts["positives"].values()) / LINES == pytest.approx(0.2568, abs=5e-5)


def test_rows_are_the_distinct_values_of_the_training_split(profiled: RunResult, raw_file: Path):
    with gzip.open(raw_file, "rt") as stream:
        lines = [line.rstrip("\n").split("\t")[14:] for line in itertools.islice(stream, 117_548)]
    distinct = [len(set(column)) for column in zip(*lines, strict=True)]
    assert list(profiled.counts("preprocess")["rows_per_table"].values()) == [1 + number for number in distinct]
    assert sum(distinct) == 280_473
    column = Counter(line[0] for line in lines)
    vocabulary = pl.read_parquet(profiled.stages["preprocess"].artifact.path / "vocab" / "cat_0.parquet")
    expected = sorted(column.items(), key=lambda item: (-item[1], item[0]))
    assert vocabulary["raw_id"].to_list() == [None, *(value for value, _ in expected)]
    assert vocabulary["count"].to_list() == [0, *(count for _, count in expected)]
    assert vocabulary["raw_id"][1] == "05db9164"


@pytest.mark.parametrize(
    ("share", "hot_samples", "hits"), [(0.01, 4.5, 74.9), (0.05, 23.9, 85.9), (0.1, 37.1, 89.5), (0.2, 49.6, 92.2)]
)
def test_frequency_has_the_measured_shares(profiled: RunResult, share: float, hot_samples: float, hits: float):
    found = point(profiled, "frequency", share)
    assert 100 * found["hot_sample_share"] == pytest.approx(hot_samples, abs=0.2)
    assert 100 * found["hit_ratio"] == pytest.approx(hits, abs=0.2)


@pytest.mark.parametrize(("share", "hot_samples"), [(0.005, 5.4), (0.01, 9.5), (0.05, 31), (0.1, 44)])
def test_sample_aware_has_the_measured_shares(profiled: RunResult, share: float, hot_samples: float):
    assert 100 * point(profiled, "sample-aware", share)["hot_sample_share"] == pytest.approx(hot_samples, abs=1)
    unseen = {
        policy: point(profiled, policy, share, "val")["hot_sample_share"] for policy in ("frequency", "sample-aware")
    }
    if share <= 0.05:
        assert unseen["sample-aware"] > unseen["frequency"]


def test_segregation_keeps_what_the_curve_promised(profiled: RunResult, tmp_path_factory: pytest.TempPathFactory):
    result = run_pipeline(profiled.config, profiled.run_dir.parent, stages=["segregate"])
    counts = result.counts("segregate")
    promised = point(profiled, "frequency", 0.2)
    assert counts["hot_sample_share"] == pytest.approx(promised["hot_sample_share"], abs=1e-9)
    assert counts["hit_ratio"] == pytest.approx(promised["hit_ratio"], abs=1e-9)
    assert sum(counts["samples"].values()) == LINES
