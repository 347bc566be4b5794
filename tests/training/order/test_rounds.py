"""Rounds are prepared beside training where the rule allows it, and are the same as when they are prepared in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event
from typing import Any

import numpy as np
import pytest
from strategies import make_samples

from slipstream.io.samples import Samples
from slipstream.training.order.rounds import OpenStreams, Position, PreparedRound, RoundPreparer
from slipstream.training.order.schedule import Schedule
from slipstream.training.order.stream import SampleStream
from slipstream.training.skipping.criterion import SkipRule
from slipstream.training.skipping.skipper import Skipper

NUM_ROWS, NUM_DENSE = 60, 3
SCHEDULE = Schedule(epochs=2, batch_size=16, order="interleaved", segment_steps=12, round_samples=100, seed=3)
RULES = {
    "none": SkipRule(criterion="none", target_drop=0.3),
    "random": SkipRule(criterion="random", target_drop=0.3, scope="all"),
    "negative": SkipRule(criterion="negative", target_drop=0.3, scope="all"),
    "importance": SkipRule(
        criterion="importance", target_drop=0.3, scope="all", num_rows=NUM_ROWS, num_dense=NUM_DENSE
    ),
    "importance by the model": SkipRule(criterion="importance", target_drop=0.3, scope="all"),
    "stale": SkipRule(criterion="stale", target_drop=0.3),
    "stale by net movement": SkipRule(criterion="stale", movement="net", target_drop=0.3),
}


@pytest.fixture
def open_streams() -> Iterator[OpenStreams]:
    rng = np.random.default_rng(0)
    groups = {"hot": make_samples(rng.integers(0, 20, (500, 3))), "cold": make_samples(rng.integers(0, 60, (200, 3)))}
    with ThreadPoolExecutor(2) as workers:
        yield lambda epoch: {
            name: SampleStream(
                [lambda group=group: group], [len(group)], seed=(epoch,), window_samples=10**6, workers=workers
            )
            for name, group in groups.items()
        }


def score(samples: Samples) -> np.ndarray:
    return np.full(len(samples), 0.3, np.float32)


def check_where_a_segment_ends(skipper: Skipper, prepared: PreparedRound, *, step: int) -> None:
    if prepared.ends_segment and skipper.criterion.watches_rows:
        shape = NUM_ROWS if skipper.rule.movement == "net" else (2, NUM_ROWS)
        skipper.check(step=step, movement=np.random.default_rng(step).random(shape).astype(np.float32))


def telling(function: Callable[..., Any], events: Sequence[Event]) -> Callable[..., Any]:
    """The function, which sets one event after the other as its calls end."""
    calls = iter(events)

    def call(*args: object, **options: object) -> Any:
        result = function(*args, **options)
        next(calls).set()
        return result

    return call


def train_rounds(rule: SkipRule, open_streams: OpenStreams, position: Position | None = None) -> list[PreparedRound]:
    """All rounds, with a check wherever a segment ends."""
    skipper = Skipper(rule)
    rounds = []
    preparer = RoundPreparer(SCHEDULE, skipper, score=score, position=position or Position())
    for prepared in preparer.run(open_streams):
        rounds.append(prepared)
        check_where_a_segment_ends(skipper, prepared, step=len(rounds))
    return rounds


@pytest.mark.parametrize("name", RULES)
def test_rounds_prepared_ahead_are_those_prepared_in_turn(
    name: str, open_streams: OpenStreams, monkeypatch: pytest.MonkeyPatch
):
    ahead = train_rounds(RULES[name], open_streams)
    monkeypatch.setattr(Skipper, "decides_ahead", lambda self, **_: False)
    in_turn = train_rounds(RULES[name], open_streams)

    assert [(r.epoch, r.index, r.span, r.ends_segment) for r in ahead] == [
        (r.epoch, r.index, r.span, r.ends_segment) for r in in_turn
    ]
    assert len(ahead) == 16
    assert any(r.num_dropped() for r in ahead) == (name != "none")
    for one, other in zip(ahead, in_turn, strict=True):
        assert len(one.batches) == len(other.batches)
        for mine, theirs in zip(one.batches, other.batches, strict=True):
            assert np.array_equal(mine.slots, theirs.slots)
            assert np.array_equal(mine.labels, theirs.labels)
            assert (mine.weights is None) == (theirs.weights is None)
            assert mine.weights is None or np.array_equal(mine.weights, theirs.weights)


@pytest.mark.parametrize("name", RULES)
def test_a_segment_without_dropping_comes_first(name: str, open_streams: OpenStreams):
    rounds = train_rounds(RULES[name], open_streams)
    ends = [index for index, r in enumerate(rounds) if r.ends_segment]
    assert not any(r.num_dropped() for r in rounds[: ends[0] + 1])
    if name != "none":
        assert all(r.num_dropped() for r in rounds[ends[0] + 1 :])


@pytest.mark.parametrize("name", RULES)
def test_the_next_round_is_decided_while_this_one_trains_unless_the_rule_waits_for_it(
    name: str, open_streams: OpenStreams, monkeypatch: pytest.MonkeyPatch
):
    decided = [Event() for _ in range(16)]
    monkeypatch.setattr(Skipper, "select", telling(Skipper.select, decided))
    skipper = Skipper(RULES[name])
    preparer = RoundPreparer(SCHEDULE, skipper, score=score, position=Position())
    with closing(preparer.run(open_streams)) as rounds:
        for index, prepared in enumerate(rounds):
            if index == 15:
                assert preparer.wait() is None
                break
            waits = name == "importance by the model" or (name.startswith("stale") and prepared.ends_segment)
            if waits:
                assert preparer.wait() is None
                assert not decided[index + 1].is_set()
            else:
                assert decided[index + 1].wait(timeout=60)
                assert preparer.wait() is not None
            check_where_a_segment_ends(skipper, prepared, step=index)


@pytest.mark.parametrize("name", RULES)
def test_samples_are_taken_while_the_round_before_trains_also_where_the_decision_waits(
    name: str, open_streams: OpenStreams, monkeypatch: pytest.MonkeyPatch
):
    taken = [Event() for _ in range(16)]
    monkeypatch.setattr(RoundPreparer, "_take", telling(RoundPreparer._take, taken))
    skipper = Skipper(RULES[name])
    preparer = RoundPreparer(SCHEDULE, skipper, score=score, position=Position())
    with closing(preparer.run(open_streams)) as rounds:
        for index, prepared in enumerate(rounds):
            assert index == 15 or taken[index + 1].wait(timeout=60)
            check_where_a_segment_ends(skipper, prepared, step=index)


def test_what_is_picked_already_is_not_decided_again(open_streams: OpenStreams, monkeypatch: pytest.MonkeyPatch):
    whole = train_rounds(RULES["importance"], open_streams)
    at = 5
    position = Position(
        epoch=whole[at].epoch,
        round_index=whole[at].index,
        waiting=whole[at].waiting,
        picked=whole[at].picked,
        picked_ahead=whole[at + 1].picked,
    )
    preparer = RoundPreparer(SCHEDULE, Skipper(RULES["importance"]), score=score, position=position)
    monkeypatch.setattr(RoundPreparer, "_pick", lambda *_: pytest.fail("it was decided already"))
    with closing(preparer.run(open_streams)) as rounds:
        for expected in whole[at : at + 2]:
            monkeypatch.setattr(Skipper, "decides_ahead", lambda self, **_: False)
            found = next(rounds)
            assert (found.epoch, found.index) == (expected.epoch, expected.index)
            for mine, theirs in zip(found.batches, expected.batches, strict=True):
                assert np.array_equal(mine.slots, theirs.slots)


def test_resuming_reads_no_window_that_was_passed():
    read: list[tuple[int, str, int]] = []

    def open_shards(epoch: int, workers: ThreadPoolExecutor) -> dict[str, SampleStream]:
        def loader(name: str, index: int) -> Callable[[], Samples]:
            def load() -> Samples:
                read.append((epoch, name, index))
                return make_samples(np.zeros((50, 3), int), start=50 * index)

            return load

        return {
            name: SampleStream(
                [loader(name, index) for index in range(num_shards)],
                [50] * num_shards,
                seed=(epoch,),
                window_samples=50,
                workers=workers,
            )
            for name, num_shards in (("hot", 10), ("cold", 4))
        }

    with ThreadPoolExecutor(2) as workers:
        whole = train_rounds(RULES["none"], lambda epoch: open_shards(epoch, workers))
        assert len(read) == len(set(read)) == 2 * 14
        at = len(whole) - 3
        position = Position(
            epoch=whole[at].epoch, round_index=whole[at].index, waiting=whole[at].waiting, picked=whole[at].picked
        )
        read.clear()
        rest = train_rounds(RULES["none"], lambda epoch: open_shards(epoch, workers), position)
    assert [len(one.batches) for one in rest] == [len(one.batches) for one in whole[at:]]
    for one, other in zip(rest, whole[at:], strict=True):
        for mine, theirs in zip(one.batches, other.batches, strict=True):
            assert np.array_equal(mine.dense, theirs.dense)
    assert {epoch for epoch, _, _ in read} == {1}
    assert len(read) < 14 / 2
