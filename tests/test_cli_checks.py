"""The commands that say what a run would take, and whether it can be trusted, as they are typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import tiny_tree, write_toml
from test_cli import call, call_json

from slipstream.embedding.tiers.transfer import RowMover


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A pipeline that ran once, and its folder of runs."""
    path = tmp_path_factory.mktemp("checks")
    pipeline = write_toml(path / "tiny.toml", tiny_tree())
    call("run", pipeline, "--runs", path / "runs", "--quiet")
    return [pipeline, "--runs", path / "runs"]


# --- size ----------------------------------------------------------------------------------------------------


def test_size_shows_what_is_asked_and_memory_by_part(arguments: list[object]):
    text = call("size", *arguments, "--hit-ratio", "50%,60%", "--budget", "10%").stdout
    for shown in ("50% of lookups", "60% of lookups", "budget 10%", "resident", "baseline", "sample-aware", "staging"):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 120
    document = call_json("size", *arguments, "--hit-ratio", "50%")
    assert [answer["policy"] for answer in document["answers"]] == ["frequency", "sample-aware", "", ""]
    assert document["answers"][0]["served"]["hit_ratio"] >= 0.5
    assert set(document["answers"][0]["device"]) >= {"hot rows", "optimizer state", "staging", "layers", "step"}


def test_size_without_a_profile_says_what_to_run(arguments: list[object], tmp_path: Path):
    error = call("size", arguments[0], "--runs", tmp_path, expect=1).stderr
    assert "expected a profile" in error and "--profile" in error
    asked = call("size", arguments[0], "--runs", tmp_path, "--profile", "--set", "dataset.num_samples=2000")
    assert "✓ profile" in asked.stderr and "budget 20%" in asked.stdout


def test_size_forecasts_samples_a_second_when_asked(arguments: list[object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slipstream.sizing.speed._SECONDS", 0.0)
    monkeypatch.setattr("slipstream.sizing.speed._ROUNDS", 1)
    assert "samples/s" not in call("size", *arguments).stdout
    text = call("size", *arguments, "--speed").stdout
    assert "samples/s as forecast for this machine (cpu, threads" in text


def test_size_names_the_option_that_is_wrong(arguments: list[object]):
    error = call("size", *arguments, "--hit-ratio", "95", expect=2).stderr
    assert "`--hit-ratio` must be a share such as 95% or 0.95, found '95'" in error


# --- verify --------------------------------------------------------------------------------------------------


def copy_of(arguments: list[object], folder: Path) -> list[object]:
    """The same pipeline and its runs in another folder."""
    *pipeline, runs = arguments
    return [*pipeline, shutil.copytree(Path(str(runs)), folder / "runs")]


def train_output(arguments: list[object]) -> Path:
    return Path(call_json("run", *arguments)["stages"]["train"]["output"])


def test_verify_puts_a_certificate_into_the_artifact_whose_manifest_stays_true(arguments: list[object]):
    done = call("verify", *arguments, "--steps", "20")
    assert "equal to the bit; promised: equal to the bit" in done.stdout
    folder = train_output(arguments)
    assert f"certificate written to {folder / 'certificate.json'}" in done.stderr
    assert "certificate.json" in json.loads((folder / "manifest.json").read_text())["outputs"]
    assert "train: unaltered" in call("check", *arguments, "--files").stderr
    assert {stage["status"] for stage in call_json("run", *arguments)["stages"].values()} == {"skipped"}
    document = call_json("verify", *arguments, "--steps", "21")
    assert (document["verdict"], document["largest_difference"], document["steps"]) == ("equal to the bit", 0, 21)
    assert json.loads((folder / "certificate.json").read_text()) == document, "the newer one stays"
    assert "train: unaltered" in call("check", *arguments, "--files").stderr


def test_the_report_shows_the_certificate(arguments: list[object], tmp_path: Path):
    call("verify", *arguments, "--steps", "20", "--quiet")
    call("report", *arguments, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Verified against a plain loop: equal to the bit." in page
    assert ">Certificate<" in page


def test_verify_fails_where_the_tier_is_broken_and_says_where(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = copy_of(arguments, tmp_path)
    write_back = RowMover.write_back

    def lose_one(self: RowMover, cold: np.ndarray, positions: np.ndarray) -> None:
        write_back(self, cold[1:], positions[1:])

    monkeypatch.setattr(RowMover, "write_back", lose_one)
    failed = call("verify", *tree, "--steps", "20", expect=1)
    assert "the model trained as configured is not that of a plain loop: `tables.cat_" in failed.stderr
    assert "what differs, the largest first" in failed.stdout
    certificate: dict[str, Any] = json.loads((train_output(tree) / "certificate.json").read_text())
    assert certificate["verdict"] == "different" and certificate["largest_difference"] > 0
    assert call("verify", *tree, "--steps", "20", "--quiet", expect=1).stdout == ""


def test_verify_needs_a_trained_model_that_nobody_altered(arguments: list[object], tmp_path: Path):
    error = call("verify", arguments[0], "--runs", tmp_path / "nothing", expect=1).stderr
    assert "stage `train` has no output" in error and "hint: run `slipstream run` first" in error
    tree = copy_of(arguments, tmp_path)
    losses = train_output(tree) / "losses.json"
    losses.write_text(losses.read_text().replace("0.", "1.", 1))
    before = (losses.parent / "manifest.json").read_text()
    assert "`losses.json`" in call("verify", *tree, "--steps", "2", expect=1).stderr
    assert (losses.parent / "manifest.json").read_text() == before


# --- reproduce -----------------------------------------------------------------------------------------------


def test_reproduce_shows_what_came_out_the_same(arguments: list[object], tmp_path: Path):
    call("verify", *arguments, "--steps", "2", "--quiet")
    folder = train_output(arguments)
    shown = " ".join(call("reproduce", folder, "--work", tmp_path).stdout.split())
    assert "equal, by sha256" in shown and "differs" not in shown
    assert "certificate.json, events/" in shown and "not compared" in shown
    assert list(tmp_path.glob(f"tiny_test/train/{folder.name}/model.safetensors"))
    document = call_json("reproduce", folder)
    assert document["equal"] and document["stage"] == "train"
    assert {file["verdict"] for file in document["files"]} == {"equal"}


def test_reproduce_fails_where_something_differs(arguments: list[object], monkeypatch: pytest.MonkeyPatch):
    folder = train_output(arguments)
    monkeypatch.setattr("slipstream.wiring.learning_rate", lambda done, lr, warmup, decay: lr / 2)
    failed = call("reproduce", folder, expect=1)
    assert "came out otherwise when it was made again" in failed.stderr
    assert "hint: most likely nothing that is recorded is otherwise here" in failed.stderr
    assert "what differs" in failed.stdout and "model.safetensors" in failed.stdout
    assert call("reproduce", folder, "--quiet", expect=1).stdout == ""
