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
from safetensors.torch import load_file
from several_ranks import largest_difference, train_together
from torch import nn
from trained import assert_same_model, assert_same_training, predictions_of

from slipstream import load
from slipstream.config import PipelineConfig, build_pipeline
from slipstream.io.artifacts import open_artifact
from slipstream.io.samples import read_shard
from slipstream.models.registry import read_model
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.progress import Silent
from slipstream.serving.examples import read_examples
from slipstream.stages import export, export_model, verify
from slipstream.training.checkpoint import Checkpointer
from slipstream.training.model_file import read_description, read_tensors

NUM_LINES, LENGTH, THRESHOLD = 1500, 3, 3
SLOW = pytest.mark.slow
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


def tree_on(raw: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    lists = {
        "genres": {"separator": "|", "length": LENGTH, "pooling": "mean"},
        "words": {"separator": " ", "length": 4, "pooling": "sum"},
    }
    columns = {"label": "clicked", "sparse": ["user"], "dense": ["price"], "lists": lists}
    return {
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


def config_on(raw: Path, **sections: dict[str, Any]) -> PipelineConfig:
    return build_pipeline(tree_on(raw, **sections))


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
    "int8": {"representation": "int8", "period": 7, "scale_per": "row"},
    "cores": {"overrides": {"cat_2": {"representation": "tt", "tt_ranks": [2]}}},
}
MODES = [
    {"mode": "resident"},
    {"mode": "baseline"},
    {"mode": "cached", "cache_ratio": 0.9},
    {"mode": "slipstream"},
    {"mode": "fae", "cold_access": "in_place"},
]


@pytest.mark.parametrize(
    ("held", "optimizer"),
    [
        ("dense", "rowwise_adagrad"),
        ("int4", "adam"),
        pytest.param("dense", "adam", marks=SLOW),
        pytest.param("int4", "rowwise_adagrad", marks=SLOW),
        ("cores", "adagrad"),
        pytest.param("cores", "adam", marks=SLOW),
        pytest.param("int8", "sgd", marks=SLOW),
    ],
)
def test_lists_give_the_same_model_in_every_mode_to_the_bit(log: Path, held: str, optimizer: str):
    options = {"optimizer": optimizer, "lr": 0.01}
    first = run(log, train={"mode": "fae", **options}, tables=HELD[held])
    for mode in MODES:
        other = run(log, train={**mode, **options}, tables=HELD[held])
        assert_same_training(first, other)
    assert other.counts("train")["hit_ratio"] == first.counts("train")["hit_ratio"]  # padding is no lookup in place


def predicted_by_bags(result: RunResult, lines: list[dict[str, str]]) -> np.ndarray:
    """What `nn.EmbeddingBag` and the network of a model's file make of lines, values looked up by their text."""
    folder = result.stages["train"].artifact.path
    description, (tensors, _) = read_description(folder), read_tensors(folder / "model.safetensors")
    padding = result.counts("preprocess")["padding_rows"]
    pooled = []
    for table, mode in (("cat_0", "sum"), ("cat_1", "mean"), ("cat_2", "sum")):
        weight, vocabulary = tensors[f"tables.{table}"], vocabulary_of(result, table)
        if table in padding:
            assert not weight[padding[table]].any()
        bag = nn.EmbeddingBag.from_pretrained(weight, mode=mode)
        values = [[line["user"]] if table == "cat_0" else values_of(line, table) for line in lines]
        rows = [vocabulary.get(value, 0) for of_line in values for value in of_line]
        starts = np.cumsum([0, *map(len, values)])[:-1]
        pooled.append(bag(torch.tensor(rows), torch.from_numpy(starts)))
    network = read_model(description).build(num_dense=1, num_columns=3)
    network.load_state_dict({k.removeprefix("dense."): v for k, v in tensors.items() if k.startswith("dense.")})
    dense = torch.tensor([[float(line["price"])] for line in lines]).log1p()
    with torch.inference_mode():
        predicted: np.ndarray = torch.sigmoid(network(dense, torch.stack(pooled, dim=1))).numpy()
    return predicted


def test_a_model_predicts_what_embedding_bags_predict_from_the_lines(
    trained: RunResult, lines: dict[str, list[dict[str, str]]]
):
    expected = predicted_by_bags(trained, lines["test"])
    assert np.allclose(predictions_of(trained, "test"), expected, rtol=0, atol=1e-6)
    assert trained.counts("train")["test"]["auc"] > 0.65


def test_the_published_order_trains_on_lists(log: Path, lines: dict[str, list[dict[str, str]]]):
    tree = tree_on(log, train={"faithful": True, "mode": "fae", "optimizer": "sgd"})
    for key in ("chunk_batches", "log_every"):
        del tree["train"][key]
    result = run_pipeline(build_pipeline(tree), log.parent / "runs")
    assert result.counts("train")["samples_seen"] == len(lines["train"])
    expected = predicted_by_bags(result, lines["test"])
    assert np.allclose(predictions_of(result, "test"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", [{"mode": "slipstream"}, {"mode": "cached", "cache_ratio": 0.9, "optimizer": "adam"}])
def test_lists_train_as_a_plain_loop_does_to_the_bit(log: Path, train: dict[str, Any]):
    config = config_on(log, train=train)
    made = run_pipeline(config, log.parent / "runs", stages=["preprocess", "profile", "segregate"])
    artifacts = {name: made.stages[name].artifact for name in ("segregate", "profile")}
    certificate = verify.run(
        config, segregated=artifacts["segregate"], profiled=artifacts["profile"], steps=30, progress=Silent()
    )
    assert certificate.passes
    assert certificate.promise == "to the bit"


def test_raw_lines_are_scored_as_encoded_ones_with_a_label_and_without(
    trained: RunResult, lines: dict[str, list[dict[str, str]]], tmp_path: Path
):
    model = load(trained.stages["train"].artifact.path)
    frame = pl.DataFrame(lines["test"])
    frame.write_csv(tmp_path / "labelled.csv")
    frame.drop("clicked").write_csv(tmp_path / "bare.csv")
    for name in ("labelled.csv", "bare.csv"):
        scores = model.score(tmp_path / name).filter(pl.col("probability").is_not_null())
        assert np.array_equal(scores["probability"].to_numpy(), predictions_of(trained, "test"))


def test_plain_operations_pool_lists(trained: RunResult):
    folder = trained.stages["train"].artifact.path
    model, examples = load(folder), read_examples(folder)
    with torch.inference_mode():
        found = model.portable()(torch.from_numpy(examples.dense), torch.from_numpy(examples.rows).long())
    assert np.abs(found.numpy() - model.predict(examples.dense, examples.rows)).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_exported_models_pool_lists(trained: RunResult, name: str, tmp_path: Path):
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    written = export_model.run(trained.stages["train"].artifact.path, out=tmp_path / name, format_name=name)
    assert written["largest_difference"] < 1e-6


def test_a_model_packed_after_training_pools_lists(trained: RunResult, tmp_path: Path):
    folder = trained.stages["train"].artifact.path
    export_model.run(folder, out=tmp_path / "int8", representation="int8")
    examples = read_examples(folder)
    packed, whole = (load(path).predict(examples.dense, examples.rows) for path in (tmp_path / "int8", folder))
    assert 0 < np.abs(packed - whole).max() < 0.02


def test_exported_samples_say_which_columns_are_lists(trained: RunResult, tmp_path: Path):
    summary = export.run(
        trained.stages["preprocess"].artifact, export_format="torchrec-npy", out_dir=tmp_path, progress=Silent()
    )
    assert [bag["columns"] for bag in summary["bags"]] == [(1, 3, 4), (2, 5, 6, 7)]
    assert np.load(tmp_path / "train_sparse.npy").shape == (summary["samples"]["train"], 8)


SKIPS = [
    {"criterion": "stale"},
    {"criterion": "stale", "movement": "net", "alpha": 0.5},
    pytest.param({"criterion": "importance", "scope": "all"}, marks=SLOW),
    pytest.param({"criterion": "random"}, marks=SLOW),
]


@pytest.mark.parametrize("skip", SKIPS, ids=str)
def test_every_criterion_skips_samples_with_lists_and_goes_on_after_an_interruption(
    log: Path, skip: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"skip": {"refresh_steps": 9, "target_drop": 0.3, **skip}, "train": {"checkpoint_steps": 7}}
    whole = run(log, **options)
    figures = whole.counts("train")
    assert figures["samples_dropped"] > 0
    assert figures["drop_achieved"] == pytest.approx(0.3, abs=0.1)
    original, saves = Checkpointer._save, []

    def save_then_die(self: Checkpointer, trainer: Any) -> None:
        original(self, trainer)
        self.wait(trainer)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "_save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config_on(log, **options), tmp_path)
    assert_same_model(whole, run_pipeline(config_on(log, **options), tmp_path))
    assert len(saves) > 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"mode": "slipstream"}, {"mode": "cached", "cache_ratio": 0.9}], ids=str)
