from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from strategies import tiny_config

from slipstream.config import PipelineConfig
from slipstream.errors import CapacityError, ConfigError
from slipstream.io.artifacts import Artifact
from slipstream.io.counts import read_counts
from slipstream.io.samples import read_shard
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.schema import dense_name, table_name
from slipstream.stage import row_bytes_of

ROW_BYTES = 4 * 4 + 4 + 16
"""Weights, the state of row-wise Adagrad, and what staleness keeps of a row."""
VARIANTS = {
    "frequency": {},
    "sample-aware": {"segregate__policy": "sample-aware"},
    "bytes": {"segregate__hot_budget": 20_000},
    "threshold": {"segregate__access_threshold": 5},
    "everything": {"segregate__hot_budget": "100%"},
    "least": {"segregate__hot_budget": 26 * ROW_BYTES},  # the OOV rows alone
}


def segregated(runs: Path, **overrides) -> tuple[PipelineConfig, RunResult]:
    config = tiny_config(**overrides)
    run_pipeline(config, runs, stages=["preprocess"])
    return config, run_pipeline(config, runs, stages=["segregate"])


@pytest.fixture(scope="module", params=VARIANTS)
def done(request: pytest.FixtureRequest, tiny_runs: Path) -> tuple[PipelineConfig, RunResult]:
    return segregated(tiny_runs, **VARIANTS[request.param])


def slot_maps(artifact: Artifact) -> list[np.ndarray]:
    with np.load(artifact.path / "slots.npz", allow_pickle=False) as arrays:
        return [arrays[table_name(index)] for index in range(26)]


