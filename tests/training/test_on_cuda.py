"""Whole trainings on CUDA against the CPU: every mode, criterion, optimizer and representation, stopped and gone on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from safetensors.torch import load_file
from strategies import tiny_config
from trained import run_on_copies

from slipstream.errors import CapacityError
from slipstream.training.checkpoint import Checkpointer

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
    "importance": {"train__mode": "slipstream", "skip__criterion": "importance", "skip__scope": "all"},
    "importance by the model": {
        "train__mode": "slipstream",
        "train__cold_access": "in_place",
        "skip__criterion": "importance",
        "skip__scorer": "model",
    },
    "faithful": {"train__mode": "slipstream", "train__faithful": True, "train__chunk_batches": 16},
    "deterministic": {"train__mode": "fae", "train__cold_access": "in_place", "train__deterministic": True},
    "on disk": {"train__mode": "fae", "train__average": 0.4, "train__cold_path": tempfile.gettempdir()},
    "averaged": {"train__mode": "fae", "train__cold_access": "in_place", "train__average": 0.4},
    "cores": {
        "train__mode": "fae",
        "tables": {"representation": "int4", "rules": [{"min_rows": 300, "representation": "tt"}]},
    },
}
SMALL: dict[str, Any] = {"dataset": {"source": "synthetic", "num_samples": 1400}, "train__precision": "fp32"}


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
        run = run_on_copies(tiny_config(**{**SMALL, **RUNS[name], "train__device": device}), tmp_path)
        assert run.counts("train")["device"] == device
        models.append(load_file(run.stages["train"].artifact.path / "model.safetensors"))
    assert cuda.type == "cuda"
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_fewer_digits_on_cuda_end_near_the_model_of_the_cpu(precision: str, real_cuda: torch.device, tmp_path: Path):
    models = []
    for options in ({"train__device": "cpu"}, {"train__device": real_cuda.type, "train__precision": precision}):
        run = run_on_copies(tiny_config(**{**SMALL, "train__mode": "fae", **options}), tmp_path)
        models.append(load_file(run.stages["train"].artifact.path / "model.safetensors"))
    torch.testing.assert_close(models[1], models[0], rtol=5e-2, atol=2e-2)


class Killed(BaseException):
    """Stands in for kill -9."""


@pytest.mark.parametrize("cold_access", ["in_place", pytest.param("look_ahead", marks=pytest.mark.slow)])
def test_a_training_on_cuda_goes_on_where_it_was_killed(
    cold_access: str, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {"train__mode": "fae", "train__checkpoint_steps": 5, "train__cold_access": cold_access}
    config = tiny_config(**{**SMALL, **asked, "train__device": cuda.type})
    whole = run_on_copies(config, tmp_path / "whole")
    save, num_saves = Checkpointer._save, 0

    def save_twice_and_die(self: Checkpointer, trainer: Any) -> None:
        nonlocal num_saves
        save(self, trainer)
        self.wait(trainer)
        num_saves += 1
        if num_saves == 2:
            raise Killed

    monkeypatch.setattr(Checkpointer, "_save", save_twice_and_die)
    with pytest.raises(Killed):
        run_on_copies(config, tmp_path / "cut")
    resumed = run_on_copies(config, tmp_path / "cut")
    assert num_saves > 2
    models = [load_file(run.stages["train"].artifact.path / "model.safetensors") for run in (whole, resumed)]
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)


def refuse_for_room(runs: Path, **train: Any) -> None:
    config = tiny_config(**{**SMALL, "train__device": "cuda", **train})
    with pytest.raises(CapacityError, match="the device has no room for") as failed:
        run_on_copies(config, runs)
    assert "train.batch_size" in (failed.value.hint or "")


@pytest.mark.parametrize("cold_access", ["in_place", "look_ahead"])
@pytest.mark.parametrize("limit_bytes", [2_000, 600_000])
def test_a_device_without_room_is_said_with_what_to_lower(
    limit_bytes: int, cold_access: str, fake_cuda: FakeCuda, tmp_path: Path
):
    fake_cuda.limit_bytes = limit_bytes
    refuse_for_room(tmp_path, train__mode="fae", train__cold_access=cold_access)


def test_a_batch_that_no_device_has_room_for_is_said_with_what_to_lower(real_cuda: torch.device, tmp_path: Path):
    assert torch.zeros(1, device=real_cuda).is_cuda
    refuse_for_room(tmp_path, train__batch_size=1_000_000_000)
