"""Calls as FBTT-Embedding's documentation and code make them."""

import re

import pytest
import torch

from slipstream.embedding.tt.bag import TTEmbeddingBag as OwnBag
from slipstream.embedding.tt.fbtt import (
    OptimType,
    TableBatchedTTEmbeddingBag,
    TTEmbeddingBag,
    suggested_tt_shapes,
    tt_matrix_to_full,
)

TAKEN = {
    OptimType.SGD,
    OptimType.EXACT_SGD,
    OptimType.EXACT_ADAGRAD,
    OptimType.EXACT_ROWWISE_ADAGRAD,
    OptimType.ADAM,
}


def test_the_documented_constructions_work():
    tt_emb = TTEmbeddingBag(
        num_embeddings=1000000,
        embedding_dim=64,
        tt_p_shapes=[120, 90, 110],
        tt_q_shapes=[4, 4, 4],
        tt_ranks=[12, 14],
        sparse=False,
        use_cache=False,
        weight_dist="uniform",
    )
    assert [tuple(core.shape[1:]) for core in tt_emb.get_params()] == [
        (120, 1, 4, 12),
        (90, 12, 4, 14),
        (110, 14, 4, 1),
    ]
    tt_emb = TTEmbeddingBag(
        num_embeddings=1000000,
        embedding_dim=64,
        tt_p_shapes=[120, 90, 110],
        tt_q_shapes=[4, 4, 4],
        tt_ranks=[12, 14],
        sparse=True,
        optimizer=OptimType.SGD,
        learning_rate=0.05,
        eps=1.0e-10,
        use_cache=True,
        cache_size=1000,
        hashtbl_size=1000,
    )
    tt_emb(torch.tensor([3, 3, 999_999]), torch.tensor([0, 1])).sum().backward()
    assert tt_emb.cache_populate() == 2
    tt_emb = TableBatchedTTEmbeddingBag(
        num_tables=100,
        num_embeddings=1000000,
        embedding_dim=64,
        tt_p_shapes=[120, 90, 110],
        tt_q_shapes=[4, 4, 4],
        tt_ranks=[12, 14],
        sparse=False,
        use_cache=False,
        weight_dist="uniform",
    )
    assert tt_emb(torch.arange(200), torch.arange(0, 201, 2)).shape == (100, 1, 64)


def test_the_documented_lookup_works():
    embedding_sum = TTEmbeddingBag(10, 3, None, None, tt_ranks=[2, 2], sparse=False, use_cache=False)
    input = torch.LongTensor([1, 2, 4, 5, 4, 3, 2, 9])  # noqa: A001 (as documented)
    offsets = torch.LongTensor([0, 4])
    expected = torch.stack([embedding_sum.full_weight()[part].sum(0) for part in input.split(4)])
    torch.testing.assert_close(embedding_sum(input, offsets), expected)


def test_shapes_may_come_by_position_as_in_the_code():
    by_position = TTEmbeddingBag(100, 8, [3, 3], [4, 5, 5], [2, 2, 2])
    assert (by_position.tt_p_shapes, by_position.tt_q_shapes) == ([4, 5, 5], [2, 2, 2])
    with pytest.raises(TypeError, match="expected tt_ranks"):
        TTEmbeddingBag(100, 8)
    with pytest.raises(TypeError, match="found 3 more arguments"):
        TTEmbeddingBag(100, 8, [3, 3], [4, 5, 5], [2, 2, 2], [1])


