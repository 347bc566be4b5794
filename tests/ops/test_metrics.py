from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from slipstream.ops.metrics import QualityCounter, area_under_roc, measure_quality

# few distinct values, so that most draws have ties
_PROBABILITIES = st.one_of(st.sampled_from([0.1, 0.25, 0.5, 0.75]), st.floats(0.001, 0.999))


@st.composite
def predictions(draw: st.DrawFn):
    pairs = draw(st.lists(st.tuples(st.integers(0, 1), _PROBABILITIES), min_size=2, max_size=50))
    labels = np.array([label for label, _ in pairs], np.float32)
    labels[0], labels[-1] = 0, 1
    return labels, np.array([probability for _, probability in pairs], np.float32)


@given(predictions())
def test_auc_with_ties_equals_scikit_learn(drawn):
    labels, probabilities = drawn
    assert area_under_roc(labels, probabilities) == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)


@given(predictions())
def test_logloss_and_accuracy_equal_scikit_learn(drawn):
    labels, probabilities = drawn
    quality = measure_quality(labels, probabilities)
    assert quality.logloss == pytest.approx(log_loss(labels, probabilities.astype(np.float64)), rel=1e-9)
    assert quality.accuracy == accuracy_score(labels, probabilities >= 0.5)


@given(predictions())
def test_normalised_entropy_and_calibration_are_their_formulas(drawn):
    labels, probabilities = drawn
    quality = measure_quality(labels, probabilities)
    p = sum(labels.tolist()) / len(labels)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert quality.ne == pytest.approx(quality.logloss / entropy)
    assert quality.calibration == pytest.approx(sum(probabilities.tolist()) / sum(labels.tolist()))


def test_guessing_the_mean_has_a_normalised_entropy_of_one():
    labels = np.array([1, 0, 0, 0])
    quality = measure_quality(labels, np.full(4, 0.25))
    assert (quality.auc, quality.ne, quality.calibration) == (0.5, pytest.approx(1), 1)


@given(predictions(), st.randoms(use_true_random=False))
def test_auc_does_not_depend_on_the_order_of_samples(drawn, random):
    labels, probabilities = drawn
    order = list(range(len(labels)))
    random.shuffle(order)
    assert area_under_roc(labels[order], probabilities[order]) == area_under_roc(labels, probabilities)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc_and_everything_else_stays_sound(label: int):
    quality = measure_quality(np.full(3, label), np.array([0.0, 0.5, 1.0]))
    assert math.isnan(quality.auc)
    assert math.isnan(quality.ne)
    assert math.isfinite(quality.logloss)


def test_certain_and_wrong_predictions_cost_a_finite_loss():
    assert measure_quality(np.array([0, 1]), np.array([1.0, 0.0])).logloss == pytest.approx(-math.log(1e-7))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=60),
    st.integers(1, 7),
)
def test_metrics_counted_in_pieces_are_those_of_the_whole(pairs: list[tuple[int, int]], num_pieces: int):
    labels, levels = np.array(pairs).T
    probabilities = (levels / 20).astype(np.float32)
    counter = QualityCounter()
    for part in np.array_split(np.arange(len(labels)), num_pieces):
        counter.add(labels[part], probabilities[part])
    found, expected = dataclasses.astuple(counter.result()), dataclasses.astuple(measure_quality(labels, probabilities))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
