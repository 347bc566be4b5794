from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from slipstream.training.skipping.staleness import PADDING, UNTOUCHED
from slipstream.training.skipping.trackers import MovementTracker, PullTracker, pulls_of_lookups

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


def test_padding_has_no_movement_whether_it_was_looked_up_or_not():
    tracker = MovementTracker(torch.zeros(4, 2), padding_slots=np.array([1, 3]))
    tracker.open_window()
    look_up(tracker, [0, 1])
    assert tracker.close_window().tolist() == pytest.approx([0, PADDING, UNTOUCHED, PADDING], nan_ok=True)


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

    of_batch = torch.autograd.grad((losses() * (1 if weights is None else weights)).sum() / 8, rows)[0]
    found = pulls_of_lookups(of_batch.flatten(end_dim=1), labels, weights, batch_size=8)

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


def test_a_row_that_stands_still_between_its_labels_is_at_rest_by_net_movement_alone():
    rows = torch.zeros(2, 1)
    net, per_label = MovementTracker(rows), PullTracker(2, device=torch.device("cpu"))
    for tracker in (net, per_label):
        tracker.open_window()
    for label, gradient in [(0.0, 1.0), (1.0, -1.0)] * 4:  # row 0 swings to and fro, row 1 hardly moves
        gradients = torch.tensor([[gradient], [0.01]])
        rows -= gradients
        pulls_of_step = pulls_of_lookups(gradients, torch.tensor([label]), None, batch_size=1)
        for tracker in (net, per_label):
            tracker.observe(torch.tensor([0, 1]), lambda pulls=pulls_of_step: pulls)
    moved = net.close_window()
    assert moved[0] < moved[1]
    pulls = per_label.close_window()
    assert (pulls[:, 0] > 10 * pulls[:, 1]).all()
