import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from slipstream.io.samples import Samples
from slipstream.training.skipping.linear_scorer import LinearScorer

ROWS, TABLES, DENSE = 60, 4, 2


EFFECTS = np.random.default_rng(7).normal(size=ROWS)
DENSE_EFFECTS = np.array([0.8, -0.5])


def logits_of(samples: Samples) -> np.ndarray:
    return EFFECTS[samples.X_cat].sum(axis=1) + np.log1p(samples.X_int) @ DENSE_EFFECTS


def draw(num_samples: int, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, ROWS, (num_samples, TABLES)).astype(np.int32)
    dense = rng.exponential(3.0, (num_samples, DENSE)).astype(np.float32)
    samples = Samples(X_int=dense, X_cat=slots, y=np.zeros(num_samples, np.float32))
    samples.y[:] = rng.random(num_samples) < 1 / (1 + np.exp(-logits_of(samples)))
    return samples


def test_it_learns_effects_of_rows_and_dense_values_in_one_pass() -> None:
    samples = draw(50_000, 0)
    guesses = LinearScorer(ROWS, DENSE).learn(samples)

    late = slice(40_000, None)
    best = roc_auc_score(samples.y[late], logits_of(samples)[late])
    assert roc_auc_score(samples.y[late], guesses[late]) > best - 0.01
    assert guesses[late].mean() == pytest.approx(samples.y[late].mean(), rel=0.03)


def test_a_guess_comes_from_before_its_sample_was_learned() -> None:
    samples = draw(2000, 1)
    told, lied = LinearScorer(ROWS, DENSE), LinearScorer(ROWS, DENSE)
    flipped = Samples(X_int=samples.X_int, X_cat=samples.X_cat, y=1 - samples.y)
    first, second = told.learn(samples), lied.learn(flipped)

    assert np.all(first[:256] == 0.5)
    assert np.array_equal(first[:256], second[:256])
    assert not np.array_equal(first[256:], second[256:])


def test_it_matches_a_plain_loop_over_mini_batches() -> None:
    samples = draw(1000, 2)
    guesses = LinearScorer(ROWS, DENSE, lr=0.1).learn(samples)

    inputs = np.zeros((1000, ROWS + DENSE + 1))
    for sample, slots in enumerate(samples.X_cat):
        for slot in slots:
            inputs[sample, slot] += 1
    inputs[:, ROWS:-1] = np.log1p(samples.X_int)
    inputs[:, -1] = 1
    weights, squares = np.zeros(inputs.shape[1]), np.full(inputs.shape[1], 1e-6)
    expected = []
    for start in range(0, 1000, 256):
        piece, labels = inputs[start : start + 256], samples.y[start : start + 256]
        probabilities = 1 / (1 + np.exp(-piece @ weights))
        expected.append(probabilities)
        gradient = (probabilities - labels) @ piece / len(labels)
        squares += gradient**2
        weights -= 0.1 * gradient / np.sqrt(squares)

    np.testing.assert_allclose(guesses, np.concatenate(expected), atol=1e-4)


def test_padding_is_as_if_it_were_not_there() -> None:
    samples = draw(2000, 3)
    shorter = Samples(X_int=samples.X_int, X_cat=samples.X_cat[:, :2], y=samples.y)
    padded = samples.X_cat.copy()
    padded[:, 2:] = 5
    other = np.where(shorter.X_cat == 5, 6, shorter.X_cat)
    padded[:, :2] = other
    without = Samples(X_int=samples.X_int, X_cat=other, y=samples.y)
    with_it = Samples(X_int=samples.X_int, X_cat=padded, y=samples.y)
    guesses = LinearScorer(ROWS, DENSE, padding=[5]).learn(with_it)
    np.testing.assert_array_equal(guesses, LinearScorer(ROWS, DENSE).learn(without))
    assert not np.array_equal(guesses, LinearScorer(ROWS, DENSE).learn(with_it))


def test_raw_dense_values_do_not_blow_it_up() -> None:
    samples = draw(5000, 6)
    wild = Samples(X_int=samples.X_int * np.float32(1e8) - np.float32(1e7), X_cat=samples.X_cat, y=samples.y)
    guesses = LinearScorer(ROWS, DENSE).learn(wild)
    assert np.isfinite(guesses).all()
    assert roc_auc_score(samples.y[2000:], guesses[2000:]) > 0.75


def test_a_restored_scorer_goes_on_alike() -> None:
    one, other = LinearScorer(ROWS, DENSE), LinearScorer(ROWS, DENSE)
    one.learn(draw(3000, 3))
    other.restore({name: value.copy() for name, value in one.state().items()})

    assert np.array_equal(one.learn(draw(3000, 4)), other.learn(draw(3000, 4)))