def test_offsets_with_the_last_end_are_an_error_that_says_so():
    bag = TTEmbeddingBag(100, 8, [3, 3])
    with pytest.raises(ValueError, match=re.escape("FBTT's code passes B + 1 offsets")):
        bag(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))
    bag = TTEmbeddingBag(100, 8, [3, 3], include_last_offset=True)
    assert bag(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]), True).shape == (2, 8)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(OptimType.EXACT_SGD, "sgd"), (OptimType.EXACT_ADAGRAD, "adagrad"), (OptimType.ADAM, "adam")],
)
def test_steps_are_those_of_the_bag_it_stands_for(theirs: OptimType, ours: str):
    made = [
        TTEmbeddingBag(50, 6, [2, 2], optimizer=theirs, generator=torch.Generator().manual_seed(1)),
        OwnBag(50, 6, [2, 2], optimizer=ours, generator=torch.Generator().manual_seed(1)),
    ]
    for bag in made:
        bag(torch.tensor([1, 7, 7]), torch.tensor([0, 2])).square().sum().backward()
    for one, other in zip(made[0].tt_cores, made[1].tt_cores, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", sorted(set(OptimType) - TAKEN, key=str))
def test_optimizers_that_the_original_takes_for_adagrad_are_refused(optimizer: OptimType):
    with pytest.raises(ValueError, match="computes Adagrad instead"):
        TTEmbeddingBag(50, 6, [2, 2], optimizer=optimizer)


P, Q, RANKS = [3, 4, 2], [2, 2, 2], [2, 3]


def draw_cores() -> list[torch.Tensor]:
    """Cores with axes (r, p, q, r')."""
    outer, generator = [1, *RANKS, 1], torch.Generator().manual_seed(0)
    return [torch.randn(outer[at], P[at], Q[at], outer[at + 1], generator=generator) for at in range(3)]


@pytest.mark.parametrize("ranks", [RANKS, [1, *RANKS, 1]], ids=["inner ranks", "all ranks"])
@pytest.mark.parametrize("order", [None, [0, 1, 2, 3], [1, 0, 2, 3], [3, 1, 2, 0]])
@pytest.mark.parametrize("is_merged", [False, True])
def test_cores_are_multiplied_out_from_any_order_of_their_axes(
    ranks: list[int], order: list[int] | None, is_merged: bool
):
    cores = draw_cores()
    expected = torch.einsum("apib,bqjc,crkd->pqrijk", *cores).reshape(24, 8)
    if order is not None:
        cores = [core.permute(order) for core in cores]
        if is_merged:
            cores = [core.reshape(1, core.shape[0], -1) for core in cores]
    full = tt_matrix_to_full(P, Q, ranks, cores, tt_permute=order)
    torch.testing.assert_close(full, expected)


def test_the_cores_of_a_bag_give_its_table_and_take_gradients():
    bag = TTEmbeddingBag(27, 8, [2, 3], [3, 3, 3], [2, 2, 2])
    cores = [core.clone().detach().requires_grad_(True) for core in bag.tt_cores]
    full = tt_matrix_to_full([3, 3, 3], [2, 2, 2], [2, 3], cores, [1, 0, 2, 3])
    torch.testing.assert_close(full, bag.full_weight())
    full.sum().backward()
    assert all(core.grad is not None and core.grad.shape == core.shape for core in cores)


def test_cores_that_could_be_read_in_another_order_are_refused():
    cores = [core.transpose(0, 1) for core in draw_cores()]
    with pytest.raises(ValueError, match=re.escape("pass tt_permute=[1, 0, 2, 3]")):
        tt_matrix_to_full(P, Q, RANKS, cores)
    with pytest.raises(ValueError, match="undoes itself"):
        tt_matrix_to_full(P, Q, RANKS, cores, [1, 2, 0, 3])
    with pytest.raises(ValueError, match="expected core 0"):
        tt_matrix_to_full([9, 4, 2], Q, RANKS, cores, [1, 0, 2, 3])


@pytest.mark.parametrize("weight_dist", ["uniform", "naive-uniform", "normal", "approx-uniform", "approx-normal"])
@pytest.mark.parametrize("enforce", [False, True])
def test_every_initialisation_of_the_original_is_known_by_its_name(weight_dist: str, enforce: bool):
    bag = TTEmbeddingBag(1000, 12, [4, 4], weight_dist=weight_dist, enforce_embedding_dim=enforce)
    assert bag.full_weight().shape == (1000, 12)
    with pytest.raises(ValueError, match="expected weight_dist in"):
        TTEmbeddingBag(1000, 12, [4, 4], weight_dist="gaussian")


def test_naive_uniform_cores_lie_between_0_and_the_root_of_the_rows():
    bag = TableBatchedTTEmbeddingBag(2, 100, 8, [4, 4], weight_dist="naive-uniform")
    for core in bag.tt_cores:
        assert 0 <= core.min() and 0.09 < core.max() < 0.1
        assert not torch.equal(core[0], core[1])


def test_shapes_are_suggested():
    assert sorted(suggested_tt_shapes(11_000_000, 3)) == sorted([200, 220, 250])
