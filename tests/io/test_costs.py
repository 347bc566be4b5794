from __future__ import annotations

import re
from pathlib import Path
from shutil import copytree

import pytest
from strategies import tiny_config
from trained import run_on_copies

from slipstream.errors import CapacityError
from slipstream.forecast import forecast_run
from slipstream.io import capacity
from slipstream.io.artifacts import open_artifact
from slipstream.io.costs import COSTS, forecast_stage
from slipstream.io.counts import read_counts
from slipstream.pipeline import export_model, export_samples, plan_pipeline, run_pipeline, score_lines
from slipstream.progress import Silent
from slipstream.serving import score_file
from slipstream.serving.model import ServedModel
from slipstream.stage import row_bytes_of
from slipstream.stages import export, score, segregate

ORDER = tuple(COSTS)


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
    more = forecast("train", num_rows=201_000_000).memory_bytes - forecast("train", num_rows=101_000_000).memory_bytes
    assert more == pytest.approx(68 * 100_000_000)
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


def test_readme_shows_what_a_plan_reckons_with():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\w+)[^|]*\| (\d+) s \| ([^|]*) \|[^|]*\| ([\d.]+) GB \|$", readme, re.M)
    assert [stage for stage, *_ in shown] == [stage for stage in ORDER if stage != "generate"]
    for stage, seconds, disk, memory in shown:
        cost = COSTS[stage]
        assert (float(seconds), float(memory)) == (cost.seconds, cost.memory_bytes / 1e9)
        assert disk == "–" or disk == f"{cost.disk_bytes / 1e9:g} GB"


def test_more_rows_than_measured_take_more_memory():
    for stage in ("preprocess", "profile", "segregate"):
        cost = COSTS[stage]
        assert forecast(stage, num_rows=1000).memory_bytes == cost.memory_bytes
        more = forecast(stage, num_rows=101_000_000).memory_bytes - forecast(stage).memory_bytes
        assert more == pytest.approx(100_000_000 * cost.memory_bytes_per_row)


# --- refused before it begins --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs that has a trained `tiny_test`."""
    runs = tmp_path_factory.mktemp("runs")
    run_on_copies(tiny_config(), runs)
    return runs


