from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
from raw_logs import make_lines, write_raw
from strategies import tiny_config

from slipstream import pipeline
from slipstream.config import PipelineConfig
from slipstream.dataset_schema import DatasetConfig
from slipstream.errors import ArtifactError, DataError
from slipstream.io import raw
from slipstream.io.artifacts import find_place, leftovers, parsed_folders, scratch_dir
from slipstream.io.figures import Figures
from slipstream.io.locks import InUseError, hold_artifact
from slipstream.pipeline import Run, clean_run, latest_artifact, plan_pipeline, run_pipeline, stage_names
from slipstream.stage import Stage, StageJob
from slipstream.stage_list import STAGES

ALL = ["generate", "preprocess", "profile", "segregate", "train"]


def to_run(config: PipelineConfig, runs: Path) -> dict[str, str]:
    """Stages that would run, with the reason."""
    return {plan.stage: plan.reason for plan in plan_pipeline(config, runs) if plan.will_run}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    run_pipeline(tiny_config(), folder)
    return folder


def test_a_first_run_runs_everything_and_a_second_nothing(runs: Path):
    again = run_pipeline(tiny_config(), runs)
    assert [(stage.status, stage.reason) for stage in again.stages.values()] == [
        ("skipped", "up to date: same config, inputs and seed")
    ] * 5
    assert list(again.stages) == ALL == stage_names(tiny_config())
    assert to_run(tiny_config(), runs) == {}


@pytest.mark.parametrize(
    ("changed", "first", "reason"),
    [
        ({"dataset__num_samples": 2500}, "generate", "config changed: num_samples 2400 -> 2500"),
        ({"seed": 1}, "generate", "seed changed: 0 -> 1"),
        ({"preprocess__freq_threshold": 3}, "preprocess", "config changed: freq_threshold 2 -> 3"),
        ({"profile__curve": [0.1]}, "profile", "config changed: curve"),
        ({"segregate__hot_budget": "30%"}, "segregate", "config changed: hot_budget 20% -> 30%"),
        ({"model__top_mlp": [4, 1]}, "train", "config changed: model.top_mlp [8, 1] -> [4, 1]"),
        ({"train__lr": 0.5}, "train", "config changed: train.lr 0.02 -> 0.5"),
        ({"skip__target_drop": 0.1}, "train", "config changed: skip.target_drop 0.3 -> 0.1"),
    ],
)
def test_a_changed_key_runs_its_stage_and_those_after_it(runs: Path, changed: dict[str, Any], first: str, reason: str):
    would = to_run(tiny_config(**changed), runs)
    assert list(would) == ALL[ALL.index(first) :]
    assert would[first].startswith(reason)
    for later in list(would)[1:]:
        assert would[later].startswith(("inputs changed: ", "seed changed", "config changed"))


@pytest.mark.parametrize(
    "changed", [{"preprocess__num_threads": 3}, {"preprocess__chunk_bytes": 4096}, {"train__num_threads": 1}]
)
def test_how_fast_a_stage_works_makes_nothing_run_again(runs: Path, changed: dict[str, Any]):
    assert to_run(tiny_config(**changed), runs) == {}


def test_a_plan_writes_nothing(tmp_path: Path):
    assert to_run(tiny_config(), tmp_path / "runs") == dict.fromkeys(ALL, "no output yet")
    assert list(tmp_path.iterdir()) == []


def test_going_back_to_an_earlier_config_finds_its_artifacts(runs: Path):
    changed = tiny_config(segregate__hot_budget="25%")
    result = run_pipeline(changed, runs)
    assert [stage.stage for stage in result.stages.values() if stage.status == "ran"] == ["segregate", "train"]
    assert to_run(changed, runs) == to_run(tiny_config(), runs) == {}
    latest = latest_artifact(runs / "tiny_test", "segregate")
    assert latest is not None and latest.path == result.stages["segregate"].artifact.path


