"""Cores, their fused optimizer and their cache, against plain steps through the whole table."""

import collections
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tt_by_einsum import RANKS, P, Q, make_bag, ragged, reference_table, table_of, train

from slipstream.embedding.tt.bag import BatchedTTEmbeddingBags, TTEmbeddingBag


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


@pytest.mark.parametrize("cache_gradient", ["cores", "rows"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_reloaded_bag_continues_as_the_saved_one(tmp_path, optimizer, cache_gradient):
    options = {"optimizer": optimizer, "use_cache": True, "cache_size": 10, "cache_gradient": cache_gradient}
    rng = np.random.default_rng(0)
    bag = make_bag(**options)
    train(bag, [ragged(rng, 50)])
    bag.cache_populate()
    train(bag, [ragged(rng, 50)])
    save_file(bag.state_dict(), tmp_path / "bag.safetensors")
    other = make_bag(seed=1, **options)
    other.load_state_dict(load_file(tmp_path / "bag.safetensors"))
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


def test_bytes_count_everything_in_use():
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
