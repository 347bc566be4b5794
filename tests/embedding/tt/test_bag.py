import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tt_by_einsum import RANKS, P, Q, few, make_bag, ragged, table_of, train

from slipstream.embedding.tt.bag import BatchedTTEmbeddingBags, TTEmbeddingBag
from slipstream.embedding.tt.shapes import suggested_tt_shapes


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
    no_bags = batched(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert no_bags.shape == (num_tables, 0, dim)


# ---- whole module


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
        (lambda: TTEmbeddingBag(100, 8, [4], optimizer="adamw"), ValueError, "optimizer in .* found 'adamw'"),
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
