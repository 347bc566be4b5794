"""Scoring raw lines: every line accounted for, and the same probabilities as in training."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pytest
import torch
from raw_logs import as_frame, invoke, make_lines, sample_line, write_pipeline, write_raw
from sklearn.metrics import log_loss, roc_auc_score

from slipstream.errors import ConfigError, DataError
from slipstream.io.artifacts import write_json
from slipstream.progress import Silent
from slipstream.serving.ensemble import Ensemble
from slipstream.serving.model import ServedModel
from slipstream.stages import score
from slipstream.training.threads import torch_threads

LINES = make_lines(700)
KINDS = {
    "dense": {},
    "int8": {"tables.representation": "int8"},
    "int4": {"tables.representation": "int4", "tables.quantize_linears": 8},
    "tt": {"tables.representation": "tt", "tables.tt_ranks": "[2, 2]", "train.mode": "fae"},
    "hashed": {
        "preprocess.num_buckets": 50,
        "preprocess.dense_transform": "torchrec",
        "preprocess.count_features": '["cat_3"]',
        "preprocess.target_features": '["cat_20"]',
    },
    "standard": {
        "preprocess.dense_transform": "standard",
        "preprocess.missing_flags": "true",
        "preprocess.count_features": "all",
        "preprocess.target_features": "all",
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Gives the train artifact of a kind, and the probabilities it predicted: test, then validation."""
    folder = tmp_path_factory.mktemp("trained")
    pipeline = write_pipeline(folder / "run.toml", write_raw(folder / "log.tsv", LINES))

    def train(kind: str) -> tuple[Path, np.ndarray]:
        runs = folder / kind
        overrides = [f"{key}={value}" for key, value in KINDS[kind].items()]
        assert invoke("run", pipeline, runs, *overrides, "train.batch_size=64").exit_code == 0
        (artifact,) = (runs / "run" / "train").glob("[0-9a-f]*")
        return artifact, np.concatenate([np.load(artifact / f"predictions_{split}.npy") for split in ("test", "val")])

    return train


def score_lines(model: Path, raw: Path | str, out: Path, **options: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    counts = score.run([ServedModel(model)], raw=[str(raw)], out=out, progress=Silent(), **options)
    readers = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".jsonl": pl.read_ndjson}
    return readers[out.suffix](out), counts


@pytest.mark.parametrize("kind", KINDS)
def test_lines_get_the_probabilities_that_training_predicted(trained, kind: str, tmp_path: Path):
    model, predicted = trained(kind)
    lines, _ = score_lines(model, write_raw(tmp_path / "log.tsv", LINES), tmp_path / "out.parquet")
    assert lines["line"].to_list() == list(range(1, 701))
    assert np.array_equal(lines["probability"].to_numpy()[-len(predicted) :], predicted)


def test_an_exported_model_scores_with_what_it_brings_along(trained, tmp_path: Path):
    model, _ = trained("standard")
    assert invoke("run", write_pipeline(tmp_path / "x.toml", "x"), tmp_path).exit_code == 1  # nothing else is needed
    from typer.testing import CliRunner

    from slipstream.cli import app

    done = CliRunner().invoke(app, ["export", "model", str(model), "--quantize", "int8", "--out", str(tmp_path / "m")])
    assert done.exit_code == 0, done.output
    raw = write_raw(tmp_path / "log.tsv", LINES)
    packed, _ = score_lines(tmp_path / "m", raw, tmp_path / "packed.parquet")
    whole, _ = score_lines(model, raw, tmp_path / "whole.parquet")
    difference = (packed["probability"] - whole["probability"]).abs()
    assert 0 < difference.max() < 0.02  # type: ignore[operator]


