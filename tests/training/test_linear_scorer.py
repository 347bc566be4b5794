import numpy as np
from sklearn.metrics import roc_auc_score

from slipstream.io.samples import Samples
from slipstream.training.linear_scorer import LinearScorer

ROWS, TABLES = 60, 4


EFFECTS = np.random.default_rng(7).normal(size=ROWS)


def draw(num_samples: int, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, ROWS, (num_samples, TABLES)).astype(np.int32)
    probability = 1 / (1 + np.exp(-EFFECTS[slots].sum(axis=1)))
    labels = (rng.random(num_samples) < probability).astype(np.float32)
    return Samples(X_int=np.zeros((num_samples, 1), np.float32), X_cat=slots, y=labels)


def test_it_learns_row_effects_in_one_pass() -> None:
    scorer = LinearScorer(ROWS)
    before = scorer.score(draw(2000, 1))
    scorer.learn(draw(50_000, 0))
    held_out = draw(2000, 1)

    assert np.ptp(before) == 0.0
    best = roc_auc_score(held_out.y, EFFECTS[held_out.X_cat].sum(axis=1))
    assert roc_auc_score(held_out.y, scorer.score(held_out)) > best - 0.03


def test_it_matches_a_plain_loop_over_mini_batches() -> None:
    samples = draw(5000, 2)
    scorer = LinearScorer(ROWS, lr=0.1)
    scorer.learn(samples)
    weights, squares, bias, bias_squares = np.zeros(ROWS), np.full(ROWS, 1e-4), 0.0, 0.0
    for start in range(0, 5000, 2048):
        slots, labels = samples.X_cat[start : start + 2048], samples.y[start : start + 2048]
        errors = 1 / (1 + np.exp(-(weights[slots].sum(axis=1) + bias))) - labels
        gradient = np.zeros(ROWS)
        for row_slots, error in zip(slots, errors, strict=True):
            for slot in row_slots:
                gradient[slot] += error / len(labels)
        squares += gradient**2
        weights -= np.where(gradient != 0, 0.1 * gradient / np.sqrt(squares), 0.0)
        bias_squares += errors.mean() ** 2
        bias -= 0.1 * errors.mean() / np.sqrt(bias_squares + 1e-4)

    expected = 1 / (1 + np.exp(-(weights[samples.X_cat].sum(axis=1) + bias)))
    np.testing.assert_allclose(scorer.score(samples), expected, atol=1e-4)


def test_a_restored_scorer_goes_on_alike() -> None:
    one, other = LinearScorer(ROWS), LinearScorer(ROWS)
    one.learn(draw(3000, 3))
    other.restore({name: value.copy() for name, value in one.state().items()})
    one.learn(draw(3000, 4))
    other.learn(draw(3000, 4))

    assert np.array_equal(one.score(draw(100, 5)), other.score(draw(100, 5)))
