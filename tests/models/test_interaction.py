from __future__ import annotations

import pytest
import torch

from slipstream.models.interaction import PairProducts, pair_products


def vectors_and_pairs(num_vectors: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = torch.randn(3, num_vectors, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.tril_indices(num_vectors, num_vectors, offset=-1)
    return vectors.requires_grad_(), rows * num_vectors + columns


@pytest.mark.parametrize("num_vectors", [2, 5])
def test_products_of_pairs_and_their_gradient_are_those_of_autograd(num_vectors: int):
    vectors, pairs = vectors_and_pairs(num_vectors)
    expected = pair_products(vectors, pairs)
    found = PairProducts.apply(vectors, pairs)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(products, vectors, upstream)[0] for products in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(PairProducts.apply, (vectors, pairs))


def test_products_in_bfloat16_have_a_gradient_in_the_vectors_type():
    vectors, pairs = vectors_and_pairs()
    vectors = vectors.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        products = PairProducts.apply(vectors, pairs)
    assert products.dtype == torch.bfloat16
    products.sum().backward()
    assert vectors.grad is not None and vectors.grad.dtype == torch.float32


def test_a_gpu_takes_the_gradient_of_one_product(cuda: torch.device):
    vectors, pairs = vectors_and_pairs()
    there = vectors.detach().float().to(cuda).requires_grad_()
    products = pair_products(there, pairs.to(cuda))
    assert type(products.grad_fn).__name__ == "PairProductsBackward"
    torch.testing.assert_close(
        products.detach().cpu().double(), pair_products(vectors, pairs).detach(), rtol=1e-4, atol=1e-4
    )