def test_quality_is_that_of_scikit_learn_on_what_is_written(trained, tmp_path: Path):
    raw = write_raw(tmp_path / "log.tsv", [*LINES, b"no sample"])
    lines, counts = score_lines(trained("dense")[0], raw, tmp_path / "out.parquet", keep=["label"])
    scored = lines.filter(pl.col("probability").is_not_null())
    labels, probabilities = scored["label"].cast(pl.Int8).to_numpy(), scored["probability"].to_numpy()
    assert counts["quality"]["auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    assert counts["quality"]["logloss"] == pytest.approx(log_loss(labels, probabilities.astype(float)), abs=1e-9)


def test_several_models_are_averaged_and_each_is_measured(trained, tmp_path: Path):
    # two that share vocabularies and transforms, one with other transforms, one with other vocabularies
    folders = [trained(kind)[0] for kind in ("dense", "int8", "standard", "hashed")]
    raw = write_raw(tmp_path / "log.tsv", [*LINES, b"no sample"])
    alone = [score_lines(folder, raw, tmp_path / f"{at}.parquet") for at, folder in enumerate(folders)]
    counts = score.run(list(map(ServedModel, folders)), raw=[str(raw)], out=tmp_path / "m.parquet", progress=Silent())
    lines = pl.read_parquet(tmp_path / "m.parquet")
    assert lines.columns == alone[0][0].columns
    mean = np.mean([one["probability"][:-1].cast(pl.Float64) for one, _ in alone], axis=0)
    np.testing.assert_allclose(lines["probability"][:-1], mean, rtol=1e-6)
    assert lines["probability"][-1] is None
    assert counts["models"] == [
        {"folder": str(folder), "quality": own["quality"]} for folder, (_, own) in zip(folders, alone, strict=True)
    ]
    labels = [int(line[:1]) for line in LINES]
    assert counts["quality"]["auc"] == pytest.approx(roc_auc_score(labels, mean), abs=1e-4)


def test_models_of_different_formats_are_not_averaged(trained, tmp_path: Path):
    model, _ = trained("dense")
    other = shutil.copytree(model, tmp_path / "other")
    description = json.loads((other / "model.json").read_text())
    description["encoding"]["max_ind_range"] = 7
    write_json(other / "model.json", description)
    with pytest.raises(ConfigError, match="their `max_ind_range` differs: 0 and 7"):
        Ensemble([ServedModel(model), ServedModel(other)])


def test_a_line_that_is_no_sample_has_a_null_and_its_reason(trained, tmp_path: Path):
    raw = write_raw(tmp_path / "log.tsv", [LINES[0], b"what is this", sample_line(dense="x"), b"", LINES[1]])
    lines, counts = score_lines(trained("dense")[0], raw, tmp_path / "out.csv", keep=["cat_0"])
    assert lines["probability"].is_null().to_list() == [False, True, True, True, False]
    assert lines["reason"].to_list()[1:4] == [
        "expected 40 fields, found 1",
        "int_0: expected an integer, found 'x'",
        "expected 40 fields, found 1",
    ]
    assert lines["cat_0"][0] == LINES[0].split(b"\t")[14].decode()
    assert (counts["lines"], counts["samples"], counts["rejected"]) == (5, 2, 3)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_lines_without_labels_are_scored_alike_in_every_format(trained, suffix: str, tmp_path: Path):
    model, _ = trained("dense")
    whole, _ = score_lines(model, write_raw(tmp_path / "log.tsv", LINES), tmp_path / "whole.parquet")
    bare = write_raw(tmp_path / "test.txt", [line.partition(b"\t")[2] for line in LINES])
    lines, counts = score_lines(model, bare, tmp_path / f"out{suffix}", keep=["int_1"])
    assert "quality" not in counts
    assert lines.columns == ["file", "line", "probability", "reason", "int_1"]
    assert lines["probability"].cast(pl.Float32).to_list() == whole["probability"].to_list()
    assert str(lines["int_1"][3] or "") == LINES[3].split(b"\t")[2].decode()


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "remote", "standard input"])
def test_lines_are_scored_alike_wherever_they_come_from(
    trained, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _ = trained("dense")
    plain, _ = score_lines(model, write_raw(tmp_path / "log.tsv", LINES), tmp_path / "plain.parquet", keep=["cat_1"])
    raw = str(tmp_path / f"log.tsv.{kind}")
    if kind in ("gz", "zst"):
        write_raw(Path(raw), LINES)
    elif kind == "parquet":
        as_frame(LINES).write_parquet(raw)
    elif kind == "remote":
        raw = "memory://score-test/log.tsv"
        with fsspec.open(raw, "wb") as remote:
            remote.write(b"\n".join(LINES))
    else:
        raw = "-"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(LINES))))
    found, counts = score_lines(model, raw, tmp_path / "out.parquet", keep=["cat_1"])
    assert found.drop("file").equals(plain.drop("file"))
    [file] = found["file"].unique()
    assert file.endswith(raw.removeprefix("memory://")) and counts["lines"] == len(LINES)


def test_several_files_are_numbered_each_from_one(trained, tmp_path: Path):
    write_raw(tmp_path / "day_2.tsv", LINES[:30])
    write_raw(tmp_path / "day_10.tsv", LINES[30:50])
    lines, _ = score_lines(trained("dense")[0], tmp_path / "day_*.tsv", tmp_path / "out.parquet")
    assert [Path(name).name for name in lines["file"]] == ["day_2.tsv"] * 30 + ["day_10.tsv"] * 20
    assert lines["line"].to_list() == [*range(1, 31), *range(1, 21)]


