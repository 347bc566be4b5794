from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.training.skipping.staleness import (
    UNTOUCHED,
    MovementTracker,
    PullTracker,
    find_threshold,
    pulls_of_lookups,
    sample_movement,
    sample_pull,
)

_MOVES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, UNTOUCHED]), st.floats(0, 4, width=32))


@st.composite
def hot_samples(draw: st.DrawFn):
    """(movement of each hot row, slots of hot samples), with ties, zeros and untouched rows."""
    movement = np.array(draw(st.lists(_MOVES, min_size=1, max_size=12)), np.float32)
    num_samples, num_tables = draw(st.integers(1, 25)), draw(st.integers(1, 6))
    flat = draw(
        st.lists(
            st.integers(0, len(movement) - 1), min_size=num_samples * num_tables, max_size=num_samples * num_tables
        )
    )
    return movement, np.array(flat).reshape(num_samples, num_tables)


def plain_is_dropped(movement: np.ndarray, slots: np.ndarray, *, alpha: float, threshold: float) -> list[bool]:
    """The definition: at least a share alpha of the lookups is stale."""
    return [sum(movement[slot] < threshold for slot in sample) >= alpha * len(sample) - 1e-9 for sample in slots]


@given(hot_samples(), st.sampled_from([0.01, 0.25, 0.5, 2 / 3, 0.75, 1.0]), st.floats(0, 5, width=32))
def test_a_sample_is_dropped_when_enough_of_its_lookups_are_stale(drawn, alpha: float, threshold: float):
    movement, slots = drawn
    statistic = sample_movement(movement, slots, alpha=alpha)
    expected = plain_is_dropped(movement, slots, alpha=alpha, threshold=np.float32(threshold))
    assert (statistic < np.float32(threshold)).tolist() == expected


@given(hot_samples(), st.floats(0.01, 1))
def test_a_threshold_of_zero_drops_none(drawn, alpha: float):
    assert not (sample_movement(*drawn, alpha=alpha) < 0).any()


@given(hot_samples(), st.floats(0.01, 1), st.lists(st.floats(0, 5), min_size=2, max_size=2))
def test_a_larger_threshold_takes_nothing_back(drawn, alpha: float, thresholds: list[float]):
    statistic = sample_movement(*drawn, alpha=alpha)
    low, high = sorted(thresholds)
    assert not ((statistic < low) & ~(statistic < high)).any()


