"""Forecast speed: what trials take is taken apart rightly, and put together again for any hot set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strategies import tiny_config

from slipstream.io.counts import read_counts
from slipstream.io.figures import PreprocessFigures, ProfileFigures
from slipstream.ops.hit_curve import HitCurve
from slipstream.ops.hot_set import table_offsets
from slipstream.pipeline import run_pipeline
from slipstream.sizing import speed
from slipstream.sizing.answers import read_questions, size_pipeline
from slipstream.sizing.speed import Calibration, Cost, calibrate, forecast_speed, moves_per_sample, solve_costs

CALIBRATION = Calibration(
    per_sample=Cost(wall=20e-6, cpu=10e-6),
    per_fetched_row=Cost(wall=2e-6, cpu=1e-6),
    per_forwarded_row=Cost(wall=1e-6, cpu=0.0),
    per_offered_sample=Cost(wall=4e-6, cpu=2e-6),
    row_bytes=20,
    num_rows=1000,
    device="cpu",
    threads=1,
    seconds=1.0,
)


def forecast(**overrides: Any) -> speed.Speed:
    given = {"num_samples": 70_000, "hot_sample_share": 0.5, "fetched_per_sample": 3.0, "forwarded_per_sample": 2.0}
    moves = {name: overrides.pop(name) for name in list(overrides) if name in given}
    return forecast_speed(CALIBRATION, tiny_config(**overrides), **(given | moves))


def test_costs_add_up():
    told = forecast(train__mode="fae", train__epochs=2)
    assert (told.samples_trained, told.samples_dropped) == (140_000, 0)
    assert told.train_seconds == pytest.approx(140_000 * (20e-6 + 3 * 2e-6 + 2 * 1e-6))
    assert told.cpu_seconds == pytest.approx(140_000 * (10e-6 + 3 * 1e-6))
    assert told.samples_per_second == pytest.approx(140_000 / told.train_seconds)
    assert told.bytes_to_device == 140_000 * 3 * 20


def test_what_is_dropped_follows_from_the_hot_samples_after_the_first_segment():
    told = forecast(train__mode="slipstream", skip__target_drop=0.4)
    first = 64 * 157  # a seventh of the steps, rounded up
    assert told.samples_dropped == pytest.approx(0.4 * 0.5 * (70_000 - first), abs=1)
    assert told.samples_trained + told.samples_dropped == 70_000
    watching = told.train_seconds - told.samples_trained * 28e-6
    assert watching == pytest.approx(70_000 * 4e-6), "rows are watched in every step"
    every = forecast(train__mode="slipstream", skip__criterion="random", skip__scope="all", skip__target_drop=0.4)
    assert every.samples_dropped == pytest.approx(2 * told.samples_dropped, abs=1)


def test_two_costs_come_out_of_trials_that_are_made_of_them():
    moves = [(5.0, 1.0), (2.0, 4.0)]
    assert solve_costs(moves, [5 * 3 + 1 * 2, 2 * 3 + 4 * 2]) == pytest.approx((3, 2))
    fetched, forwarded = solve_costs(moves, [5.0, 1.0])
    assert fetched > 0 and forwarded == 0, "none is below zero"
    assert solve_costs(moves, [0.0, 0.0]) == (0, 0)


def test_chunks_that_have_no_room_are_cut_and_move_more(rng: np.random.Generator):
    counts = np.concatenate([[0], np.sort(rng.integers(1, 50, 2000))[::-1]])
    curve = HitCurve(counts, np.array([0, 2001]), [0], {"frequency": []})
    config = tiny_config(train__mode="fae", train__chunk_batches=16)
    given = {"config": config, "num_samples": int(counts.sum())}
    roomy = moves_per_sample(curve, "frequency", 100, room=10**6, **given)
    tight = moves_per_sample(curve, "frequency", 100, room=200, **given)
    assert tight[0] > roomy[0] > 0
    assert moves_per_sample(curve, "frequency", 2001, room=10**6, **given) == (0, 0)


@pytest.mark.parametrize("tables", [{}, {"rules": [{"min_rows": 100, "representation": "tt", "tt_ranks": [2]}]}])
def test_a_calibration_tries_the_loop_that_trains(
    tiny_runs: Path, monkeypatch: pytest.MonkeyPatch, tables: dict[str, Any]
):
    monkeypatch.setattr(speed, "_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_ROUNDS", 1)
    config = tiny_config(train__mode="slipstream", tables=tables)
    result = run_pipeline(config, tiny_runs, stages=["preprocess", "profile"])
    figures = result.figures(PreprocessFigures)
    assert figures is not None
    found = calibrate(config, figures, read_counts(result.stages["profile"].artifact))
    assert found.per_sample.wall > 0 and found.per_sample.cpu > 0
    assert found.num_rows == sum(figures.rows_per_table.values())
    assert (found.device, found.row_bytes) == ("cpu", 20)


def test_tables_larger_than_is_tried_are_folded_and_keep_their_lookups(
    tiny_runs: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config()
    result = run_pipeline(config, tiny_runs, stages=["preprocess", "profile"])
    figures, counts = result.figures(PreprocessFigures), read_counts(result.stages["profile"].artifact)
    assert figures is not None
    monkeypatch.setattr(speed, "MOST_TABLE_BYTES", 20 * len(counts) // 2)
    cut = speed._cut_tables(config, figures, counts)
    assert len(cut.counts) == pytest.approx(len(counts) / 2, abs=60)
    assert cut.counts.sum() == counts.sum()
    assert cut.rows_per_table.keys() == figures.rows_per_table.keys()
    assert cut.offsets.tolist() == table_offsets(list(cut.rows_per_table.values())).tolist()


def test_a_machine_twice_as_slow_is_told_to_be(tiny_runs: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config(train__mode="fae")
    profiled = run_pipeline(config, tiny_runs, stages=["preprocess", "profile"]).figures(ProfileFigures)
    assert profiled is not None
    paces = []
    for times in (1, 2):
        slower = replace(
            CALIBRATION,
            per_sample=CALIBRATION.per_sample * times,
            per_fetched_row=CALIBRATION.per_fetched_row * times,
            per_forwarded_row=CALIBRATION.per_forwarded_row * times,
        )
        monkeypatch.setattr("slipstream.sizing.answers.calibrate", lambda *given, slower=slower: slower)
        sizes = size_pipeline(config, tiny_runs, read_questions(budgets=["5%", "20%"]), calibrates=True)
        paces.append([answer.speed.samples_per_second for answer in sizes.answers if answer.speed is not None])
    assert len(paces[0]) == 6
    assert paces[0] == pytest.approx([2 * pace for pace in paces[1]])
    *hot_sets, resident, baseline = paces[0]
    assert baseline < min(hot_sets) <= max(hot_sets) < resident, "the bounds hold"
