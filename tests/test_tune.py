"""A search over keys: what it reads, tries, resumes, stops early and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from strategies import tiny_tree, write_toml
from typer.testing import CliRunner

from slipstream.cli import app
from slipstream.config import load_pipeline
from slipstream.errors import ConfigError
from slipstream.pipeline import run_pipeline
from slipstream.progress import Silent
from slipstream.tune import Range, Tuned, _Pruner, parse_range, run_tuning

RATES = "train.lr=.001:.2:log"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "small.toml", tiny_tree())


def search(pipeline: Path, runs: Path, *ranges: str, trials: int = 3, **options: Any) -> Tuned:
    arguments = {"overrides": (), "seeds": 1, "out": pipeline.parent / "best.toml", "progress": Silent()} | options
    return run_tuning(pipeline, runs, ranges=ranges, trials=trials, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:5", {"low": 1, "high": 5, "is_whole": True}),
        (".005:.1:log", {"low": 0.005, "high": 0.1, "is_log": True}),
        ("0.5:2", {"low": 0.5, "high": 2}),
        ("sgd | adam", {"choices": ("sgd", "adam")}),
        ("[8, 1] | [4, 4, 1]", {"choices": ([8, 1], [4, 4, 1])}),
        ("true|false", {"choices": (True, False)}),
    ],
)
def test_a_range_is_bounds_or_values(text: str, expected: dict[str, Any]):
    assert parse_range("a.key", text) == Range(key="a.key", **expected)


def test_numbers_are_drawn_with_four_digits_within_their_bounds():
    rate = parse_range("train.lr", ".01:.2:log")
    assert [rate.value_of(drawn) for drawn in (0.0511575, 0.2, 0.01)] == [0.05116, 0.2, 0.01]
    assert parse_range("train.lr", "0.10004:1").value_of(0.10004) == 0.10004
    assert parse_range("train.epochs", "1:30").value_of(12) == 12


@pytest.mark.parametrize("text", ["5:1", "3", "a:b", "0:1:log", "1:2:linear", ""])
def test_what_is_no_range_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"expected a range for `train\.lr` such as"):
        parse_range("train.lr", text)


def test_the_best_trial_becomes_a_pipeline_that_repeats_it(pipeline: Path, tiny_runs: Path):
    tuned = search(pipeline, tiny_runs, RATES, "model.top_mlp=[8, 1] | [4, 1]")
    assert [trial.state for trial in tuned.trials] == ["complete"] * 3
    assert tuned.best.logloss == min(trial.logloss for trial in tuned.trials if trial.logloss)
    config = load_pipeline(tuned.out)
    assert config.train.lr == tuned.best.values["train.lr"]
    assert list(config.model.top_mlp) == tuned.best.values["model.top_mlp"]
    again = run_pipeline(config, tiny_runs)
    assert again.stages["train"].status == "skipped"  # it is the trial's own run
    assert again.counts("train")["val"]["logloss"] == tuned.best.logloss


def test_an_interrupted_search_goes_on_and_repeats_what_was_cut_off(pipeline: Path, tiny_runs: Path, monkeypatch):
    from slipstream import tune

    tried: list[float] = []
    original = tune.run_pipeline

    def run_and_die(config: Any, *arguments: Any, **options: Any) -> Any:
        tried.append(config.train.lr)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return original(config, *arguments, **options)

    monkeypatch.setattr(tune, "run_pipeline", run_and_die)
    with pytest.raises(KeyboardInterrupt):
        search(pipeline, tiny_runs, RATES, overrides=["train.epochs=2"])
    tuned = search(pipeline, tiny_runs, RATES, overrides=["train.epochs=2"])
    assert len(tuned.trials) == 3 and all(trial.state == "complete" for trial in tuned.trials)
    assert tried[2] == tried[1] and len(set(tried)) == 3  # the one cut off again, then one more
    done = len(tried)
    assert search(pipeline, tiny_runs, RATES, overrides=["train.epochs=2"]) == tuned and len(tried) == done


def test_a_training_worse_than_most_at_its_step_is_stopped():
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    good = study.ask()
    _Pruner(Silent(), good).measured(10, 0.5)
    study.tell(good, 0.4)
    bad = _Pruner(Silent(), study.ask())
    with pytest.raises(optuna.TrialPruned):
        bad.measured(10, 0.6)
    better = _Pruner(Silent(), study.ask())
    better.measured(10, 0.45)
    better.measured(10, 0.45)  # a step is reported once


def test_bad_trials_end_at_a_measurement_and_leave_nothing(pipeline: Path, tiny_runs: Path, monkeypatch):
    from slipstream import tune

    monkeypatch.setattr(tune, "_TRIALS_BEFORE_PRUNING", 1)
    folder = tiny_runs / "tiny_test" / "train"
    left_before = set(folder.glob(".*.partial"))
    tuned = search(pipeline, tiny_runs, "train.lr=1e-7:.1:log", trials=5, overrides=["train.validate_steps=15"])
    assert {trial.state for trial in tuned.trials} == {"complete", "pruned"}
    stopped = [trial for trial in tuned.trials if trial.state == "pruned"]
    assert all(trial.logloss is None and trial.values["train.lr"] < tuned.best.values["train.lr"] for trial in stopped)
    assert set(folder.glob(".*.partial")) == left_before


def test_a_failed_training_is_a_trial_with_its_reason(pipeline: Path, tiny_runs: Path):
    with pytest.raises(ConfigError, match="none of 1 trials was finished: the loss became nan"):
        search(pipeline, tiny_runs, "train.lr=1e30:1e31", trials=1)


def test_values_that_cannot_be_are_refused_before_the_first_trial(pipeline: Path, tmp_path: Path):
    for one, message in (
        ("train.lr=-1:1", r"`-1` for `train.lr`.*above 0"),
        ("train.lrr=1:2", "unknown key `train.lrr`"),
        ("train.optimizer=adam | adamw", "`train.optimizer` must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(pipeline, tmp_path / "runs", one)
    with pytest.raises(ConfigError, match="no key has a range"):
        search(pipeline, tmp_path / "runs")
    assert not (tmp_path / "runs" / "tiny_test" / "train").exists()


def test_the_command_takes_ranges_from_the_file_too_and_averages_seeds(tmp_path: Path, tiny_runs: Path):
    tree = tiny_tree() | {"tune.train": {"lr": ".01:.1:log"}}
    pipeline, out = write_toml(tmp_path / "small.toml", tree), tmp_path / "best.toml"
    assert load_pipeline(pipeline).tune == {"train": {"lr": ".01:.1:log"}}
    command = ["tune", str(pipeline), "--runs", str(tiny_runs), "--trials", "1", "--seeds", "2", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (trial,) = found["trials"]
    config = load_pipeline(out)
    assert config.tune == {} and config.train.lr == trial["values"]["train.lr"]
    losses = []
    for seed in range(2):
        result = run_pipeline(load_pipeline(out, [f"train.seed={seed}"]), tiny_runs)
        assert result.stages["train"].status == "skipped"
        losses.append(result.counts("train")["val"]["logloss"])
    assert trial["logloss"] == pytest.approx(sum(losses) / 2)
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "1 trials finished, 0 stopped early, 0 failed" in shown.stdout