def test_a_killed_run_goes_on_and_ends_with_the_same_file(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = trained("dense")
    monkeypatch.setattr(score, "_BLOCK_BYTES", 1 << 14)
    raw = write_raw(tmp_path / "log.tsv", LINES)
    whole, expected = score_lines(model, raw, tmp_path / "whole.parquet")

    class Killed(BaseException):
        pass

    added = []

    def add_and_die(self, block, *arguments, **options):
        if len(added) == 3:
            raise Killed
        added.append(block.block_index)
        return original(self, block, *arguments, **options)

    original = score.ScoreFile.add
    with monkeypatch.context() as dying:
        dying.setattr(score.ScoreFile, "add", add_and_die)
        with pytest.raises(Killed):
            score_lines(model, raw, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    scored = []
    monkeypatch.setattr(score.ScoreFile, "add", lambda self, b, *a, **o: (scored.append(b), original(self, b, *a, **o)))
    lines, counts = score_lines(model, raw, tmp_path / "out.parquet")
    assert scored[0].block_index == 3  # the first three are not made again
    assert lines.equals(whole)
    assert counts == expected | {"output": str(tmp_path / "out.parquet")}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_parts_of_another_file_are_not_taken(trained, tmp_path: Path):
    stale = tmp_path / ".out.parquet.partial"
    stale.mkdir()
    write_json(stale / "key.json", {"raw": ["of something else"]})
    (stale / "00000-000000.parquet").write_bytes(b"not even Parquet")
    lines, _ = score_lines(trained("dense")[0], write_raw(tmp_path / "log.tsv", LINES[:9]), tmp_path / "out.parquet")
    assert lines.height == 9


def test_every_thread_computes_alone_and_torch_gets_its_threads_back(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _ = trained("dense")
    seen, predict = [], ServedModel.predict
    monkeypatch.setattr(score, "_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(
        ServedModel, "predict", lambda self, *args: (seen.append(torch.get_num_threads()), predict(self, *args))[1]
    )
    with torch_threads(3):
        score_lines(model, write_raw(tmp_path / "log.tsv", LINES), tmp_path / "out.parquet")
        assert torch.get_num_threads() == 3
    assert len(seen) > 3 and set(seen) == {1}


def test_an_empty_file_gives_no_lines(trained, tmp_path: Path):
    lines, counts = score_lines(trained("dense")[0], write_raw(tmp_path / "log.tsv", []), tmp_path / "out.parquet")
    assert lines.height == counts["lines"] == 0


def test_what_cannot_be_is_refused_by_name(trained, tmp_path: Path):
    model, _ = trained("dense")
    raw = write_raw(tmp_path / "log.tsv", LINES[:9])
    with pytest.raises(ConfigError, match="found `shoe_size`"):
        score_lines(model, raw, tmp_path / "out.parquet", keep=["shoe_size"])
    with pytest.raises(ConfigError, match="expected --out to end in one of"):
        score.run([ServedModel(model)], raw=[str(raw)], out=tmp_path / "out.xlsx", progress=Silent())
    with pytest.raises(DataError, match="--raw names `nowhere`"):
        score_lines(model, "nowhere", tmp_path / "out.parquet")


@pytest.mark.real_data
def test_avazu_without_clicks_keeps_its_ids(real_data: Path, tmp_path: Path):
    text = gzip.decompress((real_data / "avazu_hour0_24999.csv.gz").read_bytes()).splitlines(keepends=True)[:4000]
    raw = tmp_path / "train.csv"
    raw.write_bytes(b"".join(text))
    pipeline = tmp_path / "avazu.toml"
    pipeline.write_text(
        f'name = "run"\n[dataset]\nsource = "avazu"\nraw = "{raw}"\n[model]\nembedding_dim = 4\n'
        "bottom_mlp = [4]\ntop_mlp = [1]\n[profile]\ncurve = [0.1]\n"
    )
    assert invoke("run", pipeline, tmp_path / "runs").exit_code == 0
    (model,) = (tmp_path / "runs" / "run" / "train").glob("[0-9a-f]*")
    bare = tmp_path / "test.csv"
    bare.write_bytes(b"".join(b",".join((*line.split(b",")[:1], *line.split(b",")[2:])) for line in text))
    whole, counts = score_lines(model, raw, tmp_path / "whole.parquet", keep=["id"])
    lines, _ = score_lines(model, bare, tmp_path / "bare.parquet", keep=["id", "site_id"])
    assert lines["reason"][0] == "header line" and lines["reason"].null_count() == 3999
    assert lines["id"].equals(whole["id"]) and lines["probability"].equals(whole["probability"])
    assert counts["lines"] == 4000 and 0.4 < counts["quality"]["auc"] < 1
