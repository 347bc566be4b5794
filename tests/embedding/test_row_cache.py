"""The row cache against a dictionary that does the same one row at a time, and the properties it promises."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.embedding.row_cache import CachePlan, RowCache
from slipstream.errors import CapacityError

POLICIES = ["lfu", "rank"]


@dataclass
class NaiveCache:
    """The same rules, one row at a time: the lowest score leaves, ties by the larger row number."""

    capacity: int
    policy: str
    row_counts: list[int] | None = None
    ageing_lookups: float = 0
    lookups: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    recent: list[set[int]] = field(default_factory=list)

    def admit(self, rows: list[int], keep_admits: int = 0) -> tuple[set[int], set[int], set[int]]:
        wanted = set(rows)
        kept = wanted.union(*self.recent[len(self.recent) - keep_admits :])
        misses = wanted - self.counts.keys()
        num_victims = max(0, len(misses) - (self.capacity - len(self.counts)))
        candidates = sorted((row for row in self.counts if row not in kept), key=self._score)
        if len(candidates) < num_victims:
            raise CapacityError("does not fit")
        victims = set(candidates[:num_victims])
        for row in victims:
            del self.counts[row]
        written = victims & self.dirty
        self.dirty -= victims
        for row in misses:
            self.counts[row] = 0
        for row in rows:
            self.counts[row] += 1
        self.recent.append(wanted)
        self.lookups += len(rows)
        if self.ageing_lookups and self.lookups >= self.ageing_lookups * self.capacity:
            self.lookups = 0
            self.counts = {row: count // 2 for row, count in self.counts.items()}
        return misses, victims, written

    def _score(self, row: int) -> tuple[int, int]:
        if self.policy == "lfu":
            return self.counts[row], -row
        return (0 if self.row_counts is None else self.row_counts[row]), -row


def check_maps(cache: RowCache) -> None:
    """The two maps are inverse to each other and nothing else is resident."""
    rows = cache.resident_rows()
    positions, is_missing = cache.lookup(rows)
    assert np.array_equal(positions, np.arange(rows.size)) and not is_missing.any()
    all_positions, all_missing = cache.lookup(np.arange(cache.num_rows))
    assert np.count_nonzero(~all_missing) == rows.size <= cache.capacity
    assert np.array_equal(all_positions < 0, all_missing)


def check_plan(cache: RowCache, plan: CachePlan, rows: list[int]) -> None:
    assert plan.positions.dtype == np.int32 and plan.evict_positions.dtype == np.int32
    assert cache.resident_rows()[plan.positions].tolist() == rows
    assert np.array_equal(plan.distinct_positions[plan.inverse], plan.positions)
    assert len(set(plan.distinct_positions.tolist())) == plan.distinct_positions.size == len(set(rows))
    assert plan.num_hits + plan.num_misses == len(set(rows))
    assert cache.resident_rows()[plan.fetch_positions].tolist() == plan.fetch_rows.tolist()
    assert set(plan.evict_positions.tolist()) <= set(plan.fetch_positions.tolist())


@st.composite
def scripts(draw: st.DrawFn) -> dict[str, Any]:
    num_rows = draw(st.integers(1, 40))
    capacity = draw(st.integers(1, num_rows))
    policy = draw(st.sampled_from(POLICIES))
    counts = draw(st.none() | st.lists(st.integers(0, 5), min_size=num_rows, max_size=num_rows))
    row = st.integers(0, num_rows - 1)
    step = st.tuples(st.lists(row, max_size=capacity + 2), st.integers(0, 2), st.booleans())
    return {
        "num_rows": num_rows,
        "capacity": capacity,
        "policy": policy,
        "counts": counts,
        "ageing": draw(st.sampled_from([0, 0.5, 2])),
        "warm": draw(st.lists(row, unique=True, max_size=num_rows)),
        "steps": draw(st.lists(step, max_size=40)),
    }


@settings(max_examples=300, deadline=None)
@given(scripts())
def test_any_script_gives_the_same_hits_victims_and_write_backs_as_a_dictionary(
    script: dict[str, Any],
) -> None:
    is_rank = script["policy"] == "rank"
    cache = RowCache(
        script["num_rows"],
        script["capacity"],
        policy=script["policy"],
        row_counts=script["counts"] if is_rank else None,
        ageing_lookups=script["ageing"],
    )
    naive = NaiveCache(script["capacity"], script["policy"], script["counts"], script["ageing"])
    starts = None if is_rank or script["counts"] is None else [script["counts"][r] for r in script["warm"]]
    placed, positions = cache.warm(script["warm"], starts)
    assert placed.tolist() == script["warm"][: script["capacity"]]
    assert cache.resident_rows()[positions].tolist() == placed.tolist()
    naive.counts = {int(r): starts[i] if starts else 0 for i, r in enumerate(placed)}
    dirty_written = 0
    for rows, keep, marks_dirty in script["steps"]:
        before = set(cache.resident_rows().tolist())
        keep = min(keep, len(naive.recent))
        try:
            misses, victims, written = naive.admit(rows, keep)
        except CapacityError:
            with pytest.raises(CapacityError, match="expected at most"):
                cache.admit(rows, keep_admits=keep)
            assert set(cache.resident_rows().tolist()) == before
            continue
        plan = cache.admit(rows, keep_admits=keep)
        check_plan(cache, plan, rows)
        assert plan.fetch_rows.tolist() == sorted(misses)
        assert before - set(cache.resident_rows().tolist()) == victims
        assert set(plan.evict_rows.tolist()) == written
        assert plan.num_hits == len(set(rows)) - len(misses)
        dirty_written += len(written)
        if marks_dirty:
            cache.mark_dirty(plan.positions)
            naive.dirty |= set(rows)
        check_maps(cache)
    rows_left, positions_left = cache.take_dirty()
    assert set(rows_left.tolist()) == naive.dirty
    assert cache.resident_rows()[positions_left].tolist() == rows_left.tolist()
    assert cache.stats.write_backs == dirty_written + len(naive.dirty)
    assert cache.take_dirty()[0].size == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ageing", [0, 2])
def test_a_long_skewed_run_equals_the_dictionary(policy: str, ageing: int) -> None:
    """Long enough for the victim pool to fill, drain and refill many times."""
    rng = np.random.default_rng(5)
    counts = rng.integers(0, 50, 2000) if policy == "rank" else None
    cache = RowCache(2000, 150, policy=policy, row_counts=counts, ageing_lookups=ageing)
    naive = NaiveCache(150, policy, None if counts is None else counts.tolist(), ageing)
    for step in range(400):
        rows = (rng.zipf(1.15, rng.integers(1, 60)) * (1 + step // 100) % 2000).tolist()
        misses, victims, _ = naive.admit(rows)
        before = set(cache.resident_rows().tolist())
        plan = cache.admit(rows)
        assert plan.fetch_rows.tolist() == sorted(misses), step
        assert before - set(cache.resident_rows().tolist()) == victims, step
        check_plan(cache, plan, rows)
    assert cache.stats.evictions > 2000


@pytest.mark.parametrize("starts", [None, [4, 2, 1]])
def test_the_published_lfu_script_gives_its_hit_counts(starts: list[int] | None) -> None:
    """N = 5, S = 3, all positions warm; the last six hit counts are known: row 1 leaves, then row 3."""
    cache = RowCache(5, 3, policy="lfu", ageing_lookups=0)
    cache.warm([0, 1, 2], starts)
    learning = [[2], [1, 2], [0, 2], *[[0, 1, 2]] * 4, *[[0, 2]] * 4, *[[0]] * 4, [0, 1, 2]]
    for rows in learning:
        cache.admit(rows)
    checks = [[0, 1, 2], [3], [2], [4], [2], [0]]
    assert [cache.admit(rows).num_hits for rows in checks] == [3, 0, 1, 0, 1, 1]
    assert sorted(cache.resident_rows().tolist()) == [0, 2, 4]


def test_rank_evicts_the_row_rarest_in_the_data() -> None:
    cache = RowCache(6, 3, policy="rank", row_counts=[9, 1, 5, 7, 0, 3])
    cache.admit([0, 1, 2])
    cache.admit([3])
    assert sorted(cache.resident_rows().tolist()) == [0, 2, 3]
    cache.admit([4])
    assert sorted(cache.resident_rows().tolist()) == [0, 3, 4]
    ranked = RowCache(6, 3, policy="rank")
    ranked.admit([0, 5, 2])
    ranked.admit([1])
    assert sorted(ranked.resident_rows().tolist()) == [0, 1, 2]


def test_ageing_lets_a_row_leave_that_was_popular_once() -> None:
    def resident_after(ageing_lookups: float) -> set[int]:
        cache = RowCache(10, 2, policy="lfu", ageing_lookups=ageing_lookups)
        cache.admit([0] * 50)
        for _ in range(20):
            cache.admit([1])
        for _ in range(20):
            cache.admit([2])
            cache.admit([3])
        return set(cache.resident_rows().tolist())

    assert 0 in resident_after(0)
    assert resident_after(4.0) == {2, 3}


def test_a_request_larger_than_the_cache_names_both_numbers_and_changes_nothing() -> None:
    cache = RowCache(100, 4)
    cache.admit([1, 2, 3])
    cache.mark_dirty([0])
    stats = repr(cache.stats)
    with pytest.raises(CapacityError, match=r"at most 4 rows.*found 5 distinct") as raised:
        cache.admit([1, 10, 11, 12, 13, 13])
    assert raised.value.hint is not None and "at least 5" in raised.value.hint
    assert cache.resident_rows().tolist() == [1, 2, 3] and repr(cache.stats) == stats
    assert cache.admit([10, 11, 12, 13]).evict_rows.tolist() == [1]


def test_a_failed_request_does_not_change_what_is_kept() -> None:
    cache = RowCache(100, 3)
    cache.admit([1, 2])
    with pytest.raises(CapacityError):
        cache.admit([2, 10, 11], keep_admits=1)
    assert cache.admit([3, 4], keep_admits=0).num_misses == 2  # row 2 was free to go
    with pytest.raises(CapacityError, match="found 4 distinct"):
        cache.admit([5, 6], keep_admits=1)


def test_the_index_takes_four_bytes_a_row_and_a_bounded_number_a_position() -> None:
    cache = RowCache(1_000_000, 1_000)
    rng = np.random.default_rng(0)
    for _ in range(20):
        cache.admit(rng.integers(0, 1_000_000, 700))
    assert cache.index_bytes <= 4 * 1_000_000 + 40 * 1_000


def test_counters_tell_rows_from_lookups() -> None:
    cache = RowCache(10, 4)
    cache.admit([1, 1, 1, 2])
    cache.admit([1, 1, 3])
    assert (cache.stats.hits, cache.stats.misses) == (1, 3)
    assert (cache.stats.hit_lookups, cache.stats.miss_lookups) == (2, 5)
    assert cache.stats.hit_ratio == pytest.approx(2 / 7)
    assert RowCache(3, 1).stats.hit_ratio == 0.0


def test_lookup_changes_nothing() -> None:
    cache = RowCache(10, 3)
    cache.admit([4, 5])
    stats = repr(cache.stats)
    positions, is_missing = cache.lookup([[5, 9], [4, 5]])
    assert positions.shape == (2, 2) and is_missing.tolist() == [[False, True], [False, False]]
    assert positions[0, 1] == -1 and cache.resident_rows()[positions[~is_missing]].tolist() == [5, 4, 5]
    assert repr(cache.stats) == stats and cache.resident_rows().tolist() == [4, 5]


def test_positions_keep_the_shape_of_the_request() -> None:
    plan = RowCache(10, 6).admit(np.array([[1, 2], [2, 3]], np.int32))
    assert plan.positions.shape == (2, 2) and plan.inverse.shape == (4,)
    assert RowCache(10, 6).admit([]).positions.shape == (0,)


def test_dropping_all_leaves_an_empty_cache_that_works() -> None:
    cache = RowCache(20, 3)
    for rows in ([1, 2, 3], [4, 5], [6]):
        cache.mark_dirty(cache.admit(rows).positions)
    cache.drop_all()
    assert cache.num_resident == 0 and cache.lookup(np.arange(20))[1].all()
    assert cache.take_dirty()[0].size == 0
    assert cache.admit([7, 8, 9]).fetch_rows.tolist() == [7, 8, 9]
    assert cache.admit([1]).evict_rows.size == 0


@given(
    st.integers(1, 12),
    st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=8),
)
def test_as_many_leading_batches_fit_as_a_plain_loop_finds(capacity: int, batches: list[list[int]]) -> None:
    cache = RowCache(31, capacity)
    expected, union = 0, set()
    for batch in batches:
        union |= set(batch)
        if len(union) > capacity:
            break
        expected += 1
    cache.warm(range(0, 31, 3))
    fitting = cache.num_fitting(batches)
    assert fitting == expected
    check_maps(cache)
    cache.admit([row for batch in batches[:fitting] for row in batch])


def test_rows_to_keep_leave_less_room_for_batches() -> None:
    cache = RowCache(30, 4)
    cache.admit([1, 2])
    assert cache.num_fitting([[5, 6], [7]], keep_admits=1) == 1
    assert cache.num_fitting([[5, 6], [7]]) == 2
    cache.admit([3])
    assert cache.num_fitting([[5, 6], [7]], keep_admits=1) == 2, "rows of the admit before may go"
    assert cache.num_fitting([[5, 6], [7]], keep_admits=2) == 0
    with pytest.raises(ValueError, match="expected rows"):
        cache.num_fitting([[5, 6], [77]])
    check_maps(cache)


def test_warming_leaves_out_what_is_there_and_what_has_no_room() -> None:
    cache = RowCache(10, 3)
    cache.admit([4])
    rows, positions = cache.warm([4, 7, 1, 2])
    assert rows.tolist() == [7, 1] and positions.tolist() == [1, 2]
    with pytest.raises(ValueError, match="duplicates"):
        cache.warm([1, 1])


@pytest.mark.parametrize("rows", [[-1], [10], [3, 12], [0.5]])
def test_rows_outside_the_table_are_refused(rows: list[float]) -> None:
    cache = RowCache(10, 3)
    for call in (cache.admit, cache.lookup, cache.warm):
        with pytest.raises(ValueError, match="expected"):
            call(rows)
    assert cache.num_resident == 0


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 0},
        {"capacity": 11},
        {"policy": "lru"},
        {"ageing_lookups": -1},
        {"policy": "lfu", "row_counts": [1] * 10},
        {"policy": "rank", "row_counts": [1] * 9},
        {"policy": "rank", "row_counts": [-1] * 10},
        {"policy": "rank", "row_counts": [0.5] * 10},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"row_counts|expected"):
        RowCache(**{"num_rows": 10, "capacity": 3, **options})


def test_announced_lookups_count_once_unless_a_row_has_left() -> None:
    cache = RowCache(10, 3)
    cache.admit([1, 2, 2])
    stats = repr(cache.stats)
    assert cache.admit([2, 2], is_announced=True).num_hits == 1
    assert repr(cache.stats) == stats
    cache.admit([5, 6])  # row 1 had one lookup, row 2 two
    assert cache.admit([1], is_announced=True).num_misses == 1
    assert cache.stats.misses == 5


@pytest.mark.parametrize("policy", ["lfu", "rank"])
@given(
    requests=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12),
    ageing=st.sampled_from([0.0, 2.0]),
)
def test_rows_with_their_numbers_of_lookups_equal_repeated_rows(policy: str, requests: list[list[int]], ageing: float):
    options = {"policy": policy, "ageing_lookups": ageing}
    counted, repeated = (RowCache(10, 10 if policy == "rank" else 8, **options) for _ in range(2))  # type: ignore[arg-type]
    for request in requests:
        if len(set(request)) > repeated.capacity:
            continue
        rows, lookups = np.unique(request, return_counts=True)
        repeated.admit(request)
        counted.admit(rows, lookups=lookups)
        assert counted.resident_rows().tolist() == repeated.resident_rows().tolist()
        assert counted.stats == repeated.stats
