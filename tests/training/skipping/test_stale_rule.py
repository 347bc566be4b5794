import numpy as np
import pytest

from slipstream.io.samples import Samples
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.skipper import Skipper

TABLES = 3


def hot_samples(slots: np.ndarray) -> Samples:
    return Samples(X_int=np.zeros((len(slots), 1), np.float32), X_cat=slots, y=np.zeros(len(slots), np.float32))


def run_check(movement: np.ndarray, slots: np.ndarray, rule: SkipRule) -> tuple[Skipper, np.ndarray]:
    skipper = Skipper(rule)
    skipper.check(step=1, movement=movement)
    picked, _ = skipper.select(hot_samples(slots), None, rng=np.random.default_rng(0), score=lambda s: s.y)
    return skipper, picked.keep


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.85])
def test_the_target_is_met_although_most_samples_share_their_fastest_row(target: float) -> None:
    movement = np.linspace(0.01, 0.1, 50).astype(np.float32)
    rng = np.random.default_rng(1)
    slots = rng.integers(0, 49, (1000, TABLES)).astype(np.int32)
    slots[:800, 0] = 49  # the fastest row of all
    rule = SkipRule(criterion="stale", movement="net", target_drop=target)

    skipper, keep = run_check(movement, slots, rule)

    assert skipper.dropped == round(1000 * target)
    statistic = movement[slots].max(axis=1)
    assert statistic[~keep].max() <= statistic[keep].max()
    assert (
        not (statistic[keep] < skipper.threshold - 1e-6).any() or (~keep).sum() < (statistic < skipper.threshold).sum()
    )


def test_a_threshold_given_by_hand_splits_no_ties() -> None:
    movement = np.array([0.1, 0.2], np.float32)
    slots = np.array([[0, 0, 0]] * 6 + [[1, 1, 1]] * 4, np.int32)

    skipper, keep = run_check(
        movement, slots, SkipRule(criterion="stale", movement="net", target_drop=0.3, threshold=0.15)
    )

    assert keep.tolist() == [False] * 6 + [True] * 4
    assert skipper.threshold == 0.15


def test_untouched_rows_are_never_dropped_and_the_shortfall_is_made_up_later() -> None:
    rule = SkipRule(criterion="stale", movement="net", target_drop=0.4)
    skipper = Skipper(rule)
    rng = np.random.default_rng(0)
    slots = np.repeat(np.arange(10, dtype=np.int32)[:, None], TABLES, axis=1)
    untouched = np.full(10, np.inf, np.float32)
    untouched[0] = 0.1
    skipper.check(step=1, movement=untouched)
    first, _ = skipper.select(hot_samples(slots), None, rng=rng, score=lambda s: s.y)
    skipper.check(step=2, movement=np.linspace(0.1, 1, 10).astype(np.float32))
    second, _ = skipper.select(hot_samples(slots), None, rng=rng, score=lambda s: s.y)

    assert first.keep.tolist() == [False] + [True] * 9
    assert second.keep.sum() == 3  # 0.4 of both rounds is 8, and 1 went in the first
