from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_samples, sample_numbers

from slipstream.embedding.tiers.lookahead import Batch
from slipstream.io.samples import Samples
from slipstream.training.order.batches import BatchMaker
from slipstream.training.order.rounds import plan_rounds

_SIZES = {"batch_size": st.integers(1, 7), "segment_steps": st.integers(1, 9), "round_samples": st.integers(1, 40)}


def numbers_of(batch: Batch) -> list[int]:
    return batch.dense[:, 0].astype(int).tolist()


def run_epoch(num_hot: int, num_cold: int, order: str, seed: int, **sizes: int) -> list[Batch]:
    """All batches of an epoch; hot samples are numbered from 0, cold ones after them."""
    hot = make_samples(np.zeros((num_hot, 2), int))
    cold = make_samples(np.ones((num_cold, 2), int), start=num_hot)
    maker = BatchMaker(batch_size=sizes["batch_size"], order=order)
    rng = np.random.default_rng(seed)
    batches: list[Batch] = []
    at_hot = at_cold = 0
    for part in plan_rounds(num_hot, num_cold, **sizes):
        pieces: list[Samples | None] = []
        for samples, start, count in ((hot, at_hot, part.num_hot), (cold, at_cold, part.num_cold)):
            pieces.append(samples.take(slice(start, start + count)) if count else None)
        at_hot, at_cold = at_hot + part.num_hot, at_cold + part.num_cold
        batches += maker.make(*pieces, rng=rng, last=at_hot + at_cold == num_hot + num_cold)
    return batches


@given(num_hot=st.integers(0, 200), num_cold=st.integers(0, 200), **_SIZES)
def test_rounds_take_every_sample_in_the_same_proportion(
    num_hot: int, num_cold: int, batch_size: int, segment_steps: int, round_samples: int
):
    total = num_hot + num_cold
    rounds = list(
        plan_rounds(num_hot, num_cold, batch_size=batch_size, segment_steps=segment_steps, round_samples=round_samples)
    )
    assert sum(part.num_hot for part in rounds) == num_hot
    assert sum(part.num_cold for part in rounds) == num_cold
    taken = taken_hot = 0
    ends = []
    for part in rounds:
        assert part.num_hot >= 0 and part.num_cold >= 0
        assert 0 < part.num_hot + part.num_cold <= round_samples
        taken, taken_hot = taken + part.num_hot + part.num_cold, taken_hot + part.num_hot
        assert abs(taken_hot - num_hot * taken / total) <= 0.5 + 1e-9
        if part.ends_segment:
            ends.append(taken)
    per_segment = batch_size * segment_steps
    assert ends == ([*range(per_segment, total, per_segment), total] if total else [])


@pytest.mark.parametrize("order", ["interleaved", "mixed"])
@given(num_hot=st.integers(0, 60), num_cold=st.integers(0, 60), seed=st.integers(0, 3), **_SIZES)
def test_an_epoch_trains_on_every_sample_once(order: str, num_hot: int, num_cold: int, seed: int, **sizes: int):
    batches = run_epoch(num_hot, num_cold, order, seed, **sizes)
    assert sorted(number for batch in batches for number in numbers_of(batch)) == list(range(num_hot + num_cold))


@given(num_hot=st.integers(0, 60), num_cold=st.integers(0, 60), seed=st.integers(0, 3), **_SIZES)
def test_interleaved_batches_are_pure_and_full_but_for_the_last_of_a_kind(
    num_hot: int, num_cold: int, seed: int, **sizes: int
):
    batches = run_epoch(num_hot, num_cold, "interleaved", seed, **sizes)
    for is_hot, total in ((True, num_hot), (False, num_cold)):
        lengths = [len(batch) for batch in batches if batch.is_hot is is_hot]
        assert sum(lengths) == total
        assert all(length == sizes["batch_size"] for length in lengths[:-1])
    for batch in batches:
        assert {number < num_hot for number in numbers_of(batch)} == {batch.is_hot}
        assert (batch.slots == (0 if batch.is_hot else 1)).all()