def test_force_runs_what_is_up_to_date(runs: Path):
    config = tiny_config()
    before = {plan.stage: plan.key.fingerprint for plan in plan_pipeline(config, runs)}
    everything = run_pipeline(config, runs, force=True)
    assert [(stage.status, stage.reason) for stage in everything.stages.values()] == [("ran", "forced")] * 5
    assert {name: stage.artifact.fingerprint for name, stage in everything.stages.items()} == before
    one = run_pipeline(config, runs, stages=["segregate"], force=True)
    assert {name for name, stage in one.stages.items() if stage.status == "ran"} == {"segregate"}


def test_forced_stages_write_the_same_bytes(runs: Path):
    config = tiny_config()

    def outputs() -> dict[str, Any]:
        stages = run_pipeline(config, runs).stages
        kept = {name: dict(stage.artifact.manifest["outputs"]) for name, stage in stages.items()}
        # TensorBoard events bear the time
        kept["train"] = {name: body for name, body in kept["train"].items() if not name.startswith("events/")}
        return kept

    before = outputs()
    run_pipeline(config, runs, force=True)
    assert outputs() == before


def test_three_commands_are_a_whole_run(tmp_path: Path):
    config = tiny_config()
    told: list[str] = []
    for stage in ("preprocess", "segregate", "train"):
        run_pipeline(config, tmp_path, stages=[stage], on_stage=lambda done: told.append(f"{done.stage} {done.status}"))
    ran = [line for line in told if line.endswith("ran")]
    assert ran == ["generate ran", "preprocess ran", "profile ran", "segregate ran", "train ran"]
    assert to_run(config, tmp_path) == {}


@pytest.mark.parametrize(
    ("done", "stage", "named"),
    [([], "train", "preprocess"), ([], "segregate", "preprocess"), (["preprocess"], "train", "segregate")],
)
def test_a_stage_without_its_inputs_names_the_one_to_run(tmp_path: Path, done: list[str], stage: str, named: str):
    for earlier in done:
        run_pipeline(tiny_config(), tmp_path, stages=[earlier])
    with pytest.raises(ArtifactError, match="has no output for this pipeline yet") as caught:
        run_pipeline(tiny_config(), tmp_path, stages=[stage])
    assert f"run `slipstream {named}` first" in str(caught.value.hint)