def run_out_of(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "disk":
        monkeypatch.setattr(capacity.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    else:
        monkeypatch.setattr(capacity, "available_memory", lambda: 1000)


@pytest.mark.parametrize("what", ["disk", "memory"])
@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_without_room_is_refused_before_it_begins(
    stage: str, what: str, trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for there in ORDER[: ORDER.index(stage)]:
        copytree(trained_runs / "tiny_test" / there, tmp_path / "tiny_test" / there)
    run_out_of(what, monkeypatch)
    with pytest.raises(CapacityError, match=rf"^{stage}\b.* needs about .* of {what}.* 1,?000 bytes are") as caught:
        run_pipeline(tiny_config(), tmp_path)
    assert caught.value.hint
    folder = tmp_path / "tiny_test" / stage
    assert not list(folder.glob("[0-9a-f]*"))
    assert not [
        file for file in folder.rglob("*") if file.is_file() and file.name.startswith(("part", "curve", "click"))
    ]


def test_a_cold_tier_without_room_on_its_disk_is_refused(
    trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for there in ORDER[:-1]:
        copytree(trained_runs / "tiny_test" / there, tmp_path / "tiny_test" / there)
    run_out_of("disk", monkeypatch)
    monkeypatch.setattr("slipstream.stages.train.is_in_memory", lambda folder: True)
    said = "^the cold tier of `train.cold_path`, with what train writes to the same disk, needs about .* of disk"
    with pytest.raises(CapacityError, match=said):
        run_pipeline(tiny_config(train__cold_path=str(tmp_path / "disk")), tmp_path)
    assert "is on tmpfs, which is memory" in caplog.text


@pytest.mark.parametrize("export_format", export.FORMATS)
@pytest.mark.parametrize("what", ["disk", "memory"])
def test_an_export_without_room_is_refused_before_it_begins(
    export_format: str, what: str, trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_out_of(what, monkeypatch)
    out = tmp_path / "not there yet" / "out"
    with pytest.raises(CapacityError, match=f"^export to {export_format} needs about .* of {what}"):
        export_samples(tiny_config(), trained_runs, export_format=export_format, out_dir=out)
    assert not list(out.iterdir())


def test_a_model_without_room_is_neither_exported_nor_loaded_nor_scores(
    trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (model,) = (trained_runs / "tiny_test" / "train").glob("[0-9a-f]*")
    (raw,) = (trained_runs / "tiny_test" / "generate").glob("*/clicks.tsv")
    with monkeypatch.context() as patch:
        run_out_of("memory", patch)
        with pytest.raises(CapacityError, match=r"^export of a model needs about .* of memory"):
            export_model(model, out=tmp_path / "out", representation="int8")
        with pytest.raises(CapacityError, match=f"^model `{model}` needs about .* of memory"):
            ServedModel(model)
    with monkeypatch.context() as patch:
        run_out_of("disk", patch)
        with pytest.raises(CapacityError, match=r"^export of a model needs about .* of disk"):
            export_model(model, out=tmp_path / "out", representation="int8")
        with pytest.raises(CapacityError, match=r"^score of about [\d,]+ lines needs about .* of disk"):
            score_lines([model], raw=[str(raw)], out=tmp_path / "scores.csv")
    assert not list(tmp_path.iterdir())


# --- what is asked for is enough, and not much more ------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of disk that were asked for."""
    found: list[int] = []

    def ask(folder: Path, needed_bytes: int, *, purpose: str, hint: str) -> None:
        found.append(needed_bytes)

    for module in (segregate, export, score):
        monkeypatch.setattr(module, "require_disk", ask)
    return found


@pytest.mark.parametrize("policy", ["frequency", "sample-aware"])
def test_segregate_asks_for_the_disk_that_it_takes(policy: str, trained_runs: Path, tmp_path: Path, asked: list[int]):
    config = tiny_config(segregate__policy=policy)
    (processed,) = (trained_runs / "tiny_test" / "preprocess").glob("[0-9a-f]*")
    (profiled,) = (trained_runs / "tiny_test" / "profile").glob("[0-9a-f]*")
    segregate.run(
        config.segregate,
        processed=open_artifact(processed),
        counts=read_counts(open_artifact(profiled)),
        row_bytes=row_bytes_of(config),
        scratch=tmp_path,
        progress=Silent(),
    )
    assert 0.7 * asked[0] < capacity.written_bytes(tmp_path) <= 1.1 * asked[0]


@pytest.mark.parametrize("export_format", export.FORMATS)
def test_an_export_asks_for_the_disk_that_it_takes(
    export_format: str, trained_runs: Path, tmp_path: Path, asked: list[int]
):
    export_samples(tiny_config(), trained_runs, export_format=export_format, out_dir=tmp_path)
    assert 0.3 * asked[0] < capacity.written_bytes(tmp_path) <= 1.1 * asked[0]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_score_asks_for_the_disk_that_it_takes(
    suffix: str, trained_runs: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
):
    (model,) = (trained_runs / "tiny_test" / "train").glob("[0-9a-f]*")
    (raw,) = (trained_runs / "tiny_test" / "generate").glob("*/clicks.tsv")
    monkeypatch.setattr(score_file.shutil, "rmtree", lambda folder: None)  # parts go when the file is there
    score_lines([model], raw=[str(raw)], out=tmp_path / f"scores{suffix}")
    assert 0.3 * asked[0] < capacity.written_bytes(tmp_path) <= 1.1 * asked[0]


def test_a_folder_that_is_memory_is_known():
    assert capacity.is_in_memory(Path("/dev/shm/not/there"))
    assert not capacity.is_in_memory(Path("/proc"))