def test_ranks_share_batches_with_lists(log: Path, mode: dict[str, Any], tmp_path: Path):
    """Two processes end with the model of one, in float64 to rounding, and count the same lookups."""
    tree = tree_on(log, train={**mode, "optimizer": "adagrad"})
    tree["distributed"] = {"timeout_seconds": 60.0}
    found = []
    for num_ranks in (1, 2):
        runs = tmp_path / str(num_ranks)
        run_pipeline(build_pipeline(tree), runs, stages=["preprocess", "profile", "segregate"])
        assert train_together(tree, runs, num_ranks) == [""] * num_ranks
        (folder,) = (path for path in (runs / "lists" / "train").iterdir() if not path.name.startswith("."))
        found.append((load_file(folder / "model.safetensors"), open_artifact(folder).counts["hit_ratio"]))
    (alone, hits), (shared, shared_hits) = found
    assert largest_difference(alone, shared) < 1e-9
    assert hits == shared_hits


def test_a_training_starts_from_a_model_with_lists(log: Path, trained: RunResult):
    folder = trained.stages["train"].artifact.path
    again = run(log, train={"init_from": str(folder), "lr": 1e-6})
    start = again.counts("train")["start"]
    assert start["rows_found"] == start["rows"] - 2  # the padding rows stay zero by themselves
    assert np.abs(predictions_of(again, "test") - predictions_of(trained, "test")).max() < 1e-3
