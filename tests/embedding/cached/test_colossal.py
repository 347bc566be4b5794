"""Calls as ColossalAI's CachedEmbedding takes them."""

import re

import pytest
import torch
from torch import nn

from slipstream.embedding.cached.colossal import CachedEmbeddingBag, EvictionStrategy


def test_arguments_stand_where_they_stood():
    weight = torch.randn(10, 8)
    bag = CachedEmbeddingBag(10, 8, None, None, 2.0, False, True, weight.clone(), "mean", True, cache_ratio=1.0)
    plain = nn.EmbeddingBag(10, 8, mode="mean", include_last_offset=True, sparse=True, _weight=weight.clone())
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-3) for module in (bag, plain)]
    for _ in range(5):
        indices = torch.randint(0, 10, (8,))
        outputs = [module(indices, torch.tensor([0, 4, 8])) for module in (bag, plain)]
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.sum().backward()
            optimizer.step()
    assert torch.equal(bag.weight, plain.weight)


@pytest.mark.parametrize("counts", [None, torch.tensor([4, 2, 1, 3, 1])])
def test_the_published_lfu_script_gives_its_hit_counts(counts: torch.Tensor | None):
    bag = CachedEmbeddingBag(
        5,
        5,
        cache_ratio=3 / 5,
        pin_weight=True,
        ids_freq_mapping=counts,
        warmup_ratio=1.0,
        evict_strategy=EvictionStrategy.LFU,
    )
    learning = [[2], [1, 2], [0, 2], *[[0, 1, 2]] * 4, *[[0, 2]] * 4, *[[0]] * 4, [0, 1, 2]]
    with torch.no_grad():
        for rows in [*learning, [0, 1, 2], [3], [2], [4], [2], [0]]:
            bag(torch.tensor(rows), torch.tensor([0]))
    assert bag.num_hits_history[-6:] == [3, 0, 1, 0, 1, 1]
    assert bag.num_miss_history[-6:] == [0, 1, 0, 1, 0, 0]


def test_histories_count_distinct_rows_and_evaluation_leaves_none():
    bag = CachedEmbeddingBag(9, 2, cache_ratio=0.5, warmup_ratio=0.0)
    with torch.no_grad():
        for rows in ([4, 4, 7], [4, 4, 4, 8]):
            bag(torch.tensor(rows), torch.tensor([0]))
        bag.eval()(torch.tensor([1]), torch.tensor([0]))
    assert (bag.num_hits_history, bag.num_miss_history) == ([0, 1], [2, 1])


def test_rows_that_learnt_and_make_room_are_counted_as_written_back():
    bag = CachedEmbeddingBag(9, 2, cache_ratio=0.25, warmup_ratio=0.0)
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.1)
    for rows in ([4, 7], [4, 8], [1, 2]):
        bag(torch.tensor(rows), torch.tensor([0])).sum().backward()
        optimizer.step()
    assert bag.num_write_back_history == [0, 1, 2]


def test_the_bag_answers_for_its_manager():
    bag = CachedEmbeddingBag(8, 2, cache_ratio=0.5, warmup_ratio=0.0)
    with torch.no_grad():
        bag(torch.tensor([4, 7]), torch.tensor([0]))
    assert bag.cache_weight_mgr.num_miss_history == [2]
    assert bag.cache_weight_mgr.cuda_available_row_num == 2
    bag.cache_weight_mgr.flush()
    assert torch.equal(bag.cache_weight_mgr.cpu_weight_data(4), bag.weight[4])
    bag.set_cache_op(True)
    bag.set_cache_mgr_async_copy(True)


@pytest.mark.parametrize(
    "name", ["prepare_ids", "reorder", "print_comm_stats", "swap_in_bandwidth", "swap_out_bandwidth"]
)
def test_members_that_are_not_known_say_what_to_do(name: str):
    with pytest.raises(AttributeError, match=f"{name} is not known here: "):
        getattr(CachedEmbeddingBag(8, 2), name)


def test_lookups_by_position_and_classes_over_several_devices_say_what_to_do():
    with pytest.raises(ValueError, match=re.escape("prefetch(batches)")):
        CachedEmbeddingBag(8, 2).set_cache_op(False)
    with pytest.raises(ImportError, match="found ParallelCachedEmbeddingBag: a table is never cut here"):
        from slipstream.embedding.cached.colossal import ParallelCachedEmbeddingBag  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from slipstream.embedding.cached.colossal import Nothing  # noqa: F401


@pytest.mark.parametrize("num_rows", [1, 7, 99, 1000])
def test_a_cache_may_be_given_in_rows(num_rows: int):
    bag = CachedEmbeddingBag.from_pretrained(torch.rand(99, 2), cuda_row_num=num_rows)
    assert bag.row_cache.capacity == min(num_rows, 99)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_trained_table_is_taken_over(freeze: bool):
    weight = torch.randn(20, 4)
    bag = CachedEmbeddingBag.from_pretrained(weight, freeze=freeze, cache_ratio=0.5, mode="sum")
    looked_up = bag(torch.tensor([[3, 3], [1, 19]]), shape_hook=lambda pooled: pooled.view(2, 2, 2))
    expected = torch.stack([weight[3] * 2, weight[1] + weight[19]])
    torch.testing.assert_close(looked_up.flatten(1).detach(), expected)
    assert looked_up.requires_grad is not freeze
    with pytest.raises(ValueError, match="expected a table of shape"):
        CachedEmbeddingBag.from_pretrained(weight[0])


def test_a_fresh_table_is_drawn_as_there_with_a_padding_row_of_zeros():
    bag = CachedEmbeddingBag(50, 4, 7)
    assert bag.weight.abs().max() <= 1 / 50 and bag.weight.std() > 0.005
    assert not bag.weight[7].any()


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_cannot_be_honoured_is_refused(options: dict[str, object]):
    with pytest.raises(ValueError, match="expected max_norm=None"):
        CachedEmbeddingBag(5, 5, **options)  # type: ignore[arg-type]
