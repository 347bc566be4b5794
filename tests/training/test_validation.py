"""Measurements on the way, the best model, and when training stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import tiny_config
from trained import (
    HELD,
    artifact_of,
    assert_same_model,
    losses_of,
    predictions_from_disk,
    predictions_of,
    train,
)

from slipstream.errors import ArtifactError, ConfigError
from slipstream.ops.metrics import Quality
from slipstream.report.terminal import _facts
from slipstream.training.loop import Trainer
from slipstream.training.validation import Validation


def quality(logloss: float) -> Quality:
    return Quality(auc=0.5, logloss=logloss, ne=1.0, calibration=1.0, accuracy=0.5)


def make_validation(losses: Iterator[float], kept: list[int], *, patience: int = 0, every: int = 0) -> Validation:
    def keep() -> str:
        kept.append(validation.checks[-1].step)
        return f"model {kept[-1]}"

    validation = Validation(every_steps=every, patience=patience, measure=lambda: quality(next(losses)), keep=keep)
    return validation


@given(losses=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=12), patience=st.integers(0, 4))
def test_the_best_is_the_first_of_the_least_and_patience_counts_from_it(losses: list[float], patience: int) -> None:
    kept: list[int] = []
    validation = make_validation(iter(losses), kept, patience=patience)
    seen: list[float] = []
    for step, loss in enumerate(losses, start=1):
        if validation.says_stop:
            break
        validation(step=step, epoch=0)
        seen.append(loss)
    best = seen.index(min(seen)) + 1
    assert validation.best is not None and validation.best.step == best == kept[-1]
    assert validation.best_hash == f"model {best}"
    assert validation.says_stop == (0 < patience <= len(seen) - best)
    other = make_validation(iter([]), [], patience=patience)
    other.restore(validation.state())
    assert (other.checks, other.best, other.best_hash) == (validation.checks, validation.best, validation.best_hash)
    assert other.says_stop == validation.says_stop


def test_a_step_is_measured_once() -> None:
    validation = make_validation(iter([0.5]), [], every=3)
    assert [validation.steps_left(step) for step in (0, 1, 2, 3)] == [3, 2, 1, 3]
    assert [validation.is_due(step) for step in (2, 3, 4)] == [False, True, False]
    validation(step=3, epoch=0)
    validation(step=3, epoch=0)  # the epoch ends there too
    assert len(validation.checks) == 1


# --- in a run ------------------------------------------------------------------------------------------------

OVERFITS = {"train__mode": "fae", "train__epochs": 4, "train__lr": 0.15}
"""Rows that are seen often enough to be learned by heart: the first epochs are the best."""


@pytest.mark.parametrize("held", ["dense", "int4"])
def test_the_best_model_is_kept_and_is_that_of_a_training_which_ended_there(tiny_runs: Path, held: str) -> None:
    result = train(tiny_runs, **OVERFITS, tables=HELD[held])
    figures = result.counts("train")
    checks = figures["validations"]
    loglosses = [check["quality"]["logloss"] for check in checks]
    assert [check["epoch"] for check in checks] == [0, 1, 2, 3]
    assert figures["best_step"] == checks[int(np.argmin(loglosses))]["step"] < figures["steps"]
    assert figures["val"] == checks[int(np.argmin(loglosses))]["quality"]
    epochs = 1 + int(np.argmin(loglosses))
    shorter = train(tiny_runs, **(OVERFITS | {"train__epochs": epochs}), tables=HELD[held])
    assert_same_model(result, shorter)
    for split in ("val", "test"):
        assert np.array_equal(
            predictions_from_disk(artifact_of(result).path, result, split), predictions_of(result, split)
        )
    assert losses_of(result)[: len(losses_of(shorter)) - 1] == losses_of(shorter)[:-1]


def test_measuring_changes_nothing_in_training(tiny_runs: Path) -> None:
    plain = train(tiny_runs, train__mode="baseline", train__average=0.3)
    measured = train(tiny_runs, train__mode="baseline", train__average=0.3, train__validate_steps=7)
    figures = measured.counts("train")
    assert [check["step"] for check in figures["validations"]] == [*range(7, figures["steps"], 7), figures["steps"]]
    assert losses_of(plain) == losses_of(measured)
    assert figures["best_step"] == figures["steps"]
    assert_same_model(plain, measured)


def test_patience_ends_training_and_the_best_is_kept(tiny_runs: Path) -> None:
    whole = train(tiny_runs, **OVERFITS)
    stopped = train(tiny_runs, **OVERFITS, train__patience=1, train__average=0.1)
    figures = stopped.counts("train")
    assert figures["averaged_steps"] == 0  # it stopped before the last tenth
    assert figures["stopped_early"] and not whole.counts("train")["stopped_early"]
    assert dict(_facts(stopped))["kept"] == (
        f"the model after step {figures['best_step']}, least validation logloss of {len(figures['validations'])} "
        f"measured up to step {figures['steps']}; train.patience ended training there"
    )
    measured = [check["step"] for check in figures["validations"]]
    assert measured[-2:] == [figures["best_step"], figures["steps"]]
    assert figures["steps"] < whole.counts("train")["steps"]
    assert_same_model(whole, stopped)


def test_a_best_model_that_was_altered_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.train

    def then_alter(self: Trainer, *streams: object) -> None:
        original(self, *streams)  # type: ignore[arg-type]
        (file,) = tmp_path.glob("tiny_test/train/.*.partial/work/best/model.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(Trainer, "train", then_alter)
    with pytest.raises(ArtifactError, match="expected the best model"):
        train(tmp_path, **OVERFITS)


def test_patience_that_never_gets_a_second_measurement_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`train.patience` = 2 stops nothing"):
        tiny_config(train__patience=2)
