"""CachedEmbeddingBag against `nn.EmbeddingBag`, at cache sizes where every step evicts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slipstream.embedding.cached.bag import CachedEmbeddingBag
from slipstream.errors import CapacityError

N, D = 60, 5
SMALL = 0.2  # 12 positions: less than two batches need
MODES = ["sum", "mean", "max"]
Batch = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_batches(count: int, *, seed: int = 0, weighted: bool = False, max_rows: int = 9) -> list[Batch]:
    """Ragged batches of five bags, some empty, over at most `max_rows` distinct rows each."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        lengths = rng.integers(0, 6, 5)
        rows = rng.choice(rng.choice(N, max_rows, replace=False), lengths.sum())
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)[:-1]]))
        weights = torch.from_numpy(rng.standard_normal(rows.size).astype(np.float32)) if weighted else None
        batches.append((torch.from_numpy(rows), offsets, weights))
    return batches


def pair(**options: Any) -> tuple[CachedEmbeddingBag, nn.EmbeddingBag]:
    """A cached bag and a plain one that start alike."""
    table = torch.randn(N, D)
    shared = {name: options[name] for name in ("mode", "padding_idx", "include_last_offset") if name in options}
    is_sparse = options.get("sparse", options.get("optimizer") is not None and options.get("mode") != "max")
    plain = nn.EmbeddingBag(N, D, _weight=table.clone(), sparse=is_sparse, **shared)
    return CachedEmbeddingBag(N, D, _weight=table.clone(), **{"cache_ratio": SMALL, **options}), plain


def train(
    cached: CachedEmbeddingBag,
    plain: nn.EmbeddingBag,
    batches: list[Batch],
    *,
    lr: float = 0.3,
    plain_step: Callable[[nn.EmbeddingBag, Tensor], None] | None = None,
    exact: bool = True,
) -> None:
    """Train both on the same upstream gradients and compare every output."""
    sgd = torch.optim.SGD(plain.parameters(), lr=lr)
    cached_sgd = torch.optim.SGD(cached.parameters(), lr=lr) if cached.optimizer is None else None
    for ids, offsets, weights in batches:
        out, expected = cached(ids, offsets, weights), plain(ids, offsets, weights)
        if exact:
            assert torch.equal(out, expected)
        else:
            torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        expected.backward(upstream)
        if cached_sgd is None:
            cached.step()
        else:
            cached_sgd.step()
            cached_sgd.zero_grad()
        if plain_step is None:
            sgd.step()
        else:
            plain_step(plain, ids)
        sgd.zero_grad()


@pytest.mark.parametrize(
    ("mode", "sparse"), [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False)]
)
@pytest.mark.parametrize("evict_strategy", ["lfu", "dataset"])
@pytest.mark.parametrize("padding_idx", [None, 7, -1])
def test_sgd_over_parameters_equals_a_plain_bag(
    mode: str, sparse: bool, evict_strategy: str, padding_idx: int | None
) -> None:
    cached, plain = pair(mode=mode, sparse=sparse, evict_strategy=evict_strategy, padding_idx=padding_idx)
    # Dense sum and mean gradients of torch depend, in the last bit, on how rows are numbered.
    is_exact = sparse or mode == "max"
    train(cached, plain, make_batches(25), exact=is_exact)
    stats = cached.row_cache.stats
    assert stats.evictions > 50 and stats.write_backs > 40  # what is tested did happen
    if is_exact:
        assert torch.equal(cached.weight, plain.weight)
    torch.testing.assert_close(cached.weight, plain.weight.data)


def test_weighted_lookups_equal_a_plain_bag_to_the_bit() -> None:
    cached, plain = pair(mode="sum", sparse=True)
    train(cached, plain, make_batches(20, weighted=True))
    assert torch.equal(cached.weight, plain.weight)


def test_gradients_reach_the_weights_of_lookups() -> None:
    cached, plain = pair(mode="sum", optimizer="sgd")
    for ids, offsets, weights in make_batches(6, weighted=True):
        assert weights is not None
        mine, theirs = weights.clone().requires_grad_(), weights.clone().requires_grad_()
        cached(ids, offsets, mine).square().sum().backward()
        plain(ids, offsets, theirs).square().sum().backward()
        cached.step()
        with torch.no_grad():
            plain.weight.copy_(cached.weight)
        assert torch.equal(mine.grad, theirs.grad)


