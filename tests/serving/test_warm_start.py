"""A training that starts from a model: rows by raw id, layers by shape."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from strategies import tiny_config
from trained import artifact_of, assert_same_model, model_of, predictions_of, train

from slipstream.errors import ArtifactError, ConfigError
from slipstream.io.figures import StartFigures, TrainFigures
from slipstream.pipeline import RunResult, plan_pipeline
from slipstream.report.terminal import _facts
from slipstream.training import checkpoint

STANDING_STILL: dict[str, Any] = {"train__optimizer": "sgd", "train__lr": 1e-20}
"""Training that moves nothing, so that what it started from is what it ends with."""


@pytest.fixture(scope="module")
def before(tiny_runs: Path) -> RunResult:
    return train(tiny_runs, train__mode="fae")


def vocabulary(result: RunResult, table: str) -> dict[str | None, int]:
    frame = pl.read_parquet(result.stages["preprocess"].artifact.path / "vocab" / f"{table}.parquet")
    return dict(zip(frame["raw_id"], frame["row"], strict=True))


@pytest.mark.parametrize("mode", ["resident", "cached", "baseline"])
def test_a_training_that_stands_still_predicts_what_it_started_from(
    tiny_runs: Path, before: RunResult, mode: str
) -> None:
    folder = str(artifact_of(before).path)
    options = {"train__mode": mode, "train__cold_path": tempfile.gettempdir() if mode == "baseline" else ""}
    after = train(tiny_runs, train__init_from=folder, train__seed=3, **options, **STANDING_STILL)
    np.testing.assert_allclose(predictions_of(after, "test"), predictions_of(before, "test"), rtol=1e-6)
    start = after.figures(TrainFigures).start  # type: ignore[union-attr]
    assert start == StartFigures(rows_found=start.rows, rows=start.rows, layers_taken=start.layers, layers=8)


def test_rows_are_found_by_raw_id_and_new_ids_start_as_they_would_without(tmp_path: Path, before: RunResult) -> None:
    other = {"seed": 5, "preprocess__freq_threshold": 1, "train__mode": "fae", **STANDING_STILL}
    folder = str(artifact_of(before).path)
    after, without = train(tmp_path, **other, train__init_from=folder), train(tmp_path, **other)
    old, new, drawn = model_of(before), model_of(after), model_of(without)
    found = 0
    for at in range(26):
        known, own = vocabulary(before, f"cat_{at}"), vocabulary(after, f"cat_{at}")
        assert own.keys() != known.keys()
        for raw_id, row in own.items():
            is_known = raw_id in known
            found += is_known
            expected = old[f"tables.cat_{at}"][known[raw_id]] if is_known else drawn[f"tables.cat_{at}"][row]
            assert torch.equal(new[f"tables.cat_{at}"][row], expected), (at, raw_id)
    start = after.figures(TrainFigures).start  # type: ignore[union-attr]
    assert 0 < start.rows_found == found < start.rows
    assert after.counts("train")["start"]["rows_found"] == found
    assert f"{found:,} of {start.rows:,} rows found by raw id" in dict(_facts(after))["start"]


def test_layers_of_another_shape_start_as_they_would_without(tiny_runs: Path, before: RunResult) -> None:
    wider = {"model__top_mlp": [16, 1], "train__mode": "fae", **STANDING_STILL}
    after = train(tiny_runs, **wider, train__init_from=str(artifact_of(before).path))
    new, old, drawn = model_of(after), model_of(before), model_of(train(tiny_runs, **wider))
    for name, value in new.items():
        if name.startswith("dense.bottom") or old[name].shape == value.shape:
            assert torch.equal(value, old[name]), name
        else:
            assert torch.equal(value, drawn[name]), name
    assert after.counts("train")["start"]["layers_taken"] == 5


def test_a_model_on_few_bits_is_a_start_too(tiny_runs: Path) -> None:
    few_bits = train(tiny_runs, train__mode="fae", tables={"representation": "int8", "period": 7})
    after = train(tiny_runs, train__mode="fae", train__init_from=str(artifact_of(few_bits).path), **STANDING_STILL)
    np.testing.assert_allclose(predictions_of(after, "val"), predictions_of(few_bits, "val"), rtol=1e-5)


def test_what_lies_there_counts_and_not_where(tmp_path: Path, tiny_runs: Path, before: RunResult) -> None:
    def fingerprint(folder: Path | str) -> str:
        return plan_pipeline(tiny_config(train__init_from=str(folder)), tiny_runs)[-1].key.fingerprint

    here, other = artifact_of(before).path, train(tiny_runs, train__mode="fae", train__seed=9)
    copy = shutil.copytree(here, tmp_path / "copy")
    assert fingerprint(here) == fingerprint(copy) != fingerprint("")
    assert fingerprint(here) != fingerprint(artifact_of(other).path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__embedding_dim": 8, "model__bottom_mlp": [8, 8]}, "has rows of 4 values, and here they have 8"),
        ({"tables": {"representation": "tt", "tt_ranks": [2]}}, "are tensor-train cores, which have none"),
        ({"dataset__max_ind_range": 50}, "its `max_ind_range` is 0, and here it is 50"),
        ({"preprocess__num_buckets": 40}, "hashed into 40 buckets, and were into 0"),
    ],
)
def test_a_model_of_other_ids_or_rows_is_refused_by_name(
    tmp_path: Path, before: RunResult, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, train__mode="fae", train__init_from=str(artifact_of(before).path), **overrides)


def test_a_model_that_is_missing_or_altered_is_refused(tmp_path: Path, tiny_runs: Path, before: RunResult) -> None:
    with pytest.raises(ConfigError, match=r"`train\.init_from`: expected a published artifact at `.*nothing`"):
        train(tiny_runs, train__init_from=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"is of stage profile, expected train"):
        train(tiny_runs, train__init_from=str(before.stages["profile"].artifact.path))
    copy = shutil.copytree(artifact_of(before).path, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        train(tiny_runs, train__mode="fae", train__init_from=str(copy))


def test_a_killed_training_goes_on_from_its_checkpoint_and_not_from_the_start(
    tmp_path: Path, tiny_runs: Path, before: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "train__mode": "fae",
        "train__init_from": str(artifact_of(before).path),
        "train__checkpoint_steps": 3,
        "train__seed": 4,
    }
    whole = train(tiny_runs, **options)
    save, left = checkpoint.Checkpointer._save, [4]

    def save_then_die(self: checkpoint.Checkpointer, trainer: Any) -> None:
        save(self, trainer)
        self.wait(trainer)
        left[0] -= 1
        if not left[0]:
            raise _KilledError

    monkeypatch.setattr(checkpoint.Checkpointer, "_save", save_then_die)
    with pytest.raises(_KilledError):
        train(tmp_path, **options)
    assert_same_model(whole, train(tmp_path, **options))
    assert not left[0] > 0, "it went on"


class _KilledError(BaseException):
    """Stands in for kill -9."""
