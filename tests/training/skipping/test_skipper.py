from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_samples

from slipstream.io.samples import Samples
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.registry import CRITERIA
from slipstream.training.skipping.skipper import Skipper
from slipstream.training.skipping.staleness import UNTOUCHED


def never(samples: Samples) -> np.ndarray:
    raise AssertionError("no score was needed")


def samples_of(num_samples: int, *, seed: int = 0, num_rows: int = 40, num_tables: int = 3) -> Samples:
    return make_samples(np.random.default_rng(seed).integers(0, num_rows, (num_samples, num_tables)))


def active(criterion: str, moved: np.ndarray | None = None, **settings) -> Skipper:
    """A skipper after its first segment, in which rows moved by (H,) in net, or by (2, H) per label."""
    if moved is not None:
        settings["movement"] = "net" if moved.ndim == 1 else "per-label"
    skipper = Skipper(SkipRule(criterion=criterion, **{"target_drop": 0.3, **settings}))  # type: ignore[arg-type]
    if moved is None:
        skipper.start()
    else:
        skipper.check(step=10, movement=moved)
    return skipper


@pytest.mark.parametrize("criterion", CRITERIA.names())
def test_nothing_is_dropped_before_the_first_check(criterion: str, rng: np.random.Generator):
    skipper = Skipper(SkipRule(criterion=criterion, target_drop=0.5))
    hot, cold = skipper.select(samples_of(50), samples_of(20), rng=rng, score=never)
    assert hot.keep.all() and cold.keep.all()
    assert (hot.weights, skipper.classified, skipper.dropped) == (None, 0, 0)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6),
    st.floats(0, 0.95),
    st.sampled_from(["hot", "all"]),
)
def test_random_drops_exactly_its_share(rounds, target_drop: float, scope: str):
    skipper = active("random", target_drop=target_drop, scope=scope)
    rng = np.random.default_rng(1)
    kept = 0
    for num_hot, num_cold in rounds:
        picked = skipper.select(samples_of(num_hot), samples_of(num_cold), rng=rng, score=never)
        kept += sum(int(selection.keep.sum()) for selection in picked)
        assert picked[1].keep.all() or scope == "all"
    total = sum(map(sum, rounds))
    classified = total if scope == "all" else sum(num_hot for num_hot, _ in rounds)
    assert skipper.classified == classified
    assert skipper.dropped == round(classified * target_drop) == total - kept


def test_stale_drops_the_hot_samples_whose_rows_stand_still(rng: np.random.Generator):
    movement = np.linspace(0, 1, 40).astype(np.float32)
    hot = samples_of(4000)
    skipper = active("stale", movement, target_drop=0.3)
    first, second = skipper.select(hot, samples_of(100, seed=1), rng=rng, score=never)
    statistic = movement[hot.X_cat].max(axis=1)
    assert second.keep.all()
    assert statistic[~first.keep].max() <= statistic[first.keep].min()  # equal at most: ties are shared out
    assert statistic[~first.keep].max() <= np.float32(skipper.threshold) <= statistic[first.keep].max()
    assert (~first.keep).sum() == round(0.3 * len(hot))
    assert skipper.checks[-1].step == 10
    assert skipper.checks[-1].stale_rows == int((movement < skipper.threshold).sum())


@pytest.mark.parametrize("target_drop", [0.1, 0.3, 0.5])
def test_stale_achieves_its_share_over_a_realistic_segment(rng: np.random.Generator, target_drop: float):
    movement = rng.lognormal(size=5000).astype(np.float32)
    movement[rng.random(5000) < 0.01] = UNTOUCHED
    skipper = active("stale", movement, target_drop=target_drop, sample_size=20_000)
    for seed in range(3):
        skipper.select(samples_of(20_000, seed=seed, num_rows=5000, num_tables=8), None, rng=rng, score=never)
    assert skipper.classified == 60_000
    assert abs(skipper.dropped / skipper.classified - target_drop) < 0.01


def test_a_threshold_by_hand_is_used_as_it_is_and_zero_drops_none(rng: np.random.Generator):
    movement = np.linspace(0, 1, 40).astype(np.float32)
    hot = samples_of(500)
    for threshold in (0.0, 0.5):
        skipper = active("stale", movement, threshold=threshold)
        keep = skipper.select(hot, None, rng=rng, score=never)[0].keep
        assert keep.tolist() == (movement[hot.X_cat].max(axis=1) >= threshold).tolist()
        assert skipper.threshold == threshold


def test_rows_and_samples_come_back_when_they_move_again(rng: np.random.Generator):
    movement = np.full(40, 0.01, np.float32)
    hot = samples_of(100)
    skipper = active("stale", movement, threshold=0.1)
    assert not skipper.select(hot, None, rng=rng, score=never)[0].keep.any()
    skipper.check(step=20, movement=np.ones(40, np.float32))
    assert skipper.select(hot, None, rng=rng, score=never)[0].keep.all()
    assert [check.step for check in skipper.checks] == [10, 20]


def pulls_of(num_rows: int = 40, *, clicks: float = 4.0) -> np.ndarray:
    """Pulls that rise with the row, those of clicked samples several times the others."""
    of_others = np.linspace(0.1, 1, num_rows).astype(np.float32)
    return np.stack([of_others, clicks * of_others])


