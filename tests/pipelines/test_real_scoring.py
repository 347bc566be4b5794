"""Real logs scored from their raw lines, by models trained on other lines."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import pytest
from raw_logs import write_raw
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

import slipstream
from slipstream.cli import app

pytestmark = pytest.mark.real_data
SMALL = {"model.embedding_dim": 8, "model.bottom_mlp": [16, 8], "model.top_mlp": [16, 1], "train.mode": "resident"}


def train(pipeline: str, raw: Path | str, folder: Path, **options: Any) -> Path:
    return slipstream.run(pipeline, {**SMALL, **options, "dataset.raw": str(raw)}, runs=folder / "runs").model


def score(model: Path, raw: Path, out: Path, *keep: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Score by the command line: what was written, and what was printed."""
    options = ["--keep", ",".join(keep), "--json", "--quiet"]
    done = CliRunner().invoke(app, ["score", str(model), "--raw", str(raw), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    return pl.read_parquet(out), json.loads(done.stdout)


def assert_printed_quality_is_that_of_what_was_written(
    lines: pl.DataFrame, printed: dict[str, Any], label: str
) -> None:
    scored = lines.filter(pl.col("probability").is_not_null())
    labels, probabilities = scored[label].cast(pl.Int8).to_numpy(), scored["probability"].to_numpy().astype(float)
    assert printed["quality"]["auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    assert printed["quality"]["logloss"] == pytest.approx(log_loss(labels, probabilities), abs=1e-9)
    assert printed["quality"]["calibration"] == pytest.approx(probabilities.mean() / labels.mean(), rel=1e-6)


@pytest.fixture(scope="module")
def criteo(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of the first 60,000 lines of the Criteo extract, and 20,000 lines that follow."""
    folder = tmp_path_factory.mktemp("criteo")
    lines = gzip.decompress((real_data / "criteo_kaggle_137139.tsv.gz").read_bytes()).splitlines()
    first = write_raw(folder / "first.tsv", lines[:60_000])
    return train("criteo_kaggle", first, folder), write_raw(folder / "rest.tsv.gz", lines[60_000:80_000])


def test_criteo_lines_that_follow_the_trained_ones_are_scored(criteo: tuple[Path, Path], tmp_path: Path):
    lines, printed = score(*criteo, tmp_path / "scores.parquet", "label")
    assert lines.height == printed["lines"] == printed["samples"] == 20_000
    assert_printed_quality_is_that_of_what_was_written(lines, printed, "label")
    assert printed["quality"]["auc"] > 0.7


def test_terabyte_lines_are_scored_by_a_model_of_kaggle_lines(
    criteo: tuple[Path, Path], real_data: Path, tmp_path: Path
):
    lines, printed = score(
        criteo[0], real_data / "criteo_terabyte_day_0_10000.tsv.gz", tmp_path / "scores.parquet", "label"
    )
    assert lines.height == printed["lines"] == printed["samples"] == 10_000
    assert_printed_quality_is_that_of_what_was_written(lines, printed, "label")


def test_an_onnx_export_differs_by_rounding_alone_over_ten_thousand_lines(criteo: tuple[Path, Path], tmp_path: Path):
    model = slipstream.load(criteo[0])
    with gzip.open(criteo[1], "rb") as stream:
        dense, rows = model.encode(b"".join(islice(stream, 10_000)))
    onnx = tmp_path / "model.onnx"
    done = CliRunner().invoke(app, ["export", "model", str(criteo[0]), "--format", "onnx", "--out", str(onnx)])
    assert done.exit_code == 0, done.output
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"dense": dense, "rows": rows})
    assert found.shape == (10_000,) and len(np.unique(found)) > 9_000
    assert np.abs(found - model.predict(dense, rows)).max() <= 1e-6


def test_avazu_lines_of_one_hour_are_scored_by_a_model_of_other_days(real_data: Path, tmp_path: Path):
    model = train("avazu", real_data / "avazu_all10days_20000.csv.gz", tmp_path)
    hour = real_data / "avazu_hour0_24999.csv.gz"
    lines, printed = score(model, hour, tmp_path / "scores.parquet", "id", "click")
    # the header is a line too, and the only one that is no sample
    assert (lines.height, printed["samples"]) == (25_000, 24_999)
    assert lines["reason"].to_list()[0] == "header line"
    assert_printed_quality_is_that_of_what_was_written(lines, printed, "click")
    with gzip.open(hour, "rt") as stream:
        assert lines["id"].to_list() == [line.partition(",")[0] for line in stream]


def test_taobao_lines_of_many_users_are_scored_by_a_model_of_others(real_data: Path, tmp_path: Path):
    options = {name: value for name, value in SMALL.items() if name == "train.mode"}
    few = real_data / "taobao_114users_10000.csv.gz"
    model = slipstream.run("taobao", {**options, "dataset.raw": str(few)}, runs=tmp_path / "runs").model
    out = tmp_path / "scores.parquet"
    done = CliRunner().invoke(
        app,
        ["score", str(model), "--raw", str(real_data / "taobao_100001.csv.gz"), "--out", str(out), "--keep", "user"],
    )
    assert done.exit_code == 0, done.output
    lines = pl.read_parquet(out)
    users = [
        line.partition(b",")[0]
        for line in gzip.decompress((real_data / "taobao_100001.csv.gz").read_bytes()).splitlines()
    ]
    assert lines["user"].to_list() == [user.decode() for user in users]
    # the first event of each user, and nothing else, serves as history alone
    assert lines.filter(pl.col("probability").is_null())["user"].to_list() == list(dict.fromkeys(lines["user"]))
    assert lines["reason"].drop_nulls().unique().to_list() == ["no event of this user before it"]
