"""Counts and click rates of the past in a whole preprocess, against plain loops over the lines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from raw_logs import make_lines, read_split, run_preprocess, write_raw

from slipstream.config import build_pipeline
from slipstream.errors import ConfigError, DataError
from slipstream.io.lookups import open_past, past_path
from slipstream.pipeline import run_pipeline

LINES = make_lines(700)
TRAIN = 600
PRIOR = 8.0


def log_odds(counts: np.ndarray, clicks: np.ndarray, lines: np.ndarray, all_clicks: np.ndarray) -> np.ndarray:
    rate = (all_clicks + 0.5) / (lines + 1)
    own = (clicks + PRIOR * rate) / (counts + PRIOR)
    return np.log(own / (1 - own)) - np.log(rate / (1 - rate))


def look_back(values: list[Any], labels: list[int], num_train: int) -> tuple[np.ndarray, np.ndarray]:
    """(counts, log-odds) of every line by a loop; lines after training see all of it and nothing of each other."""
    seen: Counter[Any] = Counter()
    clicked: Counter[Any] = Counter()
    found = []
    for at, (value, label) in enumerate(zip(values, labels, strict=True)):
        before = min(at, num_train)
        found.append((seen[value], clicked[value], before, sum(labels[:before])))
        if at < num_train:
            seen[value] += 1
            clicked[value] += label
    columns = np.array(found, float).T
    return columns[0], log_odds(*columns)


def test_lines_get_what_was_before_them(tmp_path: Path):
    log = write_raw(tmp_path / "log.tsv", LINES)
    counts = run_preprocess(
        tmp_path / "out",
        [log],
        freq_threshold=5,  # rare ids share a row, and are counted each for itself nevertheless
        chunk_bytes=20_000,
        count_features=("cat_20",),
        target_features=("cat_3", "cat_20"),
        target_prior=PRIOR,
    )
    assert counts["num_dense"] == 16 and counts["past"]["target_columns"] == [3, 20]
    encoded = pl.concat([read_split(tmp_path / "out", split) for split in ("train", "test", "val")])
    labels = [int(line[:1]) for line in LINES]
    tokens = {column: [line.split(b"\t")[14 + column] for line in LINES] for column in (3, 20)}
    before, odds = look_back(tokens[20], labels, TRAIN)
    np.testing.assert_allclose(encoded["int_13"], np.log1p(before), rtol=1e-6)
    np.testing.assert_allclose(encoded["int_14"], look_back(tokens[3], labels, TRAIN)[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoded["int_15"], odds, rtol=1e-5, atol=1e-6)
    past = open_past(past_path(tmp_path / "out", "cat_20"))
    assert past.counts.sum() == TRAIN and past.clicks.sum() == sum(labels[:TRAIN])


def test_labels_from_a_line_on_do_not_reach_it_or_any_before(tmp_path: Path):
    """A leak planted in the labels is seen where it may be, after the line, and nowhere else."""
    options: dict[str, Any] = {"target_features": ("all",), "dense_transform": "nvidia"}
    changed = [*LINES[:400], *(bytes([line[0] ^ 1]) + line[1:] for line in LINES[400:])]
    encoded = []
    for name, lines in (("honest", LINES), ("changed", changed)):
        run_preprocess(tmp_path / name, [write_raw(tmp_path / f"{name}.tsv", lines)], **options)
        encoded.append(read_split(tmp_path / name, "train").drop("label"))
    assert encoded[0][:401].equals(encoded[1][:401])
    assert not encoded[0][401:].equals(encoded[1][401:])


def pipeline_on(raw: Path, **preprocess: Any) -> dict[str, Any]:
    columns = {"label": "clicked", "sparse": ["user"], "dense": [], "time": "when"}
    return {
        "name": "past",
        "dataset": {"source": "table", "raw": str(raw), "columns": columns | {"period": "day"}},
        "preprocess": {"target_prior": PRIOR, "chunk_bytes": 4096, **preprocess},
    }


def write_table(path: Path, *, days: np.ndarray, rng: np.random.Generator) -> pl.DataFrame:
    frame = pl.DataFrame(
        {
            "user": rng.integers(0, 20, len(days)),
            "when": [f"2026-03-{day:02d}T08:00:00" for day in days.tolist()],
            "clicked": rng.integers(0, 2, len(days)),
        }
    )
    frame.write_csv(path)
    return frame


def test_days_are_gone_through_in_their_order_however_lines_stand(tmp_path: Path, rng: np.random.Generator):
    days = np.concatenate([rng.integers(4, 7, 400), rng.integers(1, 8, 1600)])  # the first chunks have no early day
    frame = write_table(tmp_path / "log.csv", days=days, rng=rng)
    tree = pipeline_on(tmp_path / "log.csv", split="by_day", count_features="user", target_features="all")
    artifact = run_pipeline(build_pipeline(tree), tmp_path, stages=["preprocess"]).stages["preprocess"].artifact
    by_day = frame.with_row_index().sort("when", "index")  # by day, then line
    num_train = int((days < 7).sum())
    before, odds = look_back(by_day["user"].to_list(), by_day["clicked"].to_list(), num_train)
    by_line = by_day.with_columns(before=before, odds=odds).sort("index")
    expected = by_line.filter(~pl.col("when").str.contains("-07T"))
    train = read_split(artifact.path, "train")
    np.testing.assert_allclose(train["int_0"], np.log1p(expected["before"]), rtol=1e-6)
    np.testing.assert_allclose(train["int_1"], expected["odds"], rtol=1e-5, atol=1e-6)


def test_what_would_be_the_future_is_refused(tmp_path: Path, rng: np.random.Generator):
    write_table(tmp_path / "log.csv", days=np.arange(700) % 7 + 1, rng=rng)
    tree = pipeline_on(tmp_path / "log.csv", split="chronological", count_features="all")
    with pytest.raises(DataError, match="before the last one of training") as caught:
        run_pipeline(build_pipeline(tree), tmp_path, stages=["preprocess"])
    assert "by_day" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="one by time with `count_features`"):
        build_pipeline(pipeline_on(tmp_path / "log.csv", split="random", count_features="all"))


def test_a_log_all_out_of_order_is_refused_before_hours_of_reading(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    from slipstream.datasets import past_columns

    monkeypatch.setattr(past_columns, "_MOST_VISITS", 3)
    write_table(tmp_path / "log.csv", days=rng.integers(1, 28, 2000), rng=rng)
    tree = pipeline_on(tmp_path / "log.csv", split="by_day", count_features="all")
    with pytest.raises(DataError, match="lines of 27 days or hours are spread over all"):
        run_pipeline(build_pipeline(tree), tmp_path, stages=["preprocess"])


def test_columns_must_be_there_and_have_one_value_a_line(tmp_path: Path):
    log = write_raw(tmp_path / "log.tsv", LINES)
    with pytest.raises(ConfigError, match=r"`preprocess.count_features` names `cat_99`, which is no sparse column"):
        run_preprocess(tmp_path / "out", [log], count_features=("cat_99",))
    (tmp_path / "log.csv").write_text("1,2,3,pv,4\n")
    tree = {"name": "t", "dataset": {"source": "taobao", "raw": str(tmp_path / "log.csv")}, "model": {"name": "tbsm"}}
    config = build_pipeline(tree | {"preprocess": {"split": "by_time", "target_features": "all"}})
    with pytest.raises(ConfigError, match="brings the lines of each user together"):
        run_pipeline(config, tmp_path, stages=["preprocess"])
