"""Trainings of the tiny pipeline, and what became of them."""

from __future__ import annotations

import atexit
import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from strategies import tiny_config
from torch import Tensor

from slipstream.config import PipelineConfig
from slipstream.io.artifacts import Artifact
from slipstream.pipeline import RunResult, run_pipeline
from slipstream.stages import evaluate

HELD: dict[str, dict[str, Any]] = {
    "dense": {},
    "int8": {"representation": "int8", "period": 7},
    "int4": {"representation": "int4", "period": 7},
    "by rank": {"representation": "mixed", "mixed_budget": "6%", "period": 7},
    "tt": {"rules": [{"min_rows": 100, "representation": "tt", "tt_ranks": [2]}]},
    "mixed": {
        "representation": "int4",
        "period": 7,
        "quantize_linears": 8,
        "quantize_biases": True,
        "rules": [
            {"min_rows": 2, "representation": "int8"},
            {"min_rows": 300, "representation": "tt", "tt_ranks": [3]},
        ],
        "overrides": {
            "cat_1": {"representation": "dense"},
            "cat_2": {"representation": "int4", "period": 3},
            "cat_3": {"representation": "int2"},
            "cat_4": {"representation": "int4", "scale_per": "row"},
        },
    },
}
"""Ways to hold tables: sections `[tables]` by a short name."""


@cache
def _shared_runs() -> Path:
    folder = TemporaryDirectory(prefix="prepared-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def run_on_copies(config: PipelineConfig, runs: Path, **options: Any) -> RunResult:
    """Run a pipeline in a folder of its own: what comes before training is made once for all tests, and copied."""
    if not (runs / config.name).exists():
        made = run_pipeline(config, _shared_runs(), stages=["preprocess", "profile", "segregate"])
        for path in (stage.artifact.path for stage in made.stages.values()):
            shutil.copytree(path, runs / path.relative_to(_shared_runs()))
    return run_pipeline(config, runs, **options)


def train(runs: Path, **overrides: Any) -> RunResult:
    """Run the tiny pipeline; what is there already is not run again."""
    return run_on_copies(tiny_config(**{"train__log_every": 10, **overrides}), runs)


def artifact_of(result: RunResult) -> Artifact:
    return result.stages["train"].artifact


def losses_of(result: RunResult) -> list[float]:
    losses: list[float] = json.loads((artifact_of(result).path / "losses.json").read_text())
    return losses


def model_of(result: RunResult) -> dict[str, Tensor]:
    return load_file(artifact_of(result).path / "model.safetensors")


def predictions_of(result: RunResult, split: str) -> np.ndarray:
    return np.load(artifact_of(result).path / f"predictions_{split}.npy", allow_pickle=False)


def predictions_from_disk(folder: Path, result: RunResult, split: str) -> np.ndarray:
    """What a model's folder predicts of a split, from its files alone."""
    return evaluate.run(folder, segregated=result.stages["segregate"].artifact, split=split)[0]


def assert_same_model(first: RunResult, second: RunResult) -> None:
    """To the bit: tensors and predictions."""
    for split in ("val", "test"):
        assert np.array_equal(predictions_of(first, split), predictions_of(second, split))
    ours, theirs = model_of(first), model_of(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_training(first: RunResult, second: RunResult) -> None:
    """To the bit: the model, and every loss on the way."""
    assert_same_model(first, second)
    assert losses_of(first) == losses_of(second)