def test_a_stage_that_fails_publishes_nothing_and_frees_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from slipstream.stages import segregate

    with monkeypatch.context() as patched:
        patched.setattr(segregate, "_write_hot_set", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            run_pipeline(tiny_config(), tmp_path)
    assert list(to_run(tiny_config(), tmp_path)) == ["segregate", "train"]
    assert to_run(tiny_config(), tmp_path)["segregate"] == "interrupted before; finished parts are kept"
    run_pipeline(tiny_config(), tmp_path)
    assert leftovers(tmp_path / "tiny_test") == []


def test_raw_files_are_hashed_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [write_raw(tmp_path / f"day_{day}.tsv", make_lines(600, seed=day)) for day in (0, 1)]
    hashed: list[str] = []
    fingerprint = raw.fingerprint_raw

    def counting(path: str, **options: Any) -> str:
        hashed.append(path)
        return fingerprint(path, **options)

    monkeypatch.setattr(raw, "fingerprint_raw", counting)
    config = tiny_config(dataset={"source": "criteo", "raw": [str(file) for file in files]})
    for _ in ("first", "again"):
        run_pipeline(config, tmp_path / "runs")
        assert hashed == [str(file) for file in files]
        hashed.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class TallyFigures(Figures):
    stage: ClassVar[str] = "tally"
    seed: int


def test_a_stage_is_a_module_and_an_entry_of_the_list(runs: Path, monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("slipstream.stages.tally")

    def run_stage(job: StageJob) -> TallyFigures:
        (job.scratch / "tally.txt").write_text("x" * job.inputs["profile"].counts["rows"])
        return TallyFigures(seed=job.config.seed)

    module.run_stage = run_stage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slipstream.stages.tally", module)
    entry = Stage(name="tally", after=("profile",), comes_with="train", settings=lambda config: {"letter": "x"})
    monkeypatch.setattr(pipeline, "STAGES", (*STAGES[:-1], entry, STAGES[-1]))

    assert to_run(tiny_config(), runs) == {"tally": "no output yet"}
    result = run_pipeline(tiny_config(), runs, stages=["train"])
    tally = result.stages["tally"]
    assert (tally.status, result.figures(TallyFigures)) == ("ran", TallyFigures(seed=0))
    assert tally.artifact.files()[0].read_text() == "x" * result.counts("profile")["rows"]
    assert to_run(tiny_config(), runs) == {}
    assert list(to_run(tiny_config(profile__curve=[0.1]), runs)) == ["profile", "segregate", "tally", "train"]


def test_clean_removes_leftovers_and_keeps_artifacts(runs: Path):
    run_dir = runs / "tiny_test"
    key = plan_pipeline(tiny_config(seed=77), runs)[0].key
    left = scratch_dir(run_dir, key)
    (left / "half").write_text("x")
    parsed = parsed_folders(run_dir)
    assert len(parsed) == 1 and clean_run(runs, "tiny_test") == [left, *parsed]
    assert not left.exists() and not parsed_folders(run_dir)
    assert to_run(tiny_config(), runs) == {}


def test_raw_files_are_known_by_content_not_by_name_or_time(tmp_path: Path, runs: Path):
    generated = latest_artifact(runs / "tiny_test", "generate")
    assert generated is not None
    raw = tmp_path / "log.tsv"
    raw.write_bytes(generated.files(suffix=".tsv")[0].read_bytes())

    def fingerprint(path: Path) -> str:
        config = tiny_config(dataset__source="criteo", dataset__raw=str(path))
        return plan_pipeline(config, tmp_path)[0].key.fingerprint

    first = fingerprint(raw)
    os.utime(raw, (1, 1))
    moved = raw.rename(tmp_path / "moved.tsv")
    assert fingerprint(moved) == first
    with moved.open("ab") as stream:
        stream.write(b"\n")
    assert fingerprint(moved) != first


def test_the_same_file_read_as_another_source_is_another_input(tmp_path: Path):
    raw = tmp_path / "log"
    raw.write_text("0\n")
    sources = [name for name in get_args(get_type_hints(DatasetConfig)["source"]) if name != "synthetic"]
    configs = [tiny_config(dataset__source=name, dataset__raw=str(raw)) for name in sources]
    assert len({plan_pipeline(config, tmp_path)[0].key.fingerprint for config in configs}) == len(sources)


def test_a_missing_raw_file_is_named_before_anything_runs(tmp_path: Path):
    config = tiny_config(dataset__source="criteo", dataset__raw="/no/such/file.tsv")
    with pytest.raises(DataError, match=r"/no/such/file\.tsv"):
        run_pipeline(config, tmp_path)


# --- two at work ---------------------------------------------------------------------------------------------


def test_two_budgets_of_one_run_folder_can_be_worked_on_at_the_same_time(runs: Path):
    one, other = tiny_config(segregate__hot_budget="41%"), tiny_config(segregate__hot_budget="42%")
    with hold_artifact(find_place(runs / "tiny_test", Run(one, runs).keys["segregate"])):
        assert run_pipeline(other, runs).stages["train"].status == "ran"
        with pytest.raises(InUseError, match=f"segregate/.* is in use by process {os.getpid()}"):
            run_pipeline(one, runs)
    assert run_pipeline(one, runs).stages["train"].status == "ran"


def test_nobody_removes_what_another_reads(runs: Path):
    config = tiny_config()
    with hold_artifact(find_place(runs / "tiny_test", Run(config, runs).keys["preprocess"]), shared=True):
        with pytest.raises(InUseError, match="preprocess/"):
            run_pipeline(config, runs, stages=["preprocess"], force=True)
        run_pipeline(config, runs)


def test_clean_leaves_what_somebody_works_in(runs: Path):
    key = Run(tiny_config(segregate__hot_budget="43%"), runs).keys["segregate"]
    scratch = scratch_dir(runs / "tiny_test", key)
    with hold_artifact(find_place(runs / "tiny_test", key)):
        assert clean_run(runs, "tiny_test") == []
        assert scratch.exists()
    assert scratch in clean_run(runs, "tiny_test")