def test_stale_per_label_thins_samples_in_proportion_to_the_pull_of_their_rows(rng: np.random.Generator):
    pulls = pulls_of()
    hot = samples_of(20_000)
    skipper = active("stale", pulls)
    first, second = skipper.select(hot, samples_of(100, seed=1), rng=rng, score=never)
    assert second.keep.all() and second.weights is None
    assert skipper.threshold is not None and first.weights is not None
    statistic = pulls[hot.y.astype(int)[:, None], hot.X_cat].mean(axis=1)
    probabilities = np.clip(statistic / skipper.threshold, 0.05, 1)
    assert (~first.keep).sum() == pytest.approx(0.3 * len(hot), abs=1) == pytest.approx(skipper.dropped, abs=1)
    np.testing.assert_allclose(first.weights, 1 / probabilities[first.keep], rtol=1e-4)
    assert first.keep[statistic >= skipper.threshold].all()
    for group in np.array_split(np.argsort(statistic), 10):
        assert first.keep[group].mean() == pytest.approx(probabilities[group].mean(), abs=0.03)
        counted = first.weights[np.isin(np.flatnonzero(first.keep), group)].sum()
        assert counted == pytest.approx(len(group), rel=0.08)  # those that stay stand for those that went


def test_stale_per_label_makes_up_for_rows_it_knows_nothing_of(rng: np.random.Generator):
    pulls = pulls_of()
    pulls[:, 1:] = 0  # nothing but row 0 was looked up
    skipper = active("stale", pulls, target_drop=0.3)
    hot = samples_of(300, num_rows=40)
    known = (hot.X_cat == 0).any(axis=1)
    first, _ = skipper.select(hot, None, rng=rng, score=never)
    assert first.keep[~known].all() and 0 < skipper.dropped < 0.3 * 300
    assert (skipper.checks[-1].untouched_rows, skipper.checks[-1].stale_rows) == (39, 1)
    skipper.check(step=20, movement=pulls_of())
    skipper.select(samples_of(300, seed=1), None, rng=rng, score=never)
    assert skipper.dropped == pytest.approx(0.3 * 600, abs=1)


@pytest.mark.parametrize("measure", ["net", "per-label"])
def test_what_earlier_rounds_could_not_drop_never_empties_a_round(rng: np.random.Generator, measure: str):
    unknown, known = np.full(40, UNTOUCHED, np.float32), np.linspace(0.1, 1, 40).astype(np.float32)
    if measure == "per-label":
        unknown, known = np.zeros((2, 40), np.float32), pulls_of()
    skipper = active("stale", unknown, target_drop=0.5, floor=0.01)
    skipper.select(samples_of(5000), None, rng=rng, score=never)
    assert skipper.dropped == 0  # half of 5000 is due from now on
    skipper.check(step=20, movement=known)
    selection, _ = skipper.select(samples_of(1000, seed=1), None, rng=rng, score=never)
    assert np.count_nonzero(~selection.keep) == pytest.approx(950, abs=1)


def test_a_pull_given_by_hand_is_the_threshold_and_zero_drops_none(rng: np.random.Generator):
    hot = samples_of(4000)
    for threshold in (0.0, 0.5):
        skipper = active("stale", pulls_of(), threshold=threshold)
        picked = skipper.select(hot, None, rng=rng, score=never)[0]
        assert skipper.threshold == threshold
        statistic = pulls_of()[hot.y.astype(int)[:, None], hot.X_cat].mean(axis=1)
        assert picked.keep[statistic >= threshold].all()
        expected = np.minimum(statistic / threshold, 1).sum() if threshold else len(hot)
        assert picked.keep.sum() == pytest.approx(expected, abs=1)
    assert active("stale", pulls_of(), reweight=False).select(hot, None, rng=rng, score=never)[0].weights is None


def test_negative_keeps_every_positive_and_weights_the_rest_up(rng: np.random.Generator):
    hot = samples_of(2000)
    selection, _ = active("negative").select(hot, None, rng=rng, score=never)
    assert selection.keep[hot.y == 1].all()
    assert abs((~selection.keep).sum() - 600) <= 1
    assert selection.weights is not None
    labels = hot.y[selection.keep]
    ratio = selection.weights[labels == 0].mean() / selection.weights[labels == 1].mean()
    assert ratio == pytest.approx((hot.y == 0).sum() / (labels == 0).sum(), rel=1e-3)
    assert selection.weights.sum() == pytest.approx(len(hot), rel=1e-3)


def test_importance_keeps_what_the_model_gets_wrong(rng: np.random.Generator):
    hot = samples_of(4000)
    wrong = np.arange(4000) % 4 == 0
    selection, _ = active("importance", target_drop=0.5).select(
        hot, None, rng=rng, score=lambda samples: np.where(wrong, 1 - samples.y, np.abs(samples.y - 0.1))
    )
    assert selection.keep[wrong].all()
    assert abs(selection.keep.mean() - 0.5) < 0.001
    assert selection.weights is not None
    assert selection.weights[wrong[selection.keep]].max() < selection.weights[~wrong[selection.keep]].min()
    selection, _ = active("importance", reweight=False).select(hot, None, rng=rng, score=lambda samples: samples.y)
    assert selection.weights is None


@pytest.mark.parametrize("moved", [np.linspace(0, 1, 40).astype(np.float32), pulls_of()], ids=["net", "per-label"])
def test_a_restored_skipper_goes_on_as_the_one_it_came_from(moved: np.ndarray):
    first = active("stale", moved)
    first.select(samples_of(300), None, rng=np.random.default_rng(0), score=never)
    again = Skipper(first.rule)
    again.restore(*first.state())
    for skipper in (first, again):
        skipper.select(samples_of(300, seed=2), None, rng=np.random.default_rng(3), score=never)
    assert again.state()[0] == first.state()[0]
    assert (again.dropped, again.classified, again.threshold) == (first.dropped, first.classified, first.threshold)