def test_bags_without_offsets_and_with_the_last_offset_work() -> None:
    ids = torch.randint(0, N, (2, 5), dtype=torch.int32)
    cached, plain = pair(mode="mean", padding_idx=int(ids[0, 0]))
    assert torch.equal(cached(ids), plain(ids))
    cached, plain = pair(mode="sum", include_last_offset=True)
    flat, offsets = ids.reshape(-1), torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    assert torch.equal(cached(flat, offsets), plain(flat, offsets))


@pytest.mark.parametrize("optimizer", [None, "sgd", "adam"])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_empty_bags_is_zeros_and_trains_nothing(mode: str, optimizer: Any) -> None:
    cached, _ = pair(mode=mode, optimizer=optimizer)
    before = cached.weight.clone()
    for training in (True, False):
        cached.train(training)
        out = cached(torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
        assert torch.equal(out, torch.zeros(3, D))
        if training:
            out.sum().backward()
            if optimizer is not None:
                cached.step()
    assert torch.equal(cached.weight, before)


def test_lookups_of_padding_only_are_zeros_and_its_row_stays() -> None:
    cached, _ = pair(mode="sum", padding_idx=3, optimizer="sgd", lr=1.0)
    before = cached.weight[3].clone()
    for _ in range(3):
        out = cached(torch.tensor([3, 3, 4]), torch.tensor([0, 2]))
        assert not out[0].any()
        out.sum().backward()
        cached.step()
    assert torch.equal(cached.weight[3], before)
    assert cached.hits + cached.misses == 3  # of row 4


# Row optimizers, against references written out over the whole table


def rowwise_adagrad(lr: float, eps: float) -> Callable[[nn.EmbeddingBag, Tensor], None]:
    sums = torch.zeros(N)

    def update(plain: nn.EmbeddingBag, _: Tensor) -> None:
        assert plain.weight.grad is not None
        gradient = plain.weight.grad.to_dense()
        sums.add_((gradient**2).mean(1))
        with torch.no_grad():
            plain.weight -= lr * gradient / (sums.sqrt() + eps)[:, None]

    return update


def summed_sgd(lr: float) -> Callable[[nn.EmbeddingBag, Tensor], None]:
    def update(plain: nn.EmbeddingBag, _: Tensor) -> None:
        assert plain.weight.grad is not None
        with torch.no_grad():
            plain.weight -= lr * plain.weight.grad.to_dense()

    return update


def lazy_adam(lr: float, betas: tuple[float, float], eps: float) -> Callable[[nn.EmbeddingBag, Tensor], None]:
    """Adam on the rows looked up only, one row at a time."""
    first, second = torch.zeros(N, D), torch.zeros(N, D)
    steps = 0

    def update(plain: nn.EmbeddingBag, ids: Tensor) -> None:
        nonlocal steps
        assert plain.weight.grad is not None
        gradient = plain.weight.grad.to_dense()
        steps += 1
        for row in set(ids.tolist()) - {plain.padding_idx}:
            first[row] = betas[0] * first[row] + (1 - betas[0]) * gradient[row]
            second[row] = betas[1] * second[row] + (1 - betas[1]) * gradient[row] ** 2
            rate = lr * (1 - betas[1] ** steps) ** 0.5 / (1 - betas[0] ** steps)
            with torch.no_grad():
                plain.weight[row] -= rate * first[row] / (second[row].sqrt() + eps)

    return update


REFERENCES = {
    "sgd": lambda: summed_sgd(0.3),
    "rowwise_adagrad": lambda: rowwise_adagrad(0.3, 1e-10),
    "adam": lambda: lazy_adam(0.3, (0.9, 0.999), 1e-8),
}


@pytest.mark.parametrize("optimizer", REFERENCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_row_optimizers_equal_their_references_while_every_step_evicts(
    optimizer: Any, mode: str, padding_idx: int | None
) -> None:
    cached, plain = pair(mode=mode, optimizer=optimizer, lr=0.3, padding_idx=padding_idx)
    train(cached, plain, make_batches(25), plain_step=REFERENCES[optimizer](), exact=False)
    assert cached.row_cache.stats.write_backs > 40
    torch.testing.assert_close(cached.weight, plain.weight.data)


def test_adam_equals_the_sparse_adam_of_torch() -> None:
    cached, plain = pair(mode="sum", optimizer="adam", lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    sparse_adam = torch.optim.SparseAdam(plain.parameters(), lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    batches = [b for b in make_batches(20) if b[0].numel()]
    train(cached, plain, batches, plain_step=lambda *_: sparse_adam.step(), exact=False)
    torch.testing.assert_close(cached.weight, plain.weight.data)


def test_a_row_optimizer_hides_its_rows_from_other_optimizers() -> None:
    cached, _ = pair(optimizer="sgd")
    assert list(cached.parameters()) == []


@pytest.mark.parametrize("optimizer", [None, "rowwise_adagrad"])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_gradients_accumulate_over_forwards_before_one_step(optimizer: Any, mode: str) -> None:
    """Rows of a forward stay until its step, though the next forward needs room."""
    cached, plain = pair(mode=mode, optimizer=optimizer, lr=0.3, cache_ratio=0.35)
    reference = summed_sgd(0.3) if optimizer is None else rowwise_adagrad(0.3, 1e-10)
    sgd = torch.optim.SGD(cached.parameters(), lr=0.3) if optimizer is None else None
    batches = make_batches(20)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        outs = [(cached(*batch), plain(*batch)) for batch in (first, second)]
        for out, expected in outs:
            torch.testing.assert_close(out, expected)
            upstream = torch.randn_like(out)
            out.backward(upstream)
            expected.backward(upstream)
        if sgd is None:
            cached.step()
        else:
            cached.flush()  # the update of these rows is still to come, and must not be lost
            sgd.step()
            sgd.zero_grad()
        reference(plain, first[0])
        plain.zero_grad()
    torch.testing.assert_close(cached.weight, plain.weight.data)
    assert cached.row_cache.stats.evictions > 20


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_forwards_that_never_get_their_step_end_in_an_error_that_says_so(optimizer: Any) -> None:
    cached, _ = pair(optimizer=optimizer)
    with pytest.raises(CapacityError, match="wait for their optimizer step") as raised:
        for batch in make_batches(5):
            cached(*batch)
    assert raised.value.hint is not None and "take that step" in raised.value.hint


def test_forwards_without_gradient_in_training_mode_keep_nothing() -> None:
    cached, plain = pair(mode="sum")
    with torch.no_grad():
        for batch in make_batches(20):
            assert torch.equal(cached(*batch), plain(*batch))
    assert cached.row_cache.stats.evictions > 50 and cached.bytes_to_host == 0


# Look-ahead


@pytest.mark.parametrize("optimizer", [None, "rowwise_adagrad"])
@pytest.mark.parametrize("buffer_size", [0, 3])
def test_after_prefetch_the_forwards_of_its_batches_move_nothing(optimizer: Any, buffer_size: int) -> None:
    options: dict[str, Any] = {"optimizer": optimizer} if optimizer else {"sparse": True}
    cached, plain = pair(mode="sum", lr=0.3, cache_ratio=0.6, buffer_size=buffer_size, **options)
    step = None if optimizer is None else rowwise_adagrad(0.3, 1e-10)
    batches = make_batches(40)
    done, cover_sizes = 0, set()
    while done < len(batches):
        ahead = batches[done : done + 6]
        covered = cached.prefetch([ids for ids, _, _ in ahead])
        moved = (cached.bytes_to_device, cached.bytes_to_host, cached.hits, cached.misses)
        train(cached, plain, ahead[:covered], plain_step=step, exact=optimizer is None)
        assert (cached.bytes_to_device, cached.bytes_to_host, cached.hits, cached.misses) == moved
        done += covered
        cover_sizes.add(covered)
    assert 1 < min(cover_sizes) and len(cover_sizes) > 1
    assert cached.hits + cached.misses == sum(ids.numel() for ids, _, _ in batches)
    torch.testing.assert_close(cached.weight, plain.weight.data)


def test_prefetch_covers_as_many_batches_as_fit_and_names_the_first_that_never_will() -> None:
    cached, _ = pair()
    assert cached.row_cache.capacity == 12
    blocks = [torch.arange(start, start + 5) for start in (0, 5, 10, 15)]
    assert cached.prefetch(blocks) == 2
    assert cached.prefetch(blocks[2:]) == 2
    assert cached.prefetch([]) == 0
    with pytest.raises(CapacityError, match=r"at most 12 distinct rows.*found 13"):
        cached.prefetch([torch.arange(13), blocks[0]])
    with pytest.raises(ValueError, match="training mode"):
        cached.eval().prefetch(blocks)


def test_another_batch_between_prefetch_and_its_forwards_does_no_harm() -> None:
    cached, plain = pair(mode="sum", sparse=True)
    batches = make_batches(30)
    for index in range(0, 30, 3):
        cached.prefetch([batches[index + 1][0]])
        train(cached, plain, batches[index : index + 3])
    assert torch.equal(cached.weight, plain.weight)


@pytest.mark.parametrize("buffer_size", [1, 4, 1000])
@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_staged_copies_change_nothing_and_bound_their_buffers(buffer_size: int, optimizer: Any) -> None:
    cached, _ = pair(mode="sum", buffer_size=buffer_size, optimizer=optimizer)
    whole = copy.deepcopy(cached)
    whole._host._buffer_size = 0
    for ids, offsets, _ in make_batches(15):
        upstream = torch.randn(5, D)
        for bag in (cached, whole):
            bag(ids, offsets).backward(upstream)
            if optimizer is None:
                sgd = torch.optim.SGD(bag.parameters(), lr=0.1)
                sgd.step()
                sgd.zero_grad()
            else:
                bag.step()
    assert torch.equal(cached.weight, whole.weight)
    assert cached.bytes_to_device == whole.bytes_to_device and cached.bytes_to_host == whole.bytes_to_host
    row_bytes = 4 * D * (1 if optimizer is None else 3)
    if buffer_size < 10:
        assert cached.memory_bytes()["staging"] <= 2 * row_bytes * (buffer_size + buffer_size // 4)


# Evaluation


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_evaluation_equals_a_plain_bag_and_moves_nothing(mode: str, padding_idx: int | None, optimizer: Any) -> None:
    options: dict[str, Any] = {"optimizer": optimizer} if optimizer else {"sparse": mode != "max"}
    cached, plain = pair(mode=mode, padding_idx=padding_idx, lr=0.3, **options)
    step = None if optimizer is None else summed_sgd(0.3)
    train(cached, plain, make_batches(10), plain_step=step, exact=optimizer is None)
    resident = cached.row_cache.resident_rows()
    dirty = cached.row_cache._is_dirty.copy()
    counters = (repr(cached.row_cache.stats), cached.bytes_to_device, cached.bytes_to_host)
    cached.eval()
    host = cached._host.tables["weight"]
    for ids, offsets, _ in [*make_batches(10, seed=9), *make_batches(3, seed=4, max_rows=50)]:
        out, expected = cached(ids, offsets), plain(ids, offsets)
        if optimizer is None:
            assert torch.equal(out, expected)
        torch.testing.assert_close(out, expected)
        assert not out.requires_grad
    everything = torch.arange(N)  # far more rows than the cache holds
    assert torch.allclose(cached(everything, everything), plain(everything, everything))
    assert counters == (repr(cached.row_cache.stats), cached.bytes_to_device, cached.bytes_to_host)
    assert np.array_equal(resident, cached.row_cache.resident_rows())
    assert np.array_equal(dirty, cached.row_cache._is_dirty) and dirty.any()
    assert host is cached._host.tables["weight"]


# State


@pytest.mark.parametrize("optimizer", [None, "sgd", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("other_ratio", [0.2, 0.45, 1.0])
def test_a_state_dict_continues_in_another_cache_as_if_nothing_happened(optimizer: Any, other_ratio: float) -> None:
    options: dict[str, Any] = {"mode": "sum", "optimizer": optimizer, "lr": 0.3}
    first, _ = pair(**options)
    second, _ = pair(**options, evict_strategy="dataset")
    second = CachedEmbeddingBag(N, D, cache_ratio=other_ratio, evict_strategy="dataset", **options)
    batches = make_batches(30)

    def steps(bag: CachedEmbeddingBag, part: list[Batch], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for ids, offsets, _ in part:
            bag(ids, offsets).backward(torch.randn(5, D, generator=generator))
            if optimizer is None:
                sgd = torch.optim.SGD(bag.parameters(), lr=0.3)
                sgd.step()
                sgd.zero_grad()
            else:
                bag.step()

    steps(first, batches[:15], 1)
    steps(second, batches[15:20], 2)  # it has a life of its own, to be overwritten
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    written = second.bytes_to_host
    assert torch.equal(second.weight, first.weight)
    assert second.bytes_to_host == written  # nothing of its old life is left to write
    for bag in (first, second):
        steps(bag, batches[15:], 3)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=0, atol=0)


def test_state_dicts_are_those_of_a_plain_bag_without_an_optimizer() -> None:
    cached, plain = pair(mode="sum", sparse=True)
    train(cached, plain, make_batches(10))
    assert {k: v.shape for k, v in cached.state_dict().items()} == {"weight": (N, D)}
    other = nn.EmbeddingBag(N, D)
    other.load_state_dict(cached.state_dict())
    assert torch.equal(other.weight, plain.weight)
    model = nn.Sequential(CachedEmbeddingBag(N, D, cache_ratio=SMALL))
    model.load_state_dict({"0.weight": plain.weight})
    assert torch.equal(model[0].weight, plain.weight)


def test_a_state_dict_that_does_not_match_is_refused_by_name() -> None:
    cached, _ = pair(optimizer="rowwise_adagrad")
    state = cached.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*optimizer.sum_of_squares"):
        cached.load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stray"):
        cached.load_state_dict({**state, "stray": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: expected \(60, 5\), found \(59, 5\)"):
        cached.load_state_dict({**state, "weight": torch.zeros(N - 1, D)})


@pytest.mark.parametrize("empty", [False, True])
def test_flush_writes_back_once_and_keeps_the_cache_warm_unless_asked(empty: bool) -> None:
    cached, plain = pair(mode="sum", sparse=True)
    train(cached, plain, make_batches(8))
    resident = cached.row_cache.num_resident
    cached.flush(empty=empty)
    assert torch.equal(cached._host.tables["weight"], plain.weight)
    assert cached.row_cache.num_resident == (0 if empty else resident)
    written = cached.bytes_to_host
    cached.flush()
    assert cached.bytes_to_host == written
    train(cached, plain, make_batches(8, seed=2))
    assert torch.equal(cached.weight, plain.weight)


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_emptying_between_a_forward_and_its_step_is_refused(optimizer: Any) -> None:
    cached, _ = pair(optimizer=optimizer)
    cached(torch.tensor([1]), torch.tensor([0])).sum().backward()
    with pytest.raises(ValueError, match="before flush"):
        cached.flush(empty=True)


def test_only_changed_rows_are_written_back() -> None:
    cached = CachedEmbeddingBag(N, D, cache_ratio=SMALL, optimizer="sgd", mode="sum")
    with torch.no_grad():
        cached(torch.arange(12), torch.tensor([0]))
    cached(torch.tensor([50]), torch.tensor([0])).sum().backward()
    cached.step()
    cached.flush()
    assert cached.bytes_to_host == 4 * D


def test_a_row_fetched_right_after_its_eviction_comes_back_changed() -> None:
    cached = CachedEmbeddingBag(N, D, cache_ratio=1 / N, optimizer="sgd", mode="sum", lr=1.0)
    expected = cached.weight[[0]] - 1
    cached(torch.tensor([0]), torch.tensor([0])).sum().backward()
    cached.step()
    with torch.no_grad():
        cached(torch.tensor([1]), torch.tensor([0]))  # evicts row 0, changed; the next evicts row 1, unchanged
        assert torch.equal(cached(torch.tensor([0]), torch.tensor([0])), expected)


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_copies_and_pickles_live_on_their_own(optimizer: Any) -> None:
    cached, _ = pair(mode="sum", optimizer=optimizer)
    before = cached.weight.clone()
    for twin in (copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        twin(torch.tensor([1, 50]), torch.tensor([0])).sum().backward()
        if optimizer is None:
            torch.optim.SGD(twin.parameters(), lr=0.3).step()
        else:
            twin.step()
        assert not torch.equal(twin.weight, before) and torch.equal(cached.weight, before)


def test_casting_casts_the_table_too() -> None:
    cached, plain = pair(mode="sum", sparse=True)
    train(cached, plain, make_batches(5))
    cached.double()
    plain.double()
    assert cached.weight.dtype == torch.float64 and torch.equal(cached.weight, plain.weight)
    train(cached, plain, make_batches(10, seed=3))
    assert torch.equal(cached.weight, plain.weight)


def test_half_precision_rows_are_updated_in_single_precision() -> None:
    cached = CachedEmbeddingBag(N, D, cache_ratio=SMALL, mode="sum", dtype=torch.bfloat16, optimizer="rowwise_adagrad")
    assert cached.cache_sum_of_squares.dtype == torch.float32
    cached(torch.tensor([1, 1, 50]), torch.tensor([0])).float().sum().backward()
    cached.step()
    assert cached.state_dict()["optimizer.sum_of_squares"][[1, 50, 2]].tolist() == [4.0, 1.0, 0.0]


# Policy, counters and errors


@pytest.mark.parametrize("evict_strategy", ["lfu", "dataset"])
def test_counts_decide_what_the_cache_starts_with(evict_strategy: Any) -> None:
    counts = torch.randperm(N)
    bag = CachedEmbeddingBag(
        N, D, cache_ratio=0.5, warmup_ratio=0.4, ids_freq_mapping=counts, evict_strategy=evict_strategy
    )
    assert set(bag.row_cache.resident_rows().tolist()) == set(counts.topk(12).indices.tolist())
    rows = torch.from_numpy(bag.row_cache.resident_rows())
    assert torch.equal(bag.cache_weight[:12], bag.weight[rows])
    assert bag.bytes_to_device == 12 * 4 * D


def test_memory_is_split_into_cache_maps_and_host() -> None:
    bag = CachedEmbeddingBag(10_000, 8, optimizer="rowwise_adagrad")
    memory = bag.memory_bytes()
    assert memory["cache"] == 100 * (8 + 1) * 4 and memory["host"] == 10_000 * (8 + 1) * 4
    assert memory["maps"] <= 4 * 10_000 + 40 * 100
    counts = np.zeros(10_000, np.int32)
    ranked = CachedEmbeddingBag(10_000, 8, evict_strategy="dataset", ids_freq_mapping=counts)
    assert ranked.memory_bytes()["maps"] <= 8 * 10_000 + 40 * 100


def test_hits_and_misses_count_lookups() -> None:
    bag = CachedEmbeddingBag(N, D, cache_ratio=SMALL, warmup_ratio=0.0)
    assert bag.hit_ratio == 0.0
    with torch.no_grad():
        bag(torch.tensor([1, 1, 2]), torch.tensor([0]))
        bag(torch.tensor([1, 1, 3]), torch.tensor([0]))
    assert (bag.hits, bag.misses, bag.hit_ratio) == (2, 4, pytest.approx(1 / 3))


def test_a_batch_larger_than_the_cache_names_both_numbers_and_the_remedy() -> None:
    cached, plain = pair(mode="sum", sparse=True)
    with pytest.raises(CapacityError, match=r"at most 12 distinct rows.*cache_ratio 0.2.*found 20") as raised:
        cached(torch.arange(20), torch.tensor([0]))
    assert raised.value.hint == "raise cache_ratio to at least 0.334, or use a smaller batch"
    CachedEmbeddingBag(N, D, cache_ratio=0.334)(torch.arange(20), torch.tensor([0]))
    train(cached, plain, make_batches(5))  # and it did no harm
    assert torch.equal(cached.weight, plain.weight)


@pytest.mark.parametrize("rows", [[-1], [N], [2, 99]])
@pytest.mark.parametrize("training", [True, False])
def test_rows_outside_the_table_are_refused(rows: list[int], training: bool) -> None:
    cached, _ = pair()
    with pytest.raises(ValueError, match=r"expected rows in \[0, 60\)"):
        cached.train(training)(torch.tensor(rows), torch.tensor([0]))


@pytest.mark.parametrize(
    "options",
    [
        {"num_embeddings": 0},
        {"cache_ratio": 0.0},
        {"cache_ratio": 1.1},
        {"warmup_ratio": -0.1},
        {"buffer_size": -1},
        {"mode": "median"},
        {"evict_strategy": "lru"},
        {"optimizer": "lamb"},
        {"padding_idx": N},
        {"sparse": True, "mode": "max"},
        {"sparse": True, "optimizer": "sgd"},
        {"ids_freq_mapping": [1] * (N - 1)},
        {"ids_freq_mapping": [0.5] * N},
        {"ageing_lookups": -1.0},
        {"_weight": torch.zeros(N, D + 1)},
        {"_weight": torch.zeros(N, D, dtype=torch.int64)},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        CachedEmbeddingBag(**{"num_embeddings": N, "embedding_dim": D, **options})


def test_a_step_without_a_row_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a row optimizer"):
        CachedEmbeddingBag(N, D).step()


def test_the_representation_shows_the_options() -> None:
    assert "60, 5, cached=12, policy='lfu', mode='mean', optimizer='adam'" in repr(pair(optimizer="adam")[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_script_of_calls_equals_a_plain_bag(data: st.DataObject) -> None:
    """Train, evaluate, prefetch, flush, save and load in any order."""
    ratio = data.draw(st.sampled_from([0.15, 0.2, 0.5, 1.0]))
    mode = data.draw(st.sampled_from(MODES))
    options: dict[str, Any] = {
        "mode": mode,
        "sparse": mode != "max",
        "padding_idx": data.draw(st.none() | st.integers(0, N - 1)),
        "evict_strategy": data.draw(st.sampled_from(["lfu", "dataset"])),
        "buffer_size": data.draw(st.integers(0, 3)),
    }
    cached, plain = pair(**options, cache_ratio=ratio)
    calls = st.sampled_from(["train", "train", "eval", "prefetch", "flush", "empty", "reload"])
    for index, call in enumerate(data.draw(st.lists(calls, max_size=14))):
        batch = make_batches(1, seed=index, max_rows=8)[0]
        if call == "train":
            train(cached, plain, [batch])
        elif call == "eval":
            assert torch.equal(cached.eval()(*batch), plain(*batch))
            cached.train()
        elif call == "prefetch":
            cached.prefetch([batch[0], make_batches(1, seed=index + 1, max_rows=8)[0][0]])
        elif call == "reload":
            cached.load_state_dict({k: v.clone() for k, v in cached.state_dict().items()})
        else:
            cached.flush(empty=call == "empty")
    assert torch.equal(cached.weight, plain.weight)


@pytest.mark.parametrize("optimizer", [None, "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("buffer_size", [0, 3])
def test_training_on_a_device_equals_training_on_the_cpu(
    optimizer: Any, buffer_size: int, real_cuda: torch.device
) -> None:
    here, _ = pair(mode="sum", optimizer=optimizer, lr=0.3, buffer_size=buffer_size)
    there = copy.deepcopy(here).to(real_cuda)
    sgds = {bag: torch.optim.SGD(bag.parameters(), lr=0.3) if optimizer is None else None for bag in (here, there)}
    for ids, offsets, _ in make_batches(30):
        upstream = torch.randn(5, D)
        for bag, sgd in sgds.items():
            out = bag(ids, offsets)
            assert out.device == bag.cache_weight.device
            out.backward(upstream.to(out.device))
            if sgd is None:
                bag.step()
            else:
                sgd.step()
                sgd.zero_grad()
    assert there.weight.device.type == "cpu"
    torch.testing.assert_close(there.weight, here.weight)
    ids = torch.arange(N)
    torch.testing.assert_close(there.eval()(ids, ids).cpu(), here.eval()(ids, ids))
