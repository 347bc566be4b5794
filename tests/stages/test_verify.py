"""Trained as configured, and as everybody would write it: the same model to the bit, or verify says where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import tiny_config

from slipstream.config import build_pipeline
from slipstream.embedding.tiers.transfer import RowMover
from slipstream.errors import ConfigError
from slipstream.io.certificates import Certificate
from slipstream.pipeline import run_pipeline
from slipstream.progress import Silent
from slipstream.stages import verify

SKIPS = {"train__mode": "slipstream", "train__batch_size": 32, "segregate__hot_budget": "50%", "skip__refresh_steps": 8}


def certify(runs: Path, *, steps: int = 30, **overrides: Any) -> Certificate:
    config = tiny_config(**overrides)
    result = run_pipeline(config, runs, stages=["preprocess", "profile", "segregate"])
    inputs = {"segregated": result.stages["segregate"].artifact, "profiled": result.stages["profile"].artifact}
    return verify.run(config, **inputs, steps=steps, progress=Silent())


@pytest.mark.parametrize(
    "overrides",
    [
        {"train__mode": "resident", "train__positive_weight": 2.0},
        {"train__mode": "baseline", "train__optimizer": "sgd", "train__lr": 0.05},
        {"train__mode": "fae", "train__optimizer": "adagrad", "train__weight_decay": 0.001},
        {"train__mode": "fae", "train__optimizer": "adam", "train__lr": 0.003, "train__lr_warmup": 0.2},
        {"train__mode": "fae", "train__order": "mixed", "train__precision": "bf16"},
        {"train__mode": "cached", "train__cache_ratio": 0.5, "train__lr_decay": "linear"},
        {"train__mode": "fae", "model": {"name": "deepfm", "embedding_dim": 4}},
        {"train__mode": "fae", "model": {"name": "dcnv2", "embedding_dim": 4}},
        {**SKIPS, "skip__criterion": "stale"},
        {**SKIPS, "skip__criterion": "negative", "skip__scope": "all"},
        {**SKIPS, "skip__criterion": "importance", "skip__scope": "all", "train__optimizer": "adam"},
        {**SKIPS, "skip__criterion": "negative", "skip__scope": "all", "train__optimizer": "adagrad"},
        {**SKIPS, "skip__criterion": "random", "skip__keep_steps": True, "train__optimizer": "sgd"},
    ],
    ids=lambda overrides: " ".join(f"{value}" for value in overrides.values()),
)
def test_every_mode_rule_model_and_criterion_trains_the_model_of_a_plain_loop_to_the_bit(
    tiny_runs: Path, overrides: dict[str, Any]
):
    certificate = certify(tiny_runs, **overrides)
    assert certificate.verdict == "equal to the bit", certificate.worst
    assert (certificate.worst.largest_difference, certificate.worst.largest_ulp) == (0, 0)
    names = {one.name for one in certificate.parameters}
    assert {f"tables.cat_{at}" for at in range(26)} < names
    assert any(name.startswith("dense.") for name in names)
    assert certificate.steps == 30


def test_skipped_samples_and_weights_are_the_same_in_both(tiny_runs: Path):
    certificate = certify(tiny_runs, **SKIPS, skip__criterion="negative", skip__scope="all")
    assert certificate.passes
    dropped = int(certificate.skipping.split(": ")[1].split()[0].replace(",", ""))
    assert dropped > 100
    weighted, batches = (int(word) for word in certificate.skipping.split(" in ")[-1].split()[:3:2])
    assert 0 < weighted < batches == certificate.steps


def test_sequences_with_padding_and_shared_tables_are_verified_too(tmp_path: Path, real_data: Path):
    config = build_pipeline(
        {
            "name": "taobao",
            "dataset": {
                "source": "taobao",
                "raw": str(real_data / "taobao_114users_10000.csv.gz"),
                "history_length": 5,
            },
            "model": {"name": "tbsm", "embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1]},
            "train": {"batch_size": 64, "device": "cpu", "mode": "fae"},
        }
    )
    result = run_pipeline(config, tmp_path, stages=["preprocess", "profile", "segregate"])
    inputs = {"segregated": result.stages["segregate"].artifact, "profiled": result.stages["profile"].artifact}
    certificate = verify.run(config, **inputs, steps=30, progress=Silent())
    assert certificate.verdict == "equal to the bit", certificate.worst
    assert len({tuple(one.shape) for one in certificate.parameters if one.name.startswith("tables.")}) > 1


def test_it_stops_after_the_steps_asked_for(tiny_runs: Path):
    short, longer = (certify(tiny_runs, train__mode="fae", steps=steps) for steps in (3, 4))
    assert (short.steps, longer.steps) == (3, 4)
    assert short.batches_xxh3 != longer.batches_xxh3
    assert short.samples == 3 * 64


def test_a_tier_that_loses_an_update_is_found_with_its_table(tiny_runs: Path, monkeypatch: pytest.MonkeyPatch):
    write_back = RowMover.write_back

    def lose_one(self: RowMover, cold: np.ndarray, positions: np.ndarray) -> None:
        write_back(self, cold[1:], positions[1:])

    monkeypatch.setattr(RowMover, "write_back", lose_one)
    certificate = certify(tiny_runs, train__mode="fae", steps=20)
    assert certificate.verdict == "different"
    assert not certificate.passes
    assert certificate.worst.name.startswith("tables.")
    assert certificate.worst.differing > 0 and certificate.worst.largest_ulp > 1


def test_rows_of_two_steps_ago_are_found(tiny_runs: Path, monkeypatch: pytest.MonkeyPatch):
    fetch = RowMover.fetch
    kept: list[Any] = []

    def fetch_late(self: RowMover, cold: np.ndarray, positions: np.ndarray) -> None:
        if not kept:
            kept.append(self._rows.cold.clone())
        now = self._rows.cold.clone()
        self._rows.cold.copy_(kept[-1])
        fetch(self, cold, positions)
        self._rows.cold.copy_(now)

    monkeypatch.setattr(RowMover, "fetch", fetch_late)
    assert certify(tiny_runs, train__mode="baseline", steps=20).verdict == "different"


def test_one_bit_is_seen():
    values = torch.tensor([1.0, -2.0, 0.0, 5.0])
    other = values.clone()
    other[1] = float(np.nextafter(np.float32(-2), np.float32(0)))
    found = verify.compare("w", values, other)
    assert (found.differing, found.largest_ulp) == (1, 1)
    assert found.largest_difference == pytest.approx(2**-23)
    assert verify.compare("w", values, values).differing == 0
    assert verify.compare("w", values, -values).largest_ulp > 2**30, "from one side of zero to the other"
    assert verify.compare("w", values, values * float("nan")).largest_difference == float("inf")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"tables": {"overrides": {"cat_3": {"representation": "int8"}}}}, r"not dense fp32: int8 \(cat_3\)"),
        (
            {"tables": {"representation": "tt", "tt_ranks": [2]}},
            r"tt \(cat_0\), tt \(cat_1\), tt \(cat_10\) and 23 more",
        ),
        ({"tables": {"rules": [{"min_rows": 100, "representation": "mixed"}]}}, r"not dense fp32: mixed \(cat_"),
        ({"tables": {"quantize_linears": 8}}, "layers on 8 bits"),
        (
            {"train__mode": "fae", "train__faithful": True, "train__chunk_batches": 16},
            r"the published order of `train\.faithful`",
        ),
    ],
)
def test_what_has_no_plain_counterpart_is_refused_by_name(tiny_runs: Path, overrides: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected) as caught:
        certify(tiny_runs, **overrides)
    assert "--set 'tables={}'" in str(caught.value.hint)
