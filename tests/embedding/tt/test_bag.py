import collections
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.embedding.tt.bag import BatchedTTEmbeddingBags, TTEmbeddingBag
from slipstream.embedding.tt.counts import IdCounter
from slipstream.embedding.tt.kernels import contract, contract_backward, plan_contraction
from slipstream.embedding.tt.shapes import entry_variance, suggested_tt_shapes

P, Q, RANKS = [7, 9, 11, 5], [3, 4, 5, 7], [13, 12, 7]  # the shapes FBTT-Embedding tests with
few = settings(max_examples=20, deadline=None)


def make_bag(num_cores=3, *, rows_short=2, seed=0, **options):
    p, q = P[:num_cores], Q[:num_cores]
    options = {"dtype": torch.float64, **options}
    generator = torch.Generator().manual_seed(seed)
    return TTEmbeddingBag(
        math.prod(p) - rows_short, math.prod(q), RANKS[: num_cores - 1], p, q, generator=generator, **options
    )


def reference_table(cores, num_embeddings):
    """The table, one core slice per row: digits by numpy, products by einsum."""
    digits = np.unravel_index(np.arange(num_embeddings), [core.shape[0] for core in cores])
    table = cores[0][torch.from_numpy(digits[0])]
    for core, digit in zip(cores[1:], digits[1:], strict=True):
        left = table.reshape(num_embeddings, 1, -1, core.shape[1])
        table = torch.einsum("nalr,nrqs->nalqs", left, core[torch.from_numpy(digit)])
        table = table.reshape(num_embeddings, 1, -1, core.shape[3])
    return table.reshape(num_embeddings, -1)


def table_of(bag):
    return reference_table([core[0] for core in bag.tt_cores], bag.num_embeddings)