@given(hot_samples(), st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_asking_for_more_stale_lookups_drops_no_more(drawn, alphas: list[float]):
    lenient, strict = (sample_movement(*drawn, alpha=alpha) for alpha in sorted(alphas))
    assert (lenient <= strict).all()


@given(st.integers(1, 6), st.integers(1, 20))
def test_a_sample_with_untouched_rows_alone_is_never_dropped(num_tables: int, num_samples: int):
    movement = np.array([UNTOUCHED, 0.0], np.float32)
    statistic = sample_movement(movement, np.zeros((num_samples, num_tables), int), alpha=0.01)
    assert np.isinf(statistic).all()
    assert find_threshold(statistic, target_drop=0.9) == 0.0


def nearest_count(statistic: np.ndarray, wanted: int) -> int:
    """The count nearest to the one wanted over every threshold there is, by trying them all."""
    finite = sorted(set(statistic[np.isfinite(statistic)].tolist()))
    candidates = [0.0, *finite, *(float(np.nextafter(np.float32(v), np.float32(np.inf))) for v in finite)]
    counts = {int((statistic < threshold).sum()) for threshold in candidates}
    return min(abs(count - wanted) for count in counts)


@given(st.lists(_MOVES, min_size=1, max_size=40), st.floats(0, 0.999))
def test_the_threshold_drops_the_nearest_share_there_is(statistic: list[float], target_drop: float):
    values = np.array(statistic, np.float32)
    threshold = find_threshold(values, target_drop=target_drop)
    wanted = round(target_drop * len(values))
    dropped = int((values < threshold).sum())
    assert abs(dropped - wanted) == nearest_count(values, wanted)
    assert math.isfinite(threshold)
    assert not np.isinf(values[values < threshold]).any()


@pytest.mark.parametrize("target_drop", [0.05, 0.3, 0.5, 0.9])
def test_the_quantile_agrees_with_a_bisection(rng: np.random.Generator, target_drop: float):
    # the published code searches T; on distinct values both must drop the same samples
    statistic = rng.lognormal(size=5000).astype(np.float32)
    low, high = 0.0, float(statistic.max()) * 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (statistic < middle).mean() < target_drop else (low, middle)
    assert (statistic < find_threshold(statistic, target_drop=target_drop)).tolist() == (statistic < high).tolist()


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("target_drop", [0.1, 0.3, 0.6])
def test_what_is_achieved_is_near_what_was_asked(rng: np.random.Generator, alpha: float, target_drop: float):
    # 26 tables of 150 hot rows, popularity falling as 1/rank; popular rows move most, rare ones are hardly touched
    popularity = 1 / np.arange(1, 151)
    picks = rng.choice(150, size=(40_000, 26), p=popularity / popularity.sum())
    movement = rng.lognormal(size=(26, 150)) * popularity**0.3
    movement[rng.random((26, 150)) < np.linspace(0, 0.02, 150)] = UNTOUCHED
    statistic = sample_movement(movement.astype(np.float32).ravel(), picks + 150 * np.arange(26), alpha=alpha)
    drawn, others = statistic[:20_000], statistic[20_000:]
    threshold = find_threshold(drawn, target_drop=target_drop)
    assert abs((drawn < threshold).mean() - target_drop) < 0.01
    assert abs((others < threshold).mean() - target_drop) < 0.02


# --- net movement --------------------------------------------------------------------------------------------


def look_up(tracker: MovementTracker, rows: list[int]) -> None:
    def never() -> torch.Tensor:
        raise AssertionError("net movement needs no pulls")

    tracker.observe(torch.tensor(rows), never)


def test_movement_is_the_largest_change_of_a_coordinate_and_untouched_rows_have_none():
    rows = torch.zeros(4, 3)
    tracker = MovementTracker(rows)
    tracker.open_window()
    rows[0] += torch.tensor([0.5, -2.0, 1.0])
    rows[3] += 1  # moved, yet nobody looked it up: cannot happen, and would not count
    look_up(tracker, [0, 1, 7])
    assert tracker.close_window().tolist() == [2.0, 0.0, UNTOUCHED, UNTOUCHED]
    assert not tracker.is_open


def test_a_window_forgets_what_came_before_it():
    rows = torch.zeros(2, 1)
    tracker = MovementTracker(rows)
    look_up(tracker, [1])
    tracker.open_window()
    look_up(tracker, [0])
    tracker.close_window()
    rows += 5
    tracker.open_window()
    look_up(tracker, [1])
    assert tracker.close_window().tolist() == [UNTOUCHED, 0.0]


def test_a_window_must_be_open_to_be_closed():
    with pytest.raises(ValueError, match="expected an open window"):
        MovementTracker(torch.zeros(1, 1)).close_window()


def test_an_open_window_survives_a_checkpoint():
    rows = torch.zeros(3, 2)
    tracker = MovementTracker(rows)
    assert tracker.state() == {}
    tracker.open_window()
    look_up(tracker, [2])
    kept = {name: np.array(value) for name, value in tracker.state().items()}
    again = MovementTracker(rows)
    again.restore(kept)
    rows[2] += 3
    assert again.close_window().tolist() == tracker.close_window().tolist() == [UNTOUCHED, UNTOUCHED, 3.0]


# --- movement per label --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_pulls_are_the_lengths_of_each_samples_own_gradient(rng: np.random.Generator, weighted: bool):
    num_samples, num_tables, dim = 5, 3, 4
    rows = torch.randn(num_samples, num_tables, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    direction = torch.randn(num_tables * dim, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])
    weights = torch.tensor(rng.uniform(1, 4, num_samples), dtype=torch.float32) if weighted else None

    def losses() -> torch.Tensor:
        logits = (rows.flatten(start_dim=1) @ direction).tanh()
        return binary_cross_entropy_with_logits(logits, labels, reduction="none")

    of_batch = torch.autograd.grad((losses() * (1 if weights is None else weights)).mean(), rows)[0]
    found = pulls_of_lookups(of_batch.flatten(end_dim=1), labels, weights)

    expected = []
    for sample in range(num_samples):
        alone = torch.autograd.grad(losses()[sample], rows)[0][sample]
        weight = 1.0 if weights is None else float(weights[sample])
        for table in range(num_tables):
            entry = [0.0] * 4
            entry[int(labels[sample])] = weight * float(alone[table].norm())
            entry[2 + int(labels[sample])] = weight
            expected.append(entry)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_pull_is_a_mean_over_the_lookups_of_a_window_by_label():
    tracker = PullTracker(3, device=torch.device("cpu"))

    def observe(rows: list[int], sums: list[list[float]]) -> None:
        tracker.observe(torch.tensor(rows), lambda: torch.tensor(sums))

    observe([0], [[9.0, 9.0, 1.0, 1.0]])  # before the window
    tracker.open_window()
    observe([0, 2], [[1.0, 0.5, 2.0, 1.0], [0.0, 6.0, 0.0, 3.0]])
    observe([0, 3, 8], [[5.0, 0.0, 1.0, 0.0], [7.0, 7.0, 1.0, 1.0], [7.0, 7.0, 1.0, 1.0]])  # 3 and 8 are cold
    assert tracker.close_window().tolist() == [[2.0, 0.0, 0.0], [0.5, 0.0, 2.0]]
    assert not tracker.is_open
    tracker.open_window()
    assert not tracker.close_window().any()
    with pytest.raises(ValueError, match="expected an open window"):
        tracker.close_window()


def test_an_open_window_of_pulls_survives_a_checkpoint():
    first, again = (PullTracker(2, device=torch.device("cpu")) for _ in range(2))
    assert first.state() == {}
    first.open_window()
    first.observe(torch.tensor([1]), lambda: torch.tensor([[1.0, 0.0, 4.0, 0.0]]))
    again.restore({name: np.array(value) for name, value in first.state().items()})
    for tracker in (first, again):
        tracker.observe(torch.tensor([1]), lambda: torch.tensor([[3.0, 0.0, 4.0, 0.0]]))
    assert again.close_window().tolist() == first.close_window().tolist() == [[0.0, 0.5], [0.0, 0.0]]


_PULLS = st.one_of(st.just(0.0), st.floats(0.125, 4, width=16))


@given(st.data(), st.sampled_from([0.01, 0.5, 2 / 3, 1.0]))
def test_a_samples_pull_is_the_mean_of_its_rows_under_its_own_label(data: st.DataObject, alpha: float):
    num_rows, num_samples, num_tables = (data.draw(st.integers(1, limit)) for limit in (6, 12, 5))
    draw = lambda values, size: data.draw(st.lists(values, min_size=size, max_size=size))  # noqa: E731
    pulls = np.array([draw(_PULLS, num_rows) for _ in range(2)], np.float32)
    slots = np.array([draw(st.integers(0, num_rows - 1), num_tables) for _ in range(num_samples)])
    labels = np.array(draw(st.integers(0, 1), num_samples), np.float32)

    found = sample_pull(pulls, slots, labels, alpha=alpha)

    for sample, label, statistic in zip(slots, labels, found, strict=True):
        known = sorted(float(pulls[int(label), row]) for row in sample if pulls[int(label), row] > 0)
        least = known[: math.ceil(alpha * len(known) - 1e-9)]
        assert statistic == pytest.approx(sum(least) / len(least) if least else UNTOUCHED, rel=1e-5)


def test_a_row_that_stands_still_between_its_labels_is_at_rest_by_net_movement_alone():
    rows = torch.zeros(2, 1)
    net, per_label = MovementTracker(rows), PullTracker(2, device=torch.device("cpu"))
    for tracker in (net, per_label):
        tracker.open_window()
    for label, gradient in [(0.0, 1.0), (1.0, -1.0)] * 4:  # row 0 swings to and fro, row 1 hardly moves
        gradients = torch.tensor([[gradient], [0.01]])
        rows -= gradients
        pulls_of_step = pulls_of_lookups(gradients, torch.tensor([label]), None)
        for tracker in (net, per_label):
            tracker.observe(torch.tensor([0, 1]), lambda pulls=pulls_of_step: pulls)
    moved = net.close_window()
    assert moved[0] < moved[1]
    pulls = per_label.close_window()
    assert (pulls[:, 0] > 10 * pulls[:, 1]).all()
