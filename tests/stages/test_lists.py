"""Lists of values in a field, through every stage: what is counted, what is hot, what is trained, what is scored."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from trained import assert_same_training, predictions_of

from slipstream.config import PipelineConfig, build_pipeline
from slipstream.io.samples import read_shard
from slipstream.models.registry import read_model
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.training.model_file import read_description, read_tensors

NUM_LINES, LENGTH, THRESHOLD = 1500, 3, 3
GENRES = ["Action", "Comedy", "Drama", "Horror", "Children's", "Western"]


def write_log(path: Path) -> None:
    """Clicks that hang on the genres; lists of none to five values, some of which are seen once or twice."""
    rng = np.random.default_rng(3)
    worth = dict(zip(GENRES, rng.normal(0, 2, len(GENRES)), strict=True))
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user", "genres", "words", "price", "clicked"])
        for at in range(NUM_LINES):
            genres = rng.choice(GENRES, rng.integers(0, 6), replace=False).tolist()
            words = [f"w{int(rng.zipf(1.4)) % 300}" for _ in range(rng.integers(0, 4))]
            liking = sum(worth[genre] for genre in genres[:LENGTH]) / max(len(genres[:LENGTH]), 1)
            clicked = int(rng.random() < 1 / (1 + np.exp(-liking)))
            writer.writerow([rng.integers(150), "|".join(genres), " ".join(words), at % 7, clicked])


def read_log(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def config_on(raw: Path, **sections: dict[str, Any]) -> PipelineConfig:
    lists = {
        "genres": {"separator": "|", "length": LENGTH, "pooling": "mean"},
        "words": {"separator": " ", "length": 4, "pooling": "sum"},
    }
    columns = {"label": "clicked", "sparse": ["user"], "dense": ["price"], "lists": lists}
    return build_pipeline(
        {
            "name": "lists",
            "dataset": {"source": "table", "raw": str(raw), "columns": columns},
            "preprocess": {"freq_threshold": THRESHOLD, "samples_per_part": 400},
            "profile": {"curve": [0.1, 0.5]},
            "segregate": {"hot_budget": "30%", "samples_per_shard": 300, **sections.get("segregate", {})},
            "model": {"embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
            "train": {"batch_size": 24, "chunk_batches": 3, "log_every": 10, "lr": 0.05, "device": "cpu"}
            | sections.get("train", {}),
            "tables": sections.get("tables", {}),
            "skip": {"criterion": "none", **sections.get("skip", {})},
        }
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "log.csv"
    write_log(path)
    return path


def run(log: Path, **sections: dict[str, Any]) -> RunResult:
    """Run the pipeline; what is there already is not run again."""
    return run_pipeline(config_on(log, **sections), log.parent / "runs")


@pytest.fixture(scope="module")
def trained(log: Path) -> RunResult:
    return run(log)


def lists_of(line: dict[str, str]) -> dict[str, list[str]]:
    """The values of a line that a sample keeps, by table."""
    return {"cat_1": line["genres"].split("|")[:LENGTH], "cat_2": line["words"].split(" ")[:4]}


COLUMNS = {"cat_1": ["cat_1", "cat_3", "cat_4"], "cat_2": ["cat_2", "cat_5", "cat_6", "cat_7"]}


def values_of(line: dict[str, str], table: str) -> list[str]:
    return [value for value in lists_of(line)[table] if value]


@pytest.fixture(scope="module")
def lines(log: Path, trained: RunResult) -> dict[str, list[dict[str, str]]]:
    """Lines of each split; test comes before validation."""
    sizes, read = trained.counts("preprocess")["samples"], read_log(log)
    ends = np.cumsum([sizes[name] for name in ("train", "test", "val")]).tolist()
    return {"train": read[: ends[0]], "test": read[ends[0] : ends[1]], "val": read[ends[1] :]}


def vocabulary_of(result: RunResult, table: str) -> dict[str | None, int]:
    frame = pl.read_parquet(result.stages["preprocess"].artifact.path / "vocab" / f"{table}.parquet")
    return dict(frame.select("raw_id", "row").rows())


def rows_of(result: RunResult, table: str, split: str) -> np.ndarray:
    """Rows of all columns of a list. Shape (n, length)."""
    files = result.stages["preprocess"].artifact.path / split / "*.parquet"
    return pl.read_parquet(files, columns=COLUMNS[table]).to_numpy()


@pytest.mark.parametrize("table", COLUMNS)
def test_a_sample_holds_the_first_values_of_its_line_then_padding(
    trained: RunResult, lines: dict[str, list[dict[str, str]]], table: str
):
    seen = Counter(value for line in lines["train"] for value in values_of(line, table))
    vocabulary = vocabulary_of(trained, table)
    padding = trained.counts("preprocess")["padding_rows"][table]
    assert vocabulary.keys() == {None, "", *(value for value, count in seen.items() if count >= THRESHOLD)}
    assert vocabulary[""] == padding
    for split in lines:
        for line, rows in zip(lines[split], rows_of(trained, table, split).tolist(), strict=True):
            expected = [vocabulary.get(value, 0) for value in values_of(line, table)]
            assert rows == expected + [padding] * (len(COLUMNS[table]) - len(expected))


def test_lists_are_summed_up(trained: RunResult, log: Path):
    read = read_log(log)
    found = trained.counts("preprocess")["lists"]["cat_1"]
    cut = [line["genres"].split("|") if line["genres"] else [] for line in read]
    assert found == {
        "values": sum(min(len(values), LENGTH) for values in cut),
        "empty": sum(not values for values in cut),
        "cut": sum(len(values) > LENGTH for values in cut),
    }
    assert min(found.values()) > 0


def test_profile_counts_every_value_and_no_padding(trained: RunResult, lines: dict[str, list[dict[str, str]]]):
    counts = pl.read_parquet(trained.stages["profile"].artifact.path / "counts.parquet")
    expected: Counter[tuple[int, int]] = Counter()
    for at, table in enumerate(COLUMNS, start=1):
        vocabulary = vocabulary_of(trained, table)
        for line in lines["train"]:
            expected.update((at, vocabulary.get(value, 0)) for value in values_of(line, table))
    found = {(table, row): count for table, row, count in counts.rows() if table > 0 and count}
    assert found == expected
    figures = trained.counts("profile")
    assert figures["lookups"] == expected.total() + len(lines["train"])
    assert figures["samples_counted"] == len(lines["train"])


@pytest.mark.parametrize("segregate", [{}, {"policy": "frequency"}, {"access_threshold": 30}], ids=str)
def test_a_sample_is_hot_when_all_its_values_are_whatever_its_padding(log: Path, segregate: dict[str, Any]):
    result = run_pipeline(
        config_on(log, segregate=segregate), log.parent / "runs", stages=["preprocess", "profile", "segregate"]
    )
    artifact, figures = result.stages["segregate"].artifact, result.counts("segregate")
    with np.load(artifact.path / "slots.npz") as stored:
        slots = {name: stored[name] for name in stored.files}
    padding = {slots[name][row] for name, row in figures["padding_rows"].items()}
    assert all(slot < figures["hot_rows"] for slot in padding)
    hits = lookups = 0
    for group in ("hot", "cold"):
        for part in artifact.files(f"{group}/", ".npz"):
            for sample in read_shard(part).X_cat.tolist():
                found = [slot < figures["hot_rows"] for slot in sample if slot not in padding]
                assert all(found) == (group == "hot")
                hits, lookups = hits + sum(found), lookups + len(found)
    assert 0 < figures["samples"]["hot"] < figures["samples"]["hot"] + figures["samples"]["cold"]
    assert figures["hit_ratio"] == pytest.approx(hits / lookups)


HELD = {
    "dense": {},
    "int4": {"representation": "int4", "period": 7},
    "cores": {"overrides": {"cat_2": {"representation": "tt", "tt_ranks": [2]}}},
}
MODES = [
    {"mode": "resident"},
    {"mode": "baseline"},
    {"mode": "cached", "cache_ratio": 0.9},
    {"mode": "slipstream"},
    {"mode": "fae", "cold_access": "in_place"},
]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_lists_give_the_same_model_in_every_mode_to_the_bit(log: Path, held: str, optimizer: str):
    options = {"optimizer": optimizer, "lr": 0.01}
    first = run(log, train={"mode": "fae", **options}, tables=HELD[held])
    for mode in MODES:
        other = run(log, train={**mode, **options}, tables=HELD[held])
        assert_same_training(first, other)
    assert other.counts("train")["hit_ratio"] == first.counts("train")["hit_ratio"]  # padding is no lookup in place


def test_a_model_predicts_what_embedding_bags_predict_from_the_lines(
    trained: RunResult, lines: dict[str, list[dict[str, str]]]
):
    folder = trained.stages["train"].artifact.path
    description, (tensors, _) = read_description(folder), read_tensors(folder / "model.safetensors")
    bags, padding = {}, trained.counts("preprocess")["padding_rows"]
    for table, mode in (("cat_0", "sum"), ("cat_1", "mean"), ("cat_2", "sum")):
        weight = tensors[f"tables.{table}"]
        bags[table] = nn.EmbeddingBag.from_pretrained(weight, mode=mode, padding_idx=padding.get(table))
        if table in padding:
            assert not weight[padding[table]].any()
    network = read_model(description).build(num_dense=1, num_columns=3)
    network.load_state_dict({k.removeprefix("dense."): v for k, v in tensors.items() if k.startswith("dense.")})
    user = vocabulary_of(trained, "cat_0")
    pooled = []
    for line in lines["test"]:
        rows = {
            table: [vocabulary_of_table.get(value, 0) for value in values_of(line, table)]
            for table, vocabulary_of_table in ((t, vocabulary_of(trained, t)) for t in COLUMNS)
        }
        rows["cat_0"] = [user.get(line["user"], 0)]
        pooled.append(torch.cat([bags[t](torch.tensor(rows[t], dtype=torch.long), torch.tensor([0])) for t in bags]))
    dense = torch.tensor([[float(line["price"])] for line in lines["test"]]).log1p()
    with torch.inference_mode():
        expected = torch.sigmoid(network(dense, torch.stack(pooled))).numpy()
    assert np.allclose(predictions_of(trained, "test"), expected, rtol=0, atol=1e-6)
    assert trained.counts("train")["test"]["auc"] > 0.65
