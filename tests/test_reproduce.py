"""Artifacts made again from their manifests: the same to the byte, or what differs and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from raw_logs import make_lines, write_pipeline, write_raw
from strategies import tiny_config

from slipstream.config import load_pipeline
from slipstream.errors import ArtifactError
from slipstream.pipeline import run_pipeline
from slipstream.reproduce import reproduce_artifact, require_equal

STAGES = ["generate", "preprocess", "profile", "segregate", "train"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of a run whose settings are none of the defaults, by stage."""
    config = tiny_config(
        seed=5,
        train__seed=7,
        train__optimizer="adam",
        train__lr=0.003,
        preprocess__split="random",
        profile__sample_ratio=0.5,
        segregate__hot_budget="12KiB",
        segregate__policy="sample-aware",
        tables__rules=[{"min_rows": 100, "representation": "int8"}],
    )
    result = run_pipeline(config, tmp_path_factory.mktemp("made"))
    return {name: stage.artifact.path for name, stage in result.stages.items()}


def change(path: Path, **entries: Any) -> None:
    """Rewrite entries of a manifest; None removes one."""
    manifest = json.loads((path / "manifest.json").read_text())
    kept = {name: value for name, value in {**manifest, **entries}.items() if value is not None}
    (path / "manifest.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_comes_out_the_same_to_the_byte(made: dict[str, Path], stage: str, tmp_path: Path):
    again = reproduce_artifact(made[stage], work=tmp_path)
    assert again.is_equal, again.files
    require_equal(again)
    assert {file.verdict for file in again.files} == {"equal"}
    assert all(len(file.sha256) == 64 and file.sha256 == file.sha256_again for file in again.files)
    assert (again.reason, again.environment) == ("", {})
    assert all(name.startswith("events/") for name in again.left_out)
    (remade,) = tmp_path.glob(f"tiny_test/{stage}/*/manifest.json")
    assert remade.parent.name == made[stage].name, "from the same settings"


def test_a_log_of_ones_own_is_asked_for_and_compared(tmp_path: Path):
    raw = write_raw(tmp_path / "log", make_lines(300))
    other = write_raw(tmp_path / "other", make_lines(301))
    result = run_pipeline(load_pipeline(write_pipeline(tmp_path / "own.toml", raw)), tmp_path, stages=["preprocess"])
    path = result.stages["preprocess"].artifact.path
    with pytest.raises(ArtifactError, match=rf"does not say where they are: {raw.name}") as caught:
        reproduce_artifact(path)
    assert "--raw FILES" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match=r"expected the raw files that .* found others"):
        reproduce_artifact(path, raw=[str(other)])
    assert reproduce_artifact(path, raw=[str(raw)]).is_equal


def test_what_comes_out_otherwise_is_named_with_the_likely_reason(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = shutil.copytree(made["train"].parents[1], tmp_path / "tiny_test")
    train = runs / "train" / made["train"].name
    monkeypatch.setattr("slipstream.wiring.learning_rate", lambda done, lr, warmup, decay: lr / 2)
    again = reproduce_artifact(train)
    differing = {file.name for file in again.files if file.verdict == "differs"}
    assert {"model.safetensors", "predictions_test.npy", "losses.json"} <= differing
    assert "model.json" not in differing
    assert "test.auc" in {figure.name for figure in again.figures}
    assert not any("second" in figure.name for figure in again.figures)
    assert again.reason.startswith("nothing that is recorded is otherwise here")
    with pytest.raises(ArtifactError, match=r"came out otherwise .*: `losses\.json`, `model\.safetensors`") as caught:
        require_equal(again)
    assert "most likely nothing that is recorded" in str(caught.value.hint)

    environment = json.loads((train / "manifest.json").read_text())["environment"]
    change(train, environment=environment | {"torch": "1.0", "cores": "64", "processor": "abacus"})
    again = reproduce_artifact(train)
    assert "other versions (torch 1.0 -> " in again.reason
    assert "another number of threads" in again.reason and "cores 64 -> " in again.reason
    assert "other hardware" in again.reason and "abacus -> " in again.reason

    change(train, environment=None)
    assert "older form" in reproduce_artifact(train).reason


def test_a_missing_input_is_named_with_what_makes_it(made: dict[str, Path], tmp_path: Path):
    runs = shutil.copytree(made["train"].parents[1], tmp_path / "tiny_test")
    shutil.rmtree(runs / "profile")
    expected = rf"expected `.*profile/{made['profile'].name}`, which `.*` was made from; it is missing"
    with pytest.raises(ArtifactError, match=expected) as caught:
        reproduce_artifact(runs / "train" / made["train"].name)
    assert "slipstream segregate" in str(caught.value.hint)


@pytest.mark.parametrize("stage", ["profile", "preprocess"])
def test_nothing_altered_is_compared_or_read(made: dict[str, Path], tmp_path: Path, stage: str):
    runs = shutil.copytree(made["train"].parents[1], tmp_path / "tiny_test")
    file = next((runs / stage).rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match="altered or removed after"):
        reproduce_artifact(runs / "profile" / made["profile"].name)


def test_settings_that_came_since_have_their_defaults_and_lost_ones_are_named(made: dict[str, Path], tmp_path: Path):
    runs = shutil.copytree(made["train"].parents[1], tmp_path / "tiny_test")
    profile = runs / "profile" / made["profile"].name
    config = json.loads((profile / "manifest.json").read_text())["config"]
    change(profile, config={name: value for name, value in config.items() if name != "sample_aware_rounds"})
    assert reproduce_artifact(profile).is_equal
    change(profile, config=config | {"resolution": 3}, slipstream="0.0.7")
    with pytest.raises(ArtifactError, match="no `resolution` like that") as caught:
        reproduce_artifact(profile)
    assert "made by slipstream 0.0.7: install that version" in str(caught.value.hint)