@given(num_hot=st.integers(0, 60), num_cold=st.integers(0, 60), seed=st.integers(0, 3), **_SIZES)
def test_mixed_batches_are_full_but_for_the_last(num_hot: int, num_cold: int, seed: int, **sizes: int):
    lengths = [len(batch) for batch in run_epoch(num_hot, num_cold, "mixed", seed, **sizes)]
    assert all(length == sizes["batch_size"] for length in lengths[:-1])


@pytest.mark.parametrize("order", ["interleaved", "mixed"])
def test_the_order_depends_on_the_seed_alone(order: str):
    sizes = {"batch_size": 5, "segment_steps": 10, "round_samples": 1000}
    first, again, other = ([*map(numbers_of, run_epoch(100, 300, order, seed, **sizes))] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_hot_and_cold_batches_take_turns():
    batches = run_epoch(200, 200, "interleaved", 0, batch_size=4, segment_steps=100, round_samples=1000)
    kinds = [batch.is_hot for batch in batches]
    assert 30 < sum(a != b for a, b in pairwise(kinds)) < 70


@pytest.mark.parametrize("order", ["interleaved", "mixed"])
def test_weights_stay_with_their_samples(order: str):
    samples = make_samples(np.zeros((23, 2), int))
    weighted = Samples(X_int=samples.X_int, X_cat=samples.X_cat, y=samples.y, weights=samples.X_int[:, 0] * 2)
    for batch in BatchMaker(batch_size=4, order=order).make(weighted, None, rng=np.random.default_rng(0), last=True):
        assert batch.weights is not None
        assert batch.weights.tolist() == (batch.dense[:, 0] * 2).tolist()
    assert sample_numbers(weighted)[-1] == 22


@given(
    num_hot=st.integers(0, 60),
    num_cold=st.integers(0, 60),
    order=st.sampled_from(["interleaved", "mixed"]),
    smaller_by=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    is_weighted=st.booleans(),
)
def test_batches_are_smaller_where_samples_are_dropped_and_stand_for_what_their_weights_say(
    num_hot: int, num_cold: int, order: str, smaller_by: float, is_weighted: bool
):
    size, total = 8, num_hot + num_cold
    hot = make_samples(np.zeros((num_hot, 2), int)) if num_hot else None
    cold = make_samples(np.ones((num_cold, 2), int), start=num_hot) if num_cold else None
    if is_weighted and hot is not None:
        hot = dataclasses.replace(hot, weights=np.full(num_hot, 2.0, np.float32))
    maker = BatchMaker(batch_size=size, order=order, smaller_by=smaller_by)
    of_one_kind = order == "interleaved"
    thinned = (1.0, 0.0) if of_one_kind else (num_hot / max(total, 1), 0.0)

    batches = list(maker.make(hot, cold, rng=np.random.default_rng(0), last=True, thinned=thinned))

    assert sorted(number for batch in batches for number in numbers_of(batch)) == list(range(total))
    for is_hot in (True, False):
        of_kind = [batch for batch in batches if batch.is_hot == is_hot]
        thin = thinned[0] if is_hot or not of_one_kind else thinned[1]
        full = round(size * (1 - smaller_by * thin))
        assert all(len(batch) == full for batch in of_kind[:-1]) and all(len(batch) <= full for batch in of_kind)
        for batch in of_kind:
            assert batch.divisor == (full if full < size and batch.weights is None else None)


@pytest.mark.parametrize("given", [None, 2.0])
def test_a_clicked_sample_counts_as_many_beside_the_weight_that_it_has(given: float | None):
    samples = make_samples(np.zeros((20, 2), int))
    if given is not None:
        samples = dataclasses.replace(samples, weights=np.full(20, given, np.float32))
    maker = BatchMaker(batch_size=6, order="interleaved", positive_weight=3.0)
    batches = list(maker.make(samples, None, rng=np.random.default_rng(0), last=True))
    for batch in batches:
        assert batch.weights is not None and batch.divisor is None
        assert batch.weights.tolist() == [(given or 1.0) * (3.0 if label else 1.0) for label in batch.labels]
    assert {float(label) for batch in batches for label in batch.labels} == {0.0, 1.0}