def ragged(rng, num_embeddings, num_bags=9, longest=8):
    lengths = rng.integers(0, longest, num_bags)
    ids = torch.from_numpy(rng.integers(0, num_embeddings, lengths.sum()) // rng.integers(1, 4))
    return ids, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def pooled_by_loop(table, ids, offsets, mode, padding_idx=None):
    bags = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = [table[i] for i in ids[start:end].tolist() if i != padding_idx]
        if not rows:
            bags.append(torch.zeros_like(table[0]))
        elif mode == "max":
            bags.append(torch.stack(rows).amax(0))
        else:
            bags.append(sum(rows) / (len(rows) if mode == "mean" else 1))
    return torch.stack(bags)


# ---- lookup


@few
@given(st.integers(2, 4), st.sampled_from(["sum", "mean", "max"]), st.booleans(), st.integers(0, 10**6))
def test_a_lookup_equals_a_plain_loop_over_the_table(num_cores, mode, padded, seed):
    rng = np.random.default_rng(seed)
    bag = make_bag(num_cores, seed=seed, mode=mode, padding_idx=3 if padded else None, include_last_offset=True)
    ids, offsets = ragged(rng, min(bag.num_embeddings, 40))
    expected = pooled_by_loop(table_of(bag), ids, offsets, mode, 3 if padded else None)
    torch.testing.assert_close(bag(ids, offsets), expected)
    bag.include_last_offset = False
    torch.testing.assert_close(bag(ids, offsets[:-1]), expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_cores", [2, 3, 4])
def test_gradients_of_the_cores_equal_those_through_nn_embedding_bag(num_cores, mode, dtype):
    bag = make_bag(num_cores, mode=mode, dtype=dtype, sparse=False, padding_idx=-1, weight_dist="normal")
    ids, offsets = ragged(np.random.default_rng(1), bag.num_embeddings, 200)
    ids[::7] = bag.num_embeddings - 1
    reference = F.embedding_bag(ids, table_of(bag), offsets[:-1], mode=mode, padding_idx=bag.num_embeddings - 1)
    factor = torch.randn(reference.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((reference * factor).sum(), list(bag.tt_cores))
    out = bag(ids, offsets[:-1])
    torch.testing.assert_close(out, reference)
    for found, want in zip(torch.autograd.grad((out * factor).sum(), list(bag.tt_cores)), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4 if dtype == torch.float32 else 1e-7, atol=1e-5)


def test_per_sample_weights_are_applied_and_get_gradients():
    bag = make_bag(sparse=False)
    ids, offsets = ragged(np.random.default_rng(0), bag.num_embeddings)
    weights = torch.rand(ids.numel(), dtype=torch.float64, requires_grad=True)
    out = bag(ids, offsets[:-1], weights)
    reference = F.embedding_bag(ids, table_of(bag), offsets[:-1], mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(out, reference)
    found = torch.autograd.grad(out.square().sum(), [weights, *bag.tt_cores])
    want = torch.autograd.grad(reference.square().sum(), [weights, *bag.tt_cores])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_of_one_size_need_no_offsets(dtype):
    bag = make_bag()
    ids = torch.arange(12, dtype=dtype).view(4, 3) * 50
    torch.testing.assert_close(bag(ids), table_of(bag)[ids.long()].sum(1))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_batch_without_lookups_gives_zeros_and_trains_nothing(mode):
    bag = make_bag(mode=mode, optimizer="adagrad")
    before = copy.deepcopy(bag.state_dict())
    out = bag(torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(out, out.new_zeros(3, 60))
    out.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in bag.state_dict().items())
    assert bag(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).shape == (0, 60)
    assert bag(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 60)


@pytest.mark.parametrize("dim", [1, 5, 7, 96, 128])
@pytest.mark.parametrize("num_embeddings", [1, 3, 997])
def test_every_size_of_table_works_without_shapes_given(num_embeddings, dim):
    bag = TTEmbeddingBag(num_embeddings, dim, [4, 3])
    ids = torch.arange(num_embeddings)
    torch.testing.assert_close(bag(ids[:, None]), table_of(bag))
    assert bag.full_weight().shape == (num_embeddings, dim)
    torch.testing.assert_close(bag.full_weight(), table_of(bag))


@pytest.mark.parametrize("num_cores", [2, 3, 4])
@pytest.mark.parametrize("dense_prefixes", [True, False])
def test_both_ways_to_multiply_a_level_agree(num_cores, dense_prefixes):
    bag = make_bag(num_cores)
    cores = [core[0].detach() for core in bag.tt_cores]
    step = 1 if dense_prefixes else 13
    ids = torch.arange(0, bag.num_embeddings, step)
    grad_rows = torch.randn(ids.numel(), bag.embedding_dim, dtype=torch.float64)
    answers = []
    for by_slice in (True, False):
        plan = plan_contraction(ids, bag.tt_p_shapes, bag.tt_q_shapes, bag.tt_ranks, by_slice=by_slice)
        rows, lefts = contract(plan, cores)
        position = torch.arange(ids.numel()) if plan.position is None else plan.position
        in_order = torch.empty_like(grad_rows)
        in_order[position] = grad_rows
        answers.append((rows[position], contract_backward(plan, cores, lefts, in_order)))
        torch.testing.assert_close(answers[-1][0], table_of(bag)[ids].detach())
    torch.testing.assert_close(*answers)


# ---- training


def reference_steps(bag, batches, optimizer_class, **options):
    """Cores after plain torch steps through the materialised table."""
    cores = [core[0].detach().clone().requires_grad_() for core in bag.tt_cores]
    optimizer = optimizer_class(cores, **options)
    for ids, offsets in batches:
        optimizer.zero_grad()
        table = reference_table(cores, bag.num_embeddings)
        F.embedding_bag(ids, table, offsets[:-1], mode=bag.mode).square().sum().backward()
        optimizer.step()
    return cores


def train(bag, batches):
    for ids, offsets in batches:
        bag(ids, offsets[:-1]).square().sum().backward()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("num_cores", [2, 3, 4])
@pytest.mark.parametrize(("optimizer", "reference"), [("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad)])
def test_fused_steps_equal_those_of_torch_optimizers(optimizer, reference, num_cores, mode):
    bag = make_bag(num_cores, optimizer=optimizer, learning_rate=0.05, mode=mode, weight_dist="normal")
    rng = np.random.default_rng(4)
    batches = [ragged(rng, bag.num_embeddings // 3, 20) for _ in range(4)]
    expected = reference_steps(bag, batches, reference, lr=0.05)
    train(bag, batches)
    for core, want in zip(bag.tt_cores, expected, strict=True):
        torch.testing.assert_close(core[0], want)
        assert core.grad is None


def test_only_slices_that_were_looked_up_change():
    bag = make_bag(optimizer="adagrad")
    before = [core.detach().clone() for core in bag.tt_cores]
    bag(torch.tensor([[0, 1, 12]])).sum().backward()  # digits (0, 0, 0), (0, 0, 1), (0, 1, 1)
    for core, old, used in zip(bag.tt_cores, before, ([0], [0, 1], [0, 1]), strict=True):
        changed = (core != old).flatten(2).any(2)[0].nonzero().flatten()
        assert changed.tolist() == used


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_bag_used_twice_in_one_graph_is_updated_once_by_the_sum(optimizer):
    apart, together = make_bag(optimizer=optimizer), make_bag(optimizer=optimizer)
    ids = torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(0))
    (apart(ids[:1]).square().sum() + apart(ids[1:]).square().sum()).backward()
    together(ids).square().sum().backward()
    for one, other in zip(apart.tt_cores, together.tt_cores, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_backward_after_an_update_is_refused():
    bag = make_bag()
    first, second = bag(torch.tensor([[1]])), bag(torch.tensor([[2]]))
    first.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_a_failed_backward_leaves_nothing_for_the_next():
    bag, clean = make_bag(), make_bag()

    def fail(_):
        raise KeyError("stop")

    weights = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    scaled = weights * 1
    scaled.register_hook(fail)
    out = bag(torch.tensor([[5]])) + bag(torch.tensor([[9]]), None, scaled)
    with pytest.raises(KeyError):
        out.sum().backward()
    for each in (bag, clean):
        with torch.no_grad():
            for core, start in zip(each.tt_cores, make_bag().tt_cores, strict=True):
                core.copy_(start)
        each(torch.tensor([[1, 2]])).sum().backward()
    assert all(torch.equal(one, two) for one, two in zip(bag.tt_cores, clean.tt_cores, strict=True))


def test_training_twice_gives_the_same_bits():
    states = []
    for _ in range(2):
        bag = make_bag(4, optimizer="adagrad", dtype=torch.float32)
        rng = np.random.default_rng(0)
        train(bag, [ragged(rng, bag.num_embeddings, 60) for _ in range(3)])
        states.append(bag.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_learning_rate_can_change_between_steps():
    bag = make_bag()
    before = [core.detach().clone() for core in bag.tt_cores]
    bag.set_learning_rate(0.0)
    bag(torch.tensor([[1, 2]])).sum().backward()
    assert all(torch.equal(core, old) for core, old in zip(bag.tt_cores, before, strict=True))


# ---- shapes and initial values


@pytest.mark.parametrize(
    ("size", "num_cores", "factors"),
    [
        (10131227, 3, [200, 220, 250]),
        (8351593, 3, [200, 200, 209]),
        (7046547, 3, [200, 200, 200]),
        (5461306, 3, [166, 175, 188]),
        (2202608, 3, [125, 130, 136]),
        (286181, 3, [53, 72, 75]),
        (142572, 3, [50, 52, 55]),
        (93145, 3, [45, 45, 46]),
        (45833188, 3, [340, 360, 375]),
        (40000000, 3, [250, 400, 400]),
        (10000, 3, [20, 20, 25]),
        (1000000, 2, [1000, 1000]),
        (1000000, 4, [25, 40, 25, 40]),
    ],
)
def test_usual_tables_get_the_shapes_of_fbtt(size, num_cores, factors):
    assert suggested_tt_shapes(size, num_cores) == factors


@pytest.mark.parametrize(
    ("dim", "factors"),
    [
        (16, [2, 2, 4]),
        (32, [2, 4, 4]),
        (64, [4, 4, 4]),
        (256, [4, 8, 8]),
        (96, [4, 4, 6]),
        (128, [4, 4, 8]),
        (7, [1, 1, 7]),
    ],
)
def test_a_dimension_is_factored_exactly(dim, factors):
    assert suggested_tt_shapes(dim, allow_round_up=False) == factors


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200_000), st.integers(2, 4))
def test_row_factors_cover_the_table_with_little_waste(size, num_cores):
    factors = suggested_tt_shapes(size, num_cores)
    assert size <= math.prod(factors) <= size + size // 4
    assert size < 100 or max(factors) <= 2 * min(factors)
    assert math.prod(suggested_tt_shapes(size, num_cores, allow_round_up=False)) == size


@pytest.mark.parametrize("weight_dist", ["uniform", "normal", "approx-uniform", "approx-normal"])
@pytest.mark.parametrize("ranks", [[16], [8, 16], [8, 8, 8]])
def test_a_fresh_table_has_the_stated_variance(weight_dist, ranks):
    num_embeddings, dim = 3000, 64
    generator = torch.Generator().manual_seed(0)
    bag = TTEmbeddingBag(num_embeddings, dim, ranks, weight_dist=weight_dist, generator=generator)
    table = bag.full_weight().detach().double()
    assert abs(float(table.mean())) < 0.05 * float(table.std())
    assert float(table.var()) == pytest.approx(entry_variance(weight_dist, num_embeddings, dim), rel=0.02)
    if weight_dist.startswith("approx"):
        # DLRM draws from U(-1/sqrt(N), 1/sqrt(N))
        assert float(table.var()) == pytest.approx((2 / math.sqrt(num_embeddings)) ** 2 / 12, rel=0.02)


def test_approximate_initial_values_have_the_named_distribution():
    def kurtosis(weight_dist):
        generator = torch.Generator().manual_seed(0)
        table = TTEmbeddingBag(3000, 64, [16, 16], weight_dist=weight_dist, generator=generator).full_weight()
        table = table.detach()
        return float((table**4).mean() / (table**2).mean() ** 2)

    assert kurtosis("approx-uniform") == pytest.approx(1.8, abs=0.4)
    assert kurtosis("approx-normal") == pytest.approx(3.0, abs=0.3) and kurtosis("normal") > 3.5


@pytest.mark.parametrize(
    ("p", "q", "full"),
    [([5, 6], [3, 4], [15]), ([3, 4, 5], [2, 3, 2], [6, 10]), ([2, 3, 2, 3], [2, 1, 3, 2], [4, 12, 6])],
)
def test_a_table_survives_full_ranks_and_is_best_kept_by_larger_ones(p, q, full):
    weight = torch.randn(math.prod(p) - 1, math.prod(q), dtype=torch.float64)
    bag = TTEmbeddingBag.from_dense(weight, full, p, q, mode="mean")
    torch.testing.assert_close(bag.full_weight(), weight)
    torch.testing.assert_close(table_of(bag), weight)
    larger = TTEmbeddingBag.from_dense(weight, [rank + 3 for rank in full], p, q)
    torch.testing.assert_close(larger.full_weight(), weight)
    errors = [
        float((TTEmbeddingBag.from_dense(weight, [rank] * len(full), p, q).full_weight().detach() - weight).norm())
        for rank in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2]


# ---- cache

operation = st.sampled_from(["train", "train", "read", "populate", "reset", "load"])


@settings(max_examples=12, deadline=None)
@given(
    st.lists(operation, min_size=4, max_size=9),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([0, 40]),
)
def test_a_cache_of_copies_never_changes_the_model(operations, seed, sparse, hashtbl_size):
    rng = np.random.default_rng(seed)
    plain = make_bag(sparse=sparse, optimizer="adagrad")
    cached = make_bag(sparse=sparse, optimizer="adagrad", use_cache=True, cache_size=20, hashtbl_size=hashtbl_size)
    outside = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, cached)]
    for name in operations:
        ids, offsets = ragged(rng, 60, 12)
        if name == "train":
            for each, optimizer in zip((plain, cached), outside, strict=True):
                optimizer.zero_grad()
                each(ids, offsets[:-1]).square().sum().backward()
                optimizer.step()
        elif name == "populate":
            cached.cache_populate()
        elif name == "reset":
            cached.reset_cache()
        elif name == "load":
            cached.load_state_dict(copy.deepcopy(cached.state_dict()))
        with torch.no_grad():
            torch.testing.assert_close(cached(ids, offsets[:-1]), plain(ids, offsets[:-1]))
    torch.testing.assert_close(cached.full_weight(), plain.full_weight())


def test_copies_are_read_and_only_those_that_changed_are_computed_again(monkeypatch):
    bag = make_bag(use_cache=True, cache_size=30)
    bag.update_cache(torch.arange(30))
    assert bag.cache_populate() == 30
    computed = []
    original = TTEmbeddingBag._table_rows
    monkeypatch.setattr(
        TTEmbeddingBag, "_table_rows", lambda self, ids: computed.extend(ids.tolist()) or original(self, ids)
    )
    with torch.no_grad():
        bag(torch.arange(30)[None])
        bag(torch.arange(30)[None])
    assert computed == list(range(30)) and bag.hit_ratio == 1
    computed.clear()
    bag(torch.tensor([[600]])).sum().backward()  # digits (6, 0, 6): second and third are shared with row 6
    with torch.no_grad():
        bag(torch.arange(30)[None])
    assert computed == [*range(11), 17, 28]


def test_hits_are_counted_over_passes_that_read_the_cache():
    bag = make_bag(use_cache=True, cache_size=2)
    with torch.no_grad():
        bag(torch.tensor([[5, 5, 5, 9, 9, 1]]))
        assert bag.hit_ratio == 0
        assert bag.cache_populate() == 2
        bag(torch.tensor([[5, 9, 1, 1]]))
    assert bag.cache_lookups.tolist() == [10, 2]
    bag(torch.tensor([[5, 9]])).sum().backward()
    assert bag.cache_lookups.tolist() == [10, 2]
    bag.reset_cache()
    assert bag.hit_ratio == 0 and bag.cache_lookups.tolist() == [0, 0] and bag.cache_populate() == 0


def test_padding_is_neither_counted_nor_cached():
    bag = make_bag(use_cache=True, cache_size=2, padding_idx=4)
    with torch.no_grad():
        bag(torch.tensor([[4, 4, 4, 4, 7]]))
        assert bag.cache_populate() == 1
        bag(torch.tensor([[4, 4, 7, 8]]))
    assert bag.cache_lookups.tolist() == [3, 1]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_trained_cached_rows_follow_a_plain_simulation(optimizer):
    lr, eps = 0.1, 1e-10
    bag = make_bag(optimizer=optimizer, use_cache=True, cache_size=15, cache_gradient="rows")
    rng = np.random.default_rng(3)
    cores = [core[0].detach().clone().requires_grad_() for core in bag.tt_cores]
    outside = (torch.optim.SGD if optimizer == "sgd" else torch.optim.Adagrad)(cores, lr=lr)
    own, state, seen = {}, {}, collections.Counter()
    for step in range(7):
        ids, offsets = ragged(rng, 40, 12)
        seen.update(ids.tolist())
        table = reference_table(cores, bag.num_embeddings)
        rows = {i: own[i].clone().requires_grad_() if i in own else table[i] for i in set(ids.tolist())}
        looked_up = torch.stack([rows[i] for i in ids.tolist()])
        pooled = torch.zeros(offsets.numel() - 1, bag.embedding_dim, dtype=torch.float64)
        of_bag = torch.repeat_interleave(torch.arange(offsets.numel() - 1), offsets.diff())
        pooled = pooled.index_add(0, of_bag, looked_up)
        out = bag(ids, offsets[:-1])
        torch.testing.assert_close(out, pooled)
        out.square().sum().backward()
        outside.zero_grad()
        pooled.square().sum().backward()
        outside.step()
        for i in own.keys() & rows.keys():
            grad = rows[i].grad
            square = grad.square().mean() if optimizer == "rowwise_adagrad" else grad.square()
            state[i] = state[i] + square
            own[i] = own[i] - lr * (grad if optimizer == "sgd" else grad / (state[i].sqrt() + eps))
        if step % 3 == 1:
            assert bag.cache_populate() == 15
            chosen = sorted(seen, key=lambda i: (-seen[i], i))[:15]
            fresh = reference_table(cores, bag.num_embeddings).detach()
            own = {i: own.get(i, fresh[i]) for i in chosen}
            state = {i: state.get(i, torch.zeros((), dtype=torch.float64)) for i in chosen}
    expected = reference_table(cores, bag.num_embeddings).detach()
    for i, row in own.items():
        expected[i] = row
    torch.testing.assert_close(bag.full_weight().detach(), expected)


def test_trained_cached_rows_get_dense_gradients_without_the_fused_optimizer():
    bag = make_bag(sparse=False, use_cache=True, cache_size=5, cache_gradient="rows")
    bag.update_cache(torch.tensor([3, 8]))
    bag.cache_populate()
    bag(torch.tensor([[3, 3, 9]])).sum().backward()
    expected = torch.zeros(5, 60, dtype=torch.float64)
    expected[0] = 2
    assert torch.equal(bag.cache_weight.grad, expected)
    one = make_bag(sparse=False)
    one(torch.tensor([[9]])).sum().backward()
    torch.testing.assert_close([core.grad for core in bag.tt_cores], [core.grad for core in one.tt_cores])


@few
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=8), st.integers(0, 12))
def test_counts_are_exact_or_low_by_a_bounded_part(batches, capacity):
    counter = IdCounter(capacity)
    truth = collections.Counter()
    for batch in batches:
        counter.add(*torch.unique(torch.tensor(batch, dtype=torch.int64), return_counts=True))
        truth.update(batch)
        counter._merge()
    counts = dict(zip(counter.ids.tolist(), counter.counts.tolist(), strict=True))
    if capacity == 0 or len(truth) <= capacity:
        assert counts == truth
    assert capacity == 0 or len(counts) <= capacity
    slack = sum(truth.values()) / (capacity + 1) if capacity else 0
    assert all(count - slack <= counts.get(i, 0) <= count for i, count in truth.items())
    ranked = sorted(counts, key=lambda i: (-counts[i], i))
    assert counter.top(5).tolist() == sorted(ranked[:5])


# ---- several tables


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(("num_tables", "num_cores"), [(1, 3), (3, 2), (3, 3), (4, 4)])
def test_batched_tables_equal_separate_ones(num_tables, num_cores, mode):
    p, q = P[:num_cores], Q[:num_cores]
    num_embeddings, dim, num_bags = math.prod(p) - 3, math.prod(q), 6
    batched = BatchedTTEmbeddingBags(
        num_tables, num_embeddings, dim, RANKS[: num_cores - 1], p, q,
        optimizer="adagrad", mode=mode, dtype=torch.float64,
    )  # fmt: skip
    separate = [make_bag(num_cores, rows_short=3, optimizer="adagrad", mode=mode) for _ in range(num_tables)]
    with torch.no_grad():
        for table, bag in enumerate(separate):
            for core, source in zip(bag.tt_cores, batched.tt_cores, strict=True):
                core.copy_(source[table : table + 1])
    rng = np.random.default_rng(0)
    for _ in range(3):
        parts = [ragged(rng, num_embeddings, num_bags) for _ in range(num_tables)]
        lengths = torch.cat([offsets.diff() for _, offsets in parts])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        out = batched(torch.cat([ids for ids, _ in parts]), offsets)
        expected = torch.stack([bag(ids, o[:-1]) for bag, (ids, o) in zip(separate, parts, strict=True)])
        assert out.shape == (num_tables, num_bags, dim)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(batched.full_weight(), torch.stack([bag.full_weight() for bag in separate]))


@pytest.mark.parametrize("cache_gradient", ["cores", "rows"])
def test_one_cache_serves_all_tables(cache_gradient):
    bags = BatchedTTEmbeddingBags(
        3, 100, 12, [4], use_cache=True, cache_size=4, cache_gradient=cache_gradient, dtype=torch.float64
    )
    ids, offsets = torch.tensor([7, 7, 7, 8, 8, 9, 9, 1]), torch.tensor([0, 4, 7, 8])
    bags(ids, offsets)
    assert bags.cache_populate() == 4
    table = bags.full_weight()
    with torch.no_grad():
        out = bags(ids, offsets)[:, 0]
    torch.testing.assert_close(
        out, torch.stack([3 * table[0, 7] + table[0, 8], table[1, 8] + 2 * table[1, 9], table[2, 1]])
    )
    assert bags.hit_ratio > 0


# ---- whole module


@pytest.mark.parametrize("cache_gradient", ["cores", "rows"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_reloaded_bag_continues_as_the_saved_one(tmp_path, optimizer, cache_gradient):
    options = {"optimizer": optimizer, "use_cache": True, "cache_size": 10, "cache_gradient": cache_gradient}
    rng = np.random.default_rng(0)
    bag = make_bag(**options)
    train(bag, [ragged(rng, 50)])
    bag.cache_populate()
    train(bag, [ragged(rng, 50)])
    torch.save(bag.state_dict(), tmp_path / "bag.pt")
    other = make_bag(seed=1, **options)
    other.load_state_dict(torch.load(tmp_path / "bag.pt"))
    batches = [ragged(rng, 50) for _ in range(2)]
    for each in (bag, other):
        train(each, batches)
        each.cache_populate()
        with torch.no_grad():
            each(torch.arange(50)[None])
    first, second = bag.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(bag.full_weight(), other.full_weight()) and bag.hit_ratio == other.hit_ratio


def test_a_cache_of_copies_follows_a_change_of_dtype():
    bag = make_bag(use_cache=True, cache_size=10)
    bag.update_cache(torch.arange(10))
    bag.cache_populate()
    with torch.no_grad():
        bag(torch.arange(10)[None])
        bag.float()
        bag.tt_cores[0].data *= 2
        bag._apply(lambda tensor: tensor)
        torch.testing.assert_close(bag(torch.arange(10)[:, None]), table_of(bag)[:10])


def test_bytes_count_everything_held():
    p, q, r = P[:3], Q[:3], [1, *RANKS[:2], 1]
    cores = 8 * sum(p[k] * r[k] * q[k] * r[k + 1] for k in range(3))
    assert make_bag().memory_bytes() == {"cores": cores, "optimizer_state": 0, "cache": 0, "counts": 0}
    bag = make_bag(optimizer="rowwise_adagrad", use_cache=True, cache_size=10, hashtbl_size=20, cache_gradient="rows")
    bag.update_cache(torch.arange(7))
    bag.cache_populate()
    cache = 10 * 60 * 8 + 10 * 8 + 10 * 8 + 2 * 8  # rows, ids, one state a row, hit counters
    assert bag.memory_bytes() == {"cores": cores, "optimizer_state": cores, "cache": cache, "counts": 7 * 16}
    held = sum(t.numel() * t.element_size() for t in [*bag.parameters(), *bag.buffers()])
    assert held == sum(bag.memory_bytes().values())


def test_the_representation_names_shapes_and_settings():
    shown = repr(make_bag(optimizer="adagrad", use_cache=True, cache_size=5))
    assert "691, 60, tt_ranks=[13, 12], tt_p_shapes=[7, 9, 11], tt_q_shapes=[3, 4, 5]" in shown
    assert "fused adagrad" in shown and "cache_size=5" in shown


NONE = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: TTEmbeddingBag(100, 8, [4, 4], [2, 2, 2]),
            ValueError,
            "product >= num_embeddings = 100, .* 8:",
        ),
        (
            lambda: TTEmbeddingBag(100, 8, [4, 4], None, [2, 2, 3]),
            ValueError,
            "product embedding_dim = 8, .* 12",
        ),
        (lambda: TTEmbeddingBag(100, 8, [4], [5, 5, 5]), ValueError, "2 factors >= 1 in tt_p_shapes"),
        (lambda: TTEmbeddingBag(100, 8, [4] * 4), ValueError, "1 to 3 tt_ranks"),
        (lambda: TTEmbeddingBag(100, 8, [0]), ValueError, "1 to 3 tt_ranks"),
        (lambda: TTEmbeddingBag(0, 8, [4]), ValueError, "num_embeddings and embedding_dim >= 1"),
        (
            lambda: TTEmbeddingBag(100, 8, [4], weight_dist="xavier"),
            ValueError,
            "weight_dist in .* found 'xavier'",
        ),
        (lambda: TTEmbeddingBag(100, 8, [4], optimizer="adam"), ValueError, "optimizer in .* found 'adam'"),
        (lambda: TTEmbeddingBag(100, 8, [4], mode="min"), ValueError, "mode in .* found 'min'"),
        (
            lambda: TTEmbeddingBag(100, 8, [4], padding_idx=100),
            ValueError,
            "padding_idx in -100..99, found 100",
        ),
        (
            lambda: TTEmbeddingBag(100, 8, [4], use_cache=True, cache_size=9, hashtbl_size=8),
            ValueError,
            "hashtbl_size >=",
        ),
        (lambda: make_bag()(torch.tensor([[691]])), IndexError, "indices in 0..690, found 691"),
        (lambda: make_bag()(torch.tensor([[-1]])), IndexError, "found -1"),
        (
            lambda: make_bag()(torch.tensor([[0.5]])),
            ValueError,
            "int64 or int32 indices, found torch.float32",
        ),
        (lambda: make_bag()(torch.tensor([1, 2])), ValueError, "1-D input with offsets"),
        (lambda: make_bag()(torch.tensor([[1]]), torch.tensor([0])), ValueError, "2-D input without"),
        (lambda: make_bag()(torch.tensor([1, 2]), torch.tensor([0, 2, 1])), ValueError, "falling in between"),
        (lambda: make_bag()(torch.tensor([1, 2]), torch.tensor([1])), ValueError, "start at 0"),
        (lambda: make_bag()(torch.tensor([1, 2]), torch.tensor([0, 3])), ValueError, "ending at 2 or below"),
        (
            lambda: make_bag()(torch.tensor([1, 2]), torch.tensor([0.0])),
            ValueError,
            "1-D int64 or int32 offsets",
        ),
        (
            lambda: make_bag(include_last_offset=True)(torch.tensor([1]), torch.tensor([0, 0])),
            ValueError,
            "ending at 1,",
        ),
        (lambda: make_bag(include_last_offset=True)(NONE, NONE), ValueError, "at least one"),
        (
            lambda: make_bag(mode="mean")(torch.tensor([[1]]), None, torch.ones(1, 1)),
            ValueError,
            'mode "sum"',
        ),
        (
            lambda: make_bag()(torch.tensor([[1]]), None, torch.ones(1)),
            ValueError,
            "per_sample_weights of shape",
        ),
        (lambda: make_bag().cache_populate(), ValueError, "use_cache=True"),
        (lambda: make_bag().update_cache(torch.tensor([1])), ValueError, "use_cache=True"),
        (
            lambda: TTEmbeddingBag.from_dense(torch.full((10, 4), math.nan), [2]),
            ValueError,
            "found 40 .* first in row 0",
        ),
        (lambda: TTEmbeddingBag.from_dense(torch.zeros(10), [2]), ValueError, "shape \\(N, D\\)"),
        (lambda: BatchedTTEmbeddingBags(0, 100, 8, [4]), ValueError, "num_tables >= 1"),
        (
            lambda: BatchedTTEmbeddingBags(2, 100, 8, [4])(torch.tensor([1]), torch.tensor([0, 1])),
            ValueError,
            "2 x bags \\+ 1",
        ),
        (
            lambda: BatchedTTEmbeddingBags(2, 100, 8, [4])(torch.tensor([1]), torch.tensor([0, 1, 0])),
            ValueError,
            "never fall",
        ),
        (lambda: suggested_tt_shapes(0), ValueError, "size >= 1"),
    ],
)
def test_misuse_says_what_was_expected_and_what_was_found(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_gpu_gives_what_a_cpu_gives(optimizer, cuda):
    bags = [make_bag(optimizer=optimizer, device=device, use_cache=True) for device in ("cpu", cuda)]
    rng = np.random.default_rng(0)
    batches = [ragged(rng, bags[0].num_embeddings, 50) for _ in range(3)]
    for bag in bags:
        device = bag.tt_cores[0].device
        train(bag, [(ids.to(device), offsets.to(device)) for ids, offsets in batches])
        bag.cache_populate()
    torch.testing.assert_close(bags[1].full_weight().cpu(), bags[0].full_weight())
