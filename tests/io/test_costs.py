from __future__ import annotations

from pathlib import Path

import pytest
from strategies import tiny_config

from slipstream.errors import CapacityError
from slipstream.forecast import forecast_run
from slipstream.io import capacity
from slipstream.io.costs import COSTS, forecast_stage
from slipstream.pipeline import plan_pipeline, run_pipeline


def forecast(stage: str, **changed: int | bool | None):
    options = {"num_samples": 10_000_000, "row_bytes": 68, "epochs": 1, "num_rows": 1_000_000} | changed
    return forecast_stage(stage, **options)  # type: ignore[arg-type]


def test_time_and_disk_grow_with_samples_and_training_with_epochs():
    for stage, cost in COSTS.items():
        assert forecast(stage).seconds == pytest.approx(10 * cost.seconds)
        if stage != "train":
            assert forecast(stage).disk_bytes == pytest.approx(10 * cost.disk_bytes)
    assert forecast("train", epochs=3).seconds == 3 * forecast("train").seconds


def test_training_takes_a_model_and_two_checkpoints_of_disk_and_the_tables_in_memory():
    assert forecast("train").disk_bytes == 3 * 68 * 1_000_000
    more = forecast("train", num_rows=101_000_000).memory_bytes - forecast("train").memory_bytes
    assert more == pytest.approx(68 * 100_000_000, rel=0.1)
    assert forecast("train", num_samples=10**9).memory_bytes == forecast("train", num_samples=10**8).memory_bytes


def test_rows_in_a_file_are_disk_and_no_memory():
    in_memory, in_file = forecast("train"), forecast("train", rows_on_disk=True)
    assert in_file.disk_bytes - in_memory.disk_bytes == in_memory.memory_bytes - in_file.memory_bytes == 68 * 1_000_000


def test_a_plan_sums_up_what_would_run(tmp_path: Path):
    config = tiny_config()
    ahead = forecast_run(config, plan_pipeline(config, tmp_path))
    assert [one.stage for one in ahead] == list(COSTS)
    run_pipeline(config, tmp_path, stages=["preprocess"])
    assert [one.stage for one in forecast_run(config, plan_pipeline(config, tmp_path))] == list(COSTS)[2:]


def test_a_stage_that_nobody_measured_has_no_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plans = plan_pipeline(tiny_config(), tmp_path)
    monkeypatch.delitem(COSTS, "profile")
    assert [one.stage for one in forecast_run(tiny_config(), plans)] == ["generate", "preprocess", "segregate", "train"]


@pytest.mark.parametrize(
    ("stages", "stage", "what"),
    [
        (["preprocess"], "generate", "disk"),
        (None, "train, its model and two checkpoints,", "disk"),
        (None, "train", "memory"),
        (None, "the cold tier of `train.cold_path`, with what train writes to the same disk,", "disk"),
    ],
)
def test_a_stage_without_room_is_refused_before_it_begins(
    stages: list[str] | None,
    stage: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr("slipstream.stages.train.is_in_memory", lambda folder: True)
    config = tiny_config(**({"train__cold_path": str(tmp_path / "disk")} if "cold_path" in stage else {}))
    if stages is None:
        run_pipeline(tiny_config(), tmp_path, stages=["preprocess", "segregate"])
    if what == "disk":
        monkeypatch.setattr(capacity.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    else:
        monkeypatch.setattr(capacity, "available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match=f"^{stage} needs about .* of {what}.* 1,?000 bytes are") as caught:
        run_pipeline(config, tmp_path, stages=stages)
    assert caught.value.hint
    assert ("is on tmpfs, which is memory" in caplog.text) == bool(config.train.cold_path)
    named = "train" if "train" in stage else stage
    assert not list((tmp_path / "tiny_test" / named).glob("[0-9a-f]*"))


def test_a_folder_that_is_memory_is_known():
    assert capacity.is_in_memory(Path("/dev/shm/not/there"))
    assert not capacity.is_in_memory(Path("/proc"))
