"""Whole trainings on CUDA against the CPU: every mode, criterion, optimizer and representation, stopped and gone on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from strategies import tiny_config
from trained import run_on_copies

RUNS: dict[str, dict[str, Any]] = {
    "resident": {"train__mode": "resident", "skip__criterion": "none"},
    "baseline": {"train__mode": "baseline", "train__optimizer": "sgd"},
    "in place": {"train__mode": "slipstream", "train__cold_access": "in_place", "skip__refresh_steps": 8},
    "in place, adam": {"train__mode": "baseline", "train__cold_access": "in_place", "train__optimizer": "adam"},
    "fae": {"train__mode": "fae", "tables": {"representation": "int8", "period": 7}},
    "stale": {"train__mode": "slipstream", "skip__refresh_steps": 8},
    "net": {"train__mode": "slipstream", "skip__movement": "net", "skip__refresh_steps": 8, "train__optimizer": "sgd"},
    "cached": {"train__mode": "cached", "train__cache_ratio": 0.5, "skip__criterion": "random"},
    "lfu": {"train__mode": "cached", "train__cache_ratio": 0.5, "train__cache_policy": "lfu"},
    "negative": {"train__mode": "slipstream", "skip__criterion": "negative", "skip__refresh_steps": 8},
    "cores": {
        "train__mode": "fae",
        "tables": {"representation": "int4", "rules": [{"min_rows": 300, "representation": "tt"}]},
    },
}
SMALL = {"dataset": {"source": "synthetic", "num_samples": 2000}}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("in place", "stale", "cached", "fae") else pytest.mark.slow)
        for name in RUNS
    ],
)
def test_a_training_on_cuda_ends_with_the_model_of_the_cpu(name: str, cuda: torch.device, tmp_path: Path):
    models = []
    for device in ("cpu", "cuda"):
        run = run_on_copies(tiny_config(train__device=device, **SMALL, **RUNS[name]), tmp_path)
        assert run.counts("train")["device"] == device
        models.append(load_file(run.stages["train"].artifact.path / "model.safetensors"))
    assert cuda.type == "cuda"
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)
