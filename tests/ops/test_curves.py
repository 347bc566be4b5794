"""Curves hold what the predictions say, whatever their number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from slipstream.ops.curves import prediction_histogram, rank_curve, reliability_bins, roc_points


def _drawn(rng: np.random.Generator, count: int, *, decimals: int = 8) -> tuple[np.ndarray, np.ndarray]:
    probabilities = rng.beta(2, 5, count).round(decimals)
    return (rng.random(count) < probabilities).astype(np.uint8), probabilities.astype(np.float32)


@pytest.mark.parametrize("decimals", [1, 8])
def test_the_roc_curve_is_that_of_scikit_learn(rng: np.random.Generator, decimals: int):
    labels, probabilities = _drawn(rng, 300, decimals=decimals)
    points = roc_points(labels, probabilities, most=10_000)
    fpr, tpr, _ = roc_curve(labels, probabilities, drop_intermediate=False)
    np.testing.assert_allclose(points["false_positive_rate"], fpr)
    np.testing.assert_allclose(points["true_positive_rate"], tpr)


def test_a_thinned_roc_curve_has_the_same_area(rng: np.random.Generator):
    labels, probabilities = _drawn(rng, 100_000)
    points = roc_points(labels, probabilities)
    assert points.height <= 202
    area = np.trapezoid(points["true_positive_rate"], points["false_positive_rate"])
    assert area == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-4)


@pytest.mark.parametrize("label", [0, 1])
def test_without_both_classes_there_is_no_roc_curve(label: int):
    assert roc_points(np.full(5, label, np.uint8), np.linspace(0, 1, 5)).is_empty()


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])), min_size=1, max_size=60),
    st.integers(1, 7),
)
def test_bins_hold_every_sample_once_and_equal_predictions_together(samples: list[tuple[int, float]], bins: int):
    labels, probabilities = (np.array(column) for column in zip(*samples, strict=True))
    frame = reliability_bins(labels, probabilities, bins=bins)
    assert frame["samples"].sum() == len(samples) and frame.height <= bins
    assert frame["predicted"].is_sorted() and frame["predicted"].n_unique() == frame.height
    assert (frame["click_rate"] * frame["samples"]).sum() == pytest.approx(labels.sum())
    assert (frame["predicted"] * frame["samples"]).sum() == pytest.approx(probabilities.sum())
    assert ((frame["low"] <= frame["click_rate"]) & (frame["click_rate"] <= frame["high"])).all()


def test_error_bars_are_two_standard_errors_of_a_rate():
    frame = reliability_bins(np.array([1, 0, 0, 0] * 25), np.full(100, 0.25), bins=3)
    assert frame.row(0, named=True)["high"] == pytest.approx(0.25 + 2 * (0.25 * 0.75 / 100) ** 0.5)


def test_the_histogram_counts_each_label(rng: np.random.Generator):
    labels, probabilities = _drawn(rng, 1000)
    frame = prediction_histogram(labels, probabilities, bins=20)
    clicks = frame.filter(label="click")
    assert clicks["samples"].sum() == labels.sum() and clicks["share"].sum() == pytest.approx(1)
    assert frame.filter(label="no click")["samples"].sum() == 1000 - labels.sum()
    in_bin = (probabilities >= 0.25) & (probabilities < 0.3) & (labels == 1)
    assert clicks["samples"][5] == in_bin.sum()


def test_ranks_begin_with_the_most_used_row_and_end_with_the_least(rng: np.random.Generator):
    counts = rng.permutation(np.concatenate([np.arange(1, 5001), np.zeros(100, int)]))
    frame = rank_curve(counts)
    assert frame.height <= 40
    assert frame.row(0) == (1, 5000) and frame.row(-1) == (5000, 1)
    assert (frame["lookups"] == 5001 - frame["rank"]).all()


def test_rows_that_were_never_looked_up_have_no_rank():
    assert rank_curve(np.zeros(3, int)).is_empty()