def as_multiset(dense: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> Counter[bytes]:
    wide = np.concatenate([dense.view(np.int32), rows.astype(np.int32), labels[:, None].astype(np.int32)], axis=1)
    return Counter(sample.tobytes() for sample in np.ascontiguousarray(wide))


def shards_as_rows(artifact: Artifact, group: str) -> Counter[bytes]:
    rows_of_slot = [dict(zip(slots.tolist(), range(len(slots)), strict=True)) for slots in slot_maps(artifact)]
    total: Counter[bytes] = Counter()
    for path in artifact.files(f"{group}/", ".npz"):
        shard = read_shard(path)
        rows = [
            [of_table[slot] for of_table, slot in zip(rows_of_slot, sample, strict=True)]
            for sample in shard.X_cat.tolist()
        ]
        total += as_multiset(shard.X_int, np.array(rows), shard.y)
    return total


def parts_as_rows(artifact: Artifact, split: str) -> Counter[bytes]:
    frame = pl.concat(map(pl.read_parquet, artifact.files(f"{split}/", ".parquet")))
    dense = frame.select([dense_name(index) for index in range(13)]).to_numpy().astype(np.float32)
    rows = frame.select([table_name(index) for index in range(26)]).to_numpy()
    return as_multiset(np.ascontiguousarray(dense), rows, frame["label"].to_numpy())


def test_shards_hold_the_samples_of_the_parts(done):
    _, result = done
    processed, artifact = result.stages["preprocess"].artifact, result.stages["segregate"].artifact
    hot, cold = shards_as_rows(artifact, "hot"), shards_as_rows(artifact, "cold")
    assert hot + cold == parts_as_rows(processed, "train")
    for split in ("val", "test"):
        assert shards_as_rows(artifact, split) == parts_as_rows(processed, split)
    assert artifact.counts["samples"] == {
        "hot": hot.total(),
        "cold": cold.total(),
        "val": processed.counts["samples"]["val"],
        "test": processed.counts["samples"]["test"],
    }


def test_a_sample_is_hot_exactly_when_all_of_its_slots_are(done):
    _, result = done
    artifact = result.stages["segregate"].artifact
    num_hot = artifact.counts["hot_rows"]
    lookups = hits = 0
    for path in artifact.files("hot/", ".npz"):
        shard = read_shard(path)
        assert (shard.X_cat < num_hot).all()
        lookups, hits = lookups + shard.X_cat.size, hits + shard.X_cat.size
    for path in artifact.files("cold/", ".npz"):
        shard = read_shard(path)
        assert (shard.X_cat >= num_hot).any(axis=1).all()
        lookups, hits = lookups + shard.X_cat.size, hits + int((shard.X_cat < num_hot).sum())
    assert artifact.counts["hit_ratio"] == hits / lookups


def test_hot_rows_fit_the_budget_and_hold_every_oov_row(done):
    config, result = done
    counts = result.counts("segregate")
    hot_bytes, all_bytes = (counts[name] * row_bytes_of(config) for name in ("hot_rows", "rows"))
    budget = config.segregate.hot_budget
    if not config.segregate.access_threshold:
        asked = all_bytes * float(budget[:-1]) / 100 if isinstance(budget, str) else budget
        assert hot_bytes <= asked
    assert all(slots[0] < counts["hot_rows"] for slots in slot_maps(result.stages["segregate"].artifact))


def test_slots_number_every_row_once_hot_ones_first_in_table_then_row_order(done):
    _, result = done
    artifact = result.stages["segregate"].artifact
    maps = slot_maps(artifact)
    num_hot = artifact.counts["hot_rows"]
    together = np.concatenate(maps)
    assert together.dtype == np.int32
    assert sorted(together.tolist()) == list(range(artifact.counts["rows"]))
    for part in (together[together < num_hot], together[together >= num_hot]):
        assert (np.diff(part) == 1).all()


def test_the_hot_set_is_listed_with_its_counts(done):
    _, result = done
    artifact = result.stages["segregate"].artifact
    frame = pl.read_parquet(artifact.path / "hot_set.parquet")
    maps, counts = slot_maps(artifact), read_counts(result.stages["profile"].artifact)
    starts = np.cumsum([0, *map(len, maps)])
    assert frame["slot"].to_list() == list(range(artifact.counts["hot_rows"]))
    for table, row, slot, count in frame.rows():
        assert maps[table][row] == slot
        assert counts[starts[table] + row] == count
    beyond_oov = frame.filter(pl.col("row") > 0)["count"].to_list()
    if artifact.manifest["config"]["access_threshold"]:
        assert artifact.counts["lambda"] == 5
        assert min(beyond_oov) >= 5
        assert frame.height == 26 + sum(int((counts[a + 1 : b] >= 5).sum()) for a, b in pairwise(starts))
    else:
        assert artifact.counts["lambda"] == min(beyond_oov, default=0)


def test_shards_are_of_one_size_but_for_the_last(done):
    _, result = done
    artifact = result.stages["segregate"].artifact
    for group in ("hot", "cold", "val", "test"):
        sizes = [len(read_shard(path)) for path in artifact.files(f"{group}/", ".npz")]
        assert all(size == 500 for size in sizes[:-1])
        assert all(0 < size <= 500 for size in sizes[-1:])


def test_everything_hot_leaves_no_cold_sample_where_every_row_was_used(tiny_runs: Path):
    _, result = segregated(tiny_runs, **VARIANTS["everything"])
    counts = result.counts("segregate")
    assert counts["samples"]["cold"] == 0
    assert counts["hit_ratio"] == counts["hot_sample_share"] == 1


def test_sample_aware_has_at_least_the_hot_samples_of_frequency(tiny_runs: Path):
    by_count, aware = (segregated(tiny_runs, **VARIANTS[name])[1] for name in ("frequency", "sample-aware"))
    assert aware.counts("segregate")["hot_sample_share"] > by_count.counts("segregate")["hot_sample_share"]
    assert aware.counts("segregate")["hot_rows"] <= by_count.counts("segregate")["hot_rows"]


def test_a_larger_budget_keeps_every_hot_row(tiny_runs: Path):
    sets = []
    for budget in ("2%", "20%"):
        _, result = segregated(tiny_runs, segregate__hot_budget=budget)
        frame = pl.read_parquet(result.stages["segregate"].artifact.path / "hot_set.parquet")
        sets.append(set(frame.select("table", "row").rows()))
    assert sets[0] < sets[1]


@pytest.mark.parametrize("budget", ["0%", 0, "0MiB"])
def test_a_budget_of_nothing_is_a_configuration_error(budget: str | int):
    with pytest.raises(ConfigError, match=r"`segregate.hot_budget`"):
        tiny_config(segregate__hot_budget=budget)


@pytest.mark.parametrize("budget", [26 * ROW_BYTES - 1, 1, "0.01%"])
def test_a_budget_below_the_oov_rows_says_what_it_takes(tiny_runs: Path, budget: str | int):
    with pytest.raises(CapacityError, match="OOV rows of 26 tables") as caught:
        segregated(tiny_runs, segregate__hot_budget=budget)
    assert f"at least {26 * ROW_BYTES} bytes" in str(caught.value.hint)


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
def test_a_budget_above_all_rows_makes_every_row_hot_and_says_so(tiny_runs: Path, policy: str):
    settings = {"segregate__policy": policy, "profile__sample_ratio": 0.2}  # which counts some rows not at all
    _, result = segregated(tiny_runs, segregate__hot_budget="1GiB", **settings)
    counts = result.counts("segregate")
    assert counts["hot_rows"] == counts["rows"] and counts["hit_ratio"] == counts["hot_sample_share"] == 1
    assert counts["samples"]["cold"] == 0 == counts["lambda"]
    [warning] = counts["warnings"]
    assert (
        f"every row is hot: `segregate.hot_budget` = 1GiB is more than the {counts['rows'] * ROW_BYTES:,} bytes"
        in warning
    )
    _, whole = segregated(tiny_runs, segregate__hot_budget="100%", **settings)
    assert whole.counts("segregate") == counts | {"warnings": []}


def test_altered_parts_are_refused_or_unread(tiny_runs: Path, tmp_path: Path):
    _, result = segregated(tmp_path)
    counts = result.stages["profile"].artifact.path / "counts.parquet"
    counts.write_bytes(counts.read_bytes()[::-1])
    with pytest.raises(Exception, match="altered"):
        segregated(tmp_path, segregate__hot_budget="30%")
