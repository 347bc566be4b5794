"""Products of core slices: both ways to multiply agree."""

import pytest
import torch
from tt_by_einsum import make_bag, table_of

from slipstream.embedding.tt.kernels import contract, contract_backward, plan_contraction


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
