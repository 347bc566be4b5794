"""Sizes are factored, cores drawn and tables cut as stated."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tt_by_einsum import table_of

from slipstream.embedding.tt.bag import TTEmbeddingBag
from slipstream.embedding.tt.shapes import entry_variance, suggested_tt_shapes


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
    stated = {"uniform": 2 / (num_embeddings + dim), "normal": 1 / num_embeddings}
    assert entry_variance(weight_dist, num_embeddings, dim) == stated.get(weight_dist, 1 / (3 * num_embeddings))
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
